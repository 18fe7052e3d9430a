"""The structures of CT, MRI, X-ray, ultrasound and mammography, with their queries."""

from phantoms.structure import Structure

ABDOMEN = (
    Structure(
        name="liver",
        supercategory="abdominal organ",
        modalities=("CT",),
        reasons=("the organ that clears alcohol from the blood", "the large organ that makes bile"),
        queries=(
            "Which organ would be enlarged in long-standing alcohol use?",
            "Which organ makes the bile that helps to digest fat?",
            "Where are most drugs and toxins broken down?",
            "Which large organ turns yellow skin into a warning sign when it fails?",
        ),
        held_out_queries=(
            "Which organ fails after many years of alcohol?",
            "Where is bile made?",
        ),
    ),
    Structure(
        name="spleen",
        supercategory="abdominal organ",
        modalities=("CT",),
        reasons=(
            "the organ that filters old red blood cells",
            "the organ that bleeds after a blow to the left ribs",
        ),
        queries=(
            "Which organ filters old red blood cells out of the blood?",
            "Which organ may tear and bleed after a blow to the lower left ribs?",
            "Which organ grows large in malaria?",
            "After the loss of which organ are vaccines against bacteria needed?",
        ),
        held_out_queries=(
            "Which organ removes old blood cells?",
            "Which organ may bleed after a fall on the left ribs?",
        ),
    ),
    Structure(
        name="kidney",
        supercategory="abdominal organ",
        modalities=("CT", "ultrasound"),
        reasons=("the organ that makes urine", "the organ that is harmed by long-standing diabetes"),
        queries=(
            "Which organ makes urine from the blood?",
            "Which organ needs dialysis in its place when it fails?",
            "Which organ keeps salt and water in balance?",
            "Which organ may pass small stones into the bladder?",
        ),
        held_out_queries=(
            "Where is urine made?",
            "Which organ fails when a patient needs dialysis?",
        ),
    ),
    Structure(
        name="aorta",
        supercategory="cardiovascular",
        modalities=("CT",),
        reasons=(
            "the large vessel that leaves the left heart",
            "the vessel that may burst when it is too wide",
        ),
        queries=(
            "Which large vessel carries blood from the heart to the legs?",
            "Which vessel may burst without warning when it grows too wide?",
            "Where would a doctor look for an aneurysm in an old smoker?",
            "Which round vessel lies in front of the spine and pulses?",
        ),
        held_out_queries=(
            "Which vessel may grow too wide and burst in a smoker?",
            "Which large vessel pulses in front of the spine?",
        ),
    ),
    Structure(
        name="vertebra",
        supercategory="bone",
        modalities=("CT",),
        reasons=("the bone that guards the spinal cord", "the bone that breaks when it is thin in old age"),
        queries=(
            "Which part guards the spinal cord?",
            "What may collapse in old age when calcium is lost?",
            "Which hard part carries the weight of the trunk?",
            "Where would a break cause back pain and loss of height?",
        ),
        held_out_queries=(
            "Which hard part lies around the spinal cord?",
            "What may break in old age and cause back pain?",
        ),
    ),
    Structure(
        name="stomach",
        supercategory="gastrointestinal tract",
        modalities=("CT",),
        reasons=("the sac where food meets acid", "the organ that holds gas and fluid after a meal"),
        queries=(
            "Which organ mixes food with acid?",
            "Where does a meal go first after it is swallowed?",
            "Which organ holds both gas and fluid after a drink?",
            "Which organ is made smaller in surgery for weight loss?",
        ),
        held_out_queries=(
            "Which organ makes acid to digest a meal?",
            "Where is food held first after a meal?",
        ),
    ),
    Structure(
        name="liver tumour",
        supercategory="tumour",
        modalities=("CT",),
        reasons=("a dark round growth that may be cancer", "the growth that a biopsy must sample"),
        queries=(
            "Which dark round growth may be cancer that has spread here?",
            "Where would a biopsy needle be aimed in a patient with weight loss?",
            "Which spot takes up less contrast than the organ around it?",
            "What should be burned or cut out before it grows?",
        ),
        held_out_queries=(
            "Which dark spot may have spread here from a bowel cancer?",
            "What should a biopsy sample before it grows?",
        ),
    ),
)

