"""The structures of CT and MRI, with their queries."""

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

TOMOGRAPHY = ABDOMEN + HEAD
