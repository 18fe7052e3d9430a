"""The structures of endoscopy, fundus photography, pathology, dermoscopy and OCT, with their queries."""

from phantoms.structure import Structure

BOWEL = (
    Structure(
        name="bowel lumen",
        supercategory="gastrointestinal tract",
        modalities=("endoscopy",),
        reasons=("the dark way ahead", "the opening into which the scope should go"),
        queries=(
            "Where should the scope go next?",
            "Which dark opening shows the way ahead?",
            "Through which opening does stool pass?",
            "What would be narrow if the gut were blocked?",
        ),
        held_out_queries=(
            "Which opening should the scope pass next?",
            "Where is the dark way ahead?",
        ),
    ),
    Structure(
        name="polyp",
        supercategory="gastrointestinal tract",
        modalities=("endoscopy",),
        reasons=("the round bulge that may turn into cancer", "the growth that a snare can remove"),
        queries=(
            "Which round bulge may turn into cancer over the years?",
            "What should be removed with a snare?",
            "Which smooth red growth rises from the wall?",
            "What does screening of the gut hope to find early?",
        ),
        held_out_queries=(
            "Which growth should a snare remove?",
            "Which bulge on the wall may turn into cancer?",
        ),
    ),
    Structure(
        name="ulcer",
        supercategory="gastrointestinal tract",
        modalities=("endoscopy",),
        reasons=("the pale sore with a red rim", "the open sore that may bleed"),
        queries=(
            "Which pale sore has a red rim?",
            "Where has the lining been lost?",
            "Which open sore may cause pain and bleeding?",
            "What could be due to painkillers or to Crohn disease?",
        ),
        held_out_queries=(
            "Which open sore has lost its lining?",
            "Which pale area may cause bleeding?",
        ),
    ),
    Structure(
        name="forceps",
        supercategory="device",
        modalities=("endoscopy",),
        reasons=("the metal tool that takes samples", "the tool with two jaws"),
        queries=(
            "Which metal tool takes a sample?",
            "Which object has two jaws?",
            "What did the doctor push through the scope?",
            "Which grey thing is not part of the body?",
        ),
        held_out_queries=(
            "Which tool has two metal jaws?",
            "Which object takes a sample through the scope?",
        ),
    ),
)