HEAD = (
    Structure(
        name="cerebellum",
        supercategory="brain",
        modalities=("MRI",),
        reasons=("the striped part that keeps balance", "the part that alcohol upsets when a person sways"),
        queries=(
            "Which part keeps us in balance when we walk?",
            "Damage to which part makes a person sway as if drunk?",
            "Which part makes hand movements smooth and exact?",
            "Which striped part lies low at the back of the head?",
        ),
        held_out_queries=(
            "Which part at the back of the head keeps balance?",
            "Damage to which part makes movements less smooth?",
        ),
    ),
    Structure(
        name="brainstem",
        supercategory="brain",
        modalities=("MRI",),
        reasons=("the stalk that drives breathing", "the path from the head to the spinal cord"),
        queries=(
            "Which part drives breathing and the heart beat?",
            "Where do all nerve paths pass on their way to the spinal cord?",
            "A stroke in which small part may stop breathing at once?",
            "Which stalk joins the head with the spinal cord?",
        ),
        held_out_queries=(
            "Damage to which part may stop breathing?",
            "Which part do nerve paths pass to reach the spinal cord?",
        ),
    ),
    Structure(
        name="ventricle",
        supercategory="brain",
        modalities=("MRI",),
        reasons=(
            "the dark space that holds clear fluid",
            "the fluid space that widens when drainage is blocked",
        ),
        queries=(
            "Which dark space is filled with clear fluid?",
            "Which space widens when the flow of fluid is blocked?",
            "Where would a shunt be placed to drain fluid from the head?",
            "Which space grows as the tissue shrinks with age?",
        ),
        held_out_queries=(
            "Which space would a shunt drain?",
            "Which space holds the clear fluid in the head?",
        ),
    ),
    Structure(
        name="brain tumour",
        supercategory="tumour",
        modalities=("MRI",),
        reasons=("a bright ring of abnormal growth", "the growth that causes seizures and headache"),
        queries=(
            "What could explain new seizures and headache in the morning?",
            "Which bright ring takes up contrast and has a dead core?",
            "Which growth would a surgeon remove through the skull?",
            "Which spot has swelling around it and pushes on its neighbours?",
        ),
        held_out_queries=(
            "Which growth could explain new seizures?",
            "Which spot takes up contrast as a bright ring?",
        ),
    ),
)

CHEST = (
    Structure(
        name="right lung",
        supercategory="respiratory tract",
        modalities=("X-ray",),
        reasons=(
            "the breathing organ with three lobes",
            "the larger air-filled organ, away from the heart's tip",
        ),
        queries=(
            "Which air-filled organ has three lobes?",
            "Which breathing organ is the larger of the pair?",
            "Which air-filled side lies away from the tip of the heart?",
            "Into which side does a swallowed nut fall more often?",
        ),
        held_out_queries=(
            "Which breathing organ has three lobes?",
            "Which of the air-filled pair is larger?",
        ),
    ),
    Structure(
        name="left lung",
        supercategory="respiratory tract",
        modalities=("X-ray",),
        reasons=("the breathing organ with two lobes", "the air-filled organ that makes room for the heart"),
        queries=(
            "Which air-filled organ has only two lobes?",
            "Which breathing organ makes room for the heart?",
            "Which breathing organ is the smaller of the pair?",
            "Which air-filled side lies next to the tip of the heart?",
        ),
        held_out_queries=(
            "Which breathing organ has only two lobes?",
            "Which of the air-filled pair is smaller?",
        ),
    ),
    Structure(
        name="heart",
        supercategory="cardiovascular",
        modalities=("X-ray",),
        reasons=("the pump that moves the blood", "the muscle that grows large under high blood pressure"),
        queries=(
            "Which organ pumps the blood?",
            "Which muscle grows large after years of high blood pressure?",
            "Which organ is weak when the ankles swell and breath is short?",
            "Which bright shape between the air-filled organs beats?",
        ),
        held_out_queries=(
            "Which muscle pumps and beats?",
            "Which organ grows large under high blood pressure?",
        ),
    ),
    Structure(
        name="trachea",
        supercategory="respiratory tract",
        modalities=("X-ray",),
        reasons=("the tube that carries air into the chest", "the airway where a breathing tube is placed"),
        queries=(
            "Which tube carries air into the chest?",
            "Where is a breathing tube placed before surgery?",
            "Which dark tube is pushed aside by a large goitre?",
            "Where does air pass first below the voice box?",
        ),
        held_out_queries=(
            "Which dark tube does air pass on its way into the chest?",
            "Which tube may a goitre push aside?",
        ),
    ),
    Structure(
        name="pneumonia",
        supercategory="respiratory tract",
        modalities=("X-ray",),
        reasons=("a hazy patch of infection", "the cloudy area that explains fever and cough"),
        queries=(
            "Which hazy patch would explain fever and cough?",
            "Where has fluid from an infection filled the air sacs?",
            "Which cloudy area should clear after antibiotics?",
            "Where would crackles be heard in a patient with fever?",
        ),
        held_out_queries=(
            "Which cloudy patch would explain the cough?",
            "Which hazy area should antibiotics clear?",
        ),
    ),
    Structure(
        name="pacemaker",
        supercategory="device",
        modalities=("X-ray",),
        reasons=("the metal box that keeps the beat", "the implant that treats a slow pulse"),
        queries=(
            "Which metal box keeps the pulse from being too slow?",
            "Which implant has a battery and a wire?",
            "What was placed under the skin after fainting with a slow pulse?",
            "Which very bright object is not part of the body?",
        ),
        held_out_queries=(
            "Which implant treats a slow pulse?",
            "Which metal object has a battery?",
        ),
    ),
)

