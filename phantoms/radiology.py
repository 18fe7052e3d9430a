"""The structures of X-ray, ultrasound and mammography, with their queries."""

from phantoms.structure import Structure

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

RADIOLOGY = CHEST + BELLY + BREAST