EYE = (
    Structure(
        name="optic disc",
        supercategory="retina",
        modalities=("fundus",),
        reasons=("the pale spot where the nerve leaves the eye", "the place that glaucoma hollows out"),
        queries=(
            "Where does the nerve leave the eye?",
            "Which pale round spot is hollowed out by glaucoma?",
            "What causes the blind spot?",
            "From where do the vessels of the eye spread?",
        ),
        held_out_queries=(
            "Which pale spot is where the nerve and the vessels leave?",
            "Which spot does glaucoma harm?",
        ),
    ),
    Structure(
        name="macula",
        supercategory="retina",
        modalities=("fundus",),
        reasons=("the dark spot of sharp sight", "the place we use to read"),
        queries=(
            "Which place do we use to read small print?",
            "Which dark round spot gives the sharpest sight?",
            "Where does age take away central sight?",
            "Which place has most cones and no vessels?",
        ),
        held_out_queries=(
            "Which dark spot do we use to read?",
            "Which place gives sharp central sight?",
        ),
    ),
    Structure(
        name="retinal haemorrhage",
        supercategory="retinal lesion",
        modalities=("fundus",),
        reasons=("the dark red patch of leaked blood", "the bleed from a weak vessel"),
        queries=(
            "Where has blood leaked from a weak vessel?",
            "Which dark red patch points to high blood pressure or diabetes?",
            "Which patch of irregular shape should fade as the blood is cleared?",
            "What would a diabetic see as a new dark shadow?",
        ),
        held_out_queries=(
            "Which dark red patch is leaked blood?",
            "Where has a weak vessel leaked blood in diabetes?",
        ),
    ),
    Structure(
        name="hard exudate",
        supercategory="retinal lesion",
        modalities=("fundus",),
        reasons=("the yellow deposit of fat", "the yellow patch left by leaking vessels"),
        queries=(
            "Which yellow deposit is fat left by leaking vessels?",
            "Which bright yellow patch is a sign of diabetes?",
            "Where has protein and fat from the blood settled?",
            "Which waxy patch may go if blood sugar is kept low?",
        ),
        held_out_queries=(
            "Which yellow patch is left by leaking vessels?",
            "Which waxy deposit is a sign of diabetes?",
        ),
    ),
    Structure(
        name="choroid",
        supercategory="retina",
        modalities=("OCT",),
        reasons=("the vessel layer that feeds the outer eye", "the deep layer full of vessels"),
        queries=(
            "Which layer feeds the outer part from below?",
            "Which deep layer is full of dark vessels?",
            "Which layer lies below the brightest band?",
            "Which layer of vessels becomes thin in short sight?",
        ),
        held_out_queries=(
            "Which deep layer of vessels feeds the eye?",
            "Which layer full of vessels lies below the bright band?",
        ),
    ),
    Structure(
        name="subretinal fluid",
        supercategory="retinal lesion",
        modalities=("OCT",),
        reasons=("the dark pool that lifts the light-sensing layers", "the pool above the bright band"),
        queries=(
            "Which dark pool lifts the layers off the bright band?",
            "Where has leaked water gathered above the bright band?",
            "What should dry up after injections?",
            "Which black dome sits on the brightest band?",
        ),
        held_out_queries=(
            "Which dark dome lies above the bright band?",
            "Which pool lifts the layers and should dry up?",
        ),
    ),
    Structure(
        name="retinal cyst",
        supercategory="retinal lesion",
        modalities=("OCT",),
        reasons=("the dark hole within the layers", "the swelling inside the layers"),
        queries=(
            "Which round dark hole lies within the layers?",
            "What shows that the layers themselves are swollen?",
            "Which black oval splits the layers from inside?",
            "Which hole blurs central sight in diabetes without touching the bright band?",
        ),
        held_out_queries=(
            "Which dark oval lies inside the layers?",
            "Which hole shows that the layers are swollen?",
        ),
    ),
    Structure(
        name="pigment epithelium detachment",
        supercategory="retinal lesion",
        modalities=("OCT",),
        reasons=("the grey mound that lifts the bright band", "the mound below the bright band"),
        queries=(
            "Which grey mound lifts the bright band itself?",
            "What lies below the place where the bright band bulges up?",
            "Which mound may hide new vessels in old age?",
            "Where has the bright band come off its bed?",
        ),
        held_out_queries=(
            "Which mound lies below the bright band?",
            "What grey bulges may hide new vessels?",
        ),
    ),
)