BELLY = (
    Structure(
        name="gallbladder",
        supercategory="biliary tract",
        modalities=("ultrasound",),
        reasons=("the sac that stores bile", "the dark sac that hurts after fatty food"),
        queries=(
            "Which sac stores bile between meals?",
            "Which dark sac squeezes after a fatty meal?",
            "What is taken out through small cuts when pain follows fatty food?",
            "Which pear-shaped sac appears black because it holds clear fluid?",
        ),
        held_out_queries=(
            "Which dark sac holds bile?",
            "Which sac causes pain after a fatty meal?",
        ),
    ),
    Structure(
        name="gallstone",
        supercategory="biliary tract",
        modalities=("ultrasound",),
        reasons=("the hard bright body that casts a shadow", "the lump that can block the flow of bile"),
        queries=(
            "Which hard bright body casts a dark shadow?",
            "What can slip out and block the flow of bile?",
            "What causes sudden pain when it blocks the neck of the sac?",
            "Which object stops the sound so that nothing is seen behind it?",
        ),
        held_out_queries=(
            "Which bright object casts a shadow behind it?",
            "What can block the sac and cause sudden pain?",
        ),
    ),
    Structure(
        name="fetal head",
        supercategory="fetus and placenta",
        modalities=("ultrasound",),
        reasons=("the oval ring of skull with a midline", "the part whose width dates a pregnancy"),
        queries=(
            "Which part's width tells how many weeks the pregnancy is?",
            "Which bright oval ring has a line through its middle?",
            "Which part of the baby should come first at birth?",
            "Where would we look for fluid on the brain of the unborn baby?",
        ),
        held_out_queries=(
            "Which bright ring has a line in the middle?",
            "Which part of the unborn baby should come first?",
        ),
    ),
    Structure(
        name="fetal abdomen",
        supercategory="fetus and placenta",
        modalities=("ultrasound",),
        reasons=(
            "the round grey part with a dark bubble inside",
            "the part whose girth shows how well the baby is fed",
        ),
        queries=(
            "Which part's girth shows how well the unborn baby is fed?",
            "Which round grey part holds a small dark bubble?",
            "Where do the liver and stomach of the baby lie?",
            "Which part of the baby is thin when growth is poor?",
        ),
        held_out_queries=(
            "Which grey part of the baby holds a dark bubble?",
            "Which part's girth is small when growth is poor?",
        ),
    ),
    Structure(
        name="placenta",
        supercategory="fetus and placenta",
        modalities=("ultrasound",),
        reasons=("the tissue that feeds the unborn baby", "the thick band that is delivered after the baby"),
        queries=(
            "What feeds the unborn baby with oxygen from its mother?",
            "Which thick band on the wall is delivered after the baby?",
            "What causes bleeding when it lies over the way out?",
            "To which tissue does the cord lead?",
        ),
        held_out_queries=(
            "Which tissue brings oxygen to the unborn baby?",
            "Which thick band on the wall causes bleeding?",
        ),
    ),
)

BREAST = (
    Structure(
        name="breast mass",
        supercategory="breast",
        modalities=("mammography",),
        reasons=("a bright lump with spikes", "the lump that may be cancer"),
        queries=(
            "Which bright lump with spikes may be cancer?",
            "Where should the biopsy needle be aimed?",
            "What might a woman feel as a hard lump?",
            "Which star-shaped spot should not be left to grow?",
        ),
        held_out_queries=(
            "Which hard lump with spikes should a biopsy sample?",
            "Which bright spot may be cancer?",
        ),
    ),
    Structure(
        name="nipple",
        supercategory="breast",
        modalities=("mammography",),
        reasons=("the tip where milk comes out", "the small knob at the front"),
        queries=(
            "Where does milk come out?",
            "Which small knob is pulled in by some cancers?",
            "Where do all the milk ducts end?",
            "Which tip points away from the chest wall?",
        ),
        held_out_queries=(
            "Where do the milk ducts come out?",
            "Which small tip may be pulled in?",
        ),
    ),
    Structure(
        name="pectoral muscle",
        supercategory="tissue",
        modalities=("mammography",),
        reasons=("the flesh that pulls the arm across the chest", "the bright wedge at the chest wall"),
        queries=(
            "Which flesh pulls the arm across the chest?",
            "Which bright wedge at the chest wall shows that the view is deep enough?",
            "What grows with push-ups?",
            "Behind which wedge do the ribs lie?",
        ),
        held_out_queries=(
            "Which wedge lies at the chest wall?",
            "Which flesh grows when the arm pulls?",
        ),
    ),
    Structure(
        name="lymph node",
        supercategory="tissue",
        modalities=("mammography",),
        reasons=("the bean in the armpit that traps cancer cells", "the oval bean with a dark middle"),
        queries=(
            "Where do cancer cells from here settle first?",
            "Which oval bean with a dark middle lies towards the armpit?",
            "What swells in the armpit when there is an infection?",
            "What would a surgeon sample in the armpit?",
        ),
        held_out_queries=(
            "What may trap cancer cells in the armpit?",
            "Which oval bean has a dark middle?",
        ),
    ),
)

RADIOLOGY = ABDOMEN + HEAD + CHEST + BELLY + BREAST
