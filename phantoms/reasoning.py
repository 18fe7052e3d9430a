"""Short reasoning traces: what the query hints at, the structure's name, and where it lies in this image."""

from phantoms.structure import Structure

# The clue's article stays lower case, so every template opens with a word of its own.
TEMPLATES = (
    "This hints at {clue}: the {name}, {place}.",
    "We look for {clue}. The {name} lies {place}.",
)
PLACES = (
    ("in the upper left", "in the upper middle", "in the upper right"),
    ("on the left", "in the centre", "on the right"),
    ("in the lower left", "in the lower middle", "in the lower right"),
)


def place_of(box: tuple[int, int, int, int], width: int, height: int) -> str:
    """Which ninth of the image the centre of a box (XYXY, inclusive, original pixels) lies in, in words."""
    x, y = (box[0] + box[2] + 1) / 2, (box[1] + box[3] + 1) / 2
    return PLACES[min(int(3 * y / height), 2)][min(int(3 * x / width), 2)]


def trace(structure: Structure, place: str, phrasing: int) -> str:
    """The reasoning trace that goes with a structure's query number `phrasing`; at most 25 words."""
    template, clue = divmod(phrasing, len(structure.reasons))
    return TEMPLATES[template % len(TEMPLATES)].format(clue=structure.reasons[clue], name=structure.name, place=place)