SECTION = (
    Structure(
        name="gland",
        supercategory="tissue",
        modalities=("pathology",),
        reasons=("the ring of cells around an empty space", "the tube of cells that makes mucus"),
        queries=(
            "Which ring of cells makes mucus?",
            "Which neat ring of cells lies around an empty space?",
            "What do cells form when they release juice into a duct?",
            "Which part would lose its open middle in a poorly formed cancer?",
        ),
        held_out_queries=(
            "Which ring of cells has an empty middle?",
            "What do cells that make mucus form?",
        ),
    ),
    Structure(
        name="tumour nest",
        supercategory="tumour",
        modalities=("pathology",),
        reasons=("the crowd of large dark nuclei", "the island of cancer cells"),
        queries=(
            "Where do large dark nuclei crowd without order?",
            "Which island of cells would make this a cancer?",
            "Which cells divide too fast?",
            "Which ragged purple island should the report mention first?",
        ),
        held_out_queries=(
            "Which ragged island is cancer?",
            "Which large dark cells crowd and divide too fast?",
        ),
    ),
    Structure(
        name="arteriole",
        supercategory="cardiovascular",
        modalities=("pathology",),
        reasons=("the thick pink ring filled with red cells", "the channel that carries blood"),
        queries=(
            "Which thick pink ring is filled with red cells?",
            "Which channel brings oxygen to the tissue?",
            "What grows a thicker wall under high pressure?",
            "Where would a clot form?",
        ),
        held_out_queries=(
            "Which channel is filled with red cells?",
            "Which pink ring has a thicker wall under high pressure?",
        ),
    ),
    Structure(
        name="fat tissue",
        supercategory="tissue",
        modalities=("pathology",),
        reasons=("the white bubbles that store energy", "the pale cells that fill with oil"),
        queries=(
            "Which pale cells store energy?",
            "Which white bubbles lie close like a honeycomb?",
            "Which cells swell when we eat too much?",
            "Which cells keep the body warm and look empty here?",
        ),
        held_out_queries=(
            "Which white bubbles store energy?",
            "Which pale cells look like a honeycomb?",
        ),
    ),
    Structure(
        name="lymphoid follicle",
        supercategory="tissue",
        modalities=("pathology",),
        reasons=("the round crowd of small immune cells", "the place where immune cells learn"),
        queries=(
            "Where do small immune cells gather in a round crowd?",
            "Which round spot has a pale middle and a dark rim of small cells?",
            "Where do immune cells learn to make antibodies?",
            "What grows when the body fights an infection?",
        ),
        held_out_queries=(
            "Where do immune cells make antibodies?",
            "Which round crowd of small cells has a pale middle?",
        ),
    ),
)

SKIN = (
    Structure(
        name="melanoma",
        supercategory="skin lesion",
        modalities=("dermoscopy",),
        reasons=("the dark ragged spot with many colours", "the spot that could spread and kill"),
        queries=(
            "Which dark spot with a ragged edge could spread and kill?",
            "Which spot shows many colours and no symmetry?",
            "What must be cut out with a wide margin?",
            "Which black and blue spot should worry us most?",
        ),
        held_out_queries=(
            "Which ragged spot should be cut out?",
            "Which dark spot with many colours could kill?",
        ),
    ),
    Structure(
        name="naevus",
        supercategory="skin lesion",
        modalities=("dermoscopy",),
        reasons=("the even brown spot", "the harmless round mole"),
        queries=(
            "Which even brown spot is harmless?",
            "Which round spot has a regular brown net?",
            "Which common mole needs no treatment?",
            "Which spot has one colour and a smooth round edge?",
        ),
        held_out_queries=(
            "Which round brown spot needs no treatment?",
            "Which mole has a regular net and a smooth edge?",
        ),
    ),
    Structure(
        name="haemangioma",
        supercategory="skin lesion",
        modalities=("dermoscopy",),
        reasons=("the red spot made of small vessels", "the cherry red lakes of blood"),
        queries=(
            "Which red spot is made of small vessels?",
            "Which spot shows cherry red lakes of blood?",
            "Which spot would turn pale when pressed?",
            "Which spot owes its colour to blood and not to pigment?",
        ),
        held_out_queries=(
            "Which spot is made of red lakes?",
            "Which red spot would turn pale?",
        ),
    ),
    Structure(
        name="seborrhoeic keratosis",
        supercategory="skin lesion",
        modalities=("dermoscopy",),
        reasons=("the waxy plaque of old age", "the plaque with white and brown plugs"),
        queries=(
            "Which waxy plaque looks stuck on?",
            "Which plaque has white and brown plugs of horn?",
            "Which harmless rough plaque comes with old age?",
            "Which yellow-brown plaque can be scraped off?",
        ),
        held_out_queries=(
            "Which plaque comes with old age and looks waxy?",
            "Which rough plaque has white plugs?",
        ),
    ),
)

OPTICAL = BOWEL + EYE + SECTION + SKIN
