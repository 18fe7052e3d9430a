"""Short reasoning traces: what the query hints at, the structure's name, and its position in the image."""

from phantoms.structure import Structure

# No template begins with the clue, because its article is in lower case.
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
    """A phrase for the cell of a 3×3 grid that holds the centre of a box (XYXY, inclusive, original pixels)."""
    x, y = (box[0] + box[2] + 1) / 2, (box[1] + box[3] + 1) / 2
    return PLACES[min(int(3 * y / height), 2)][min(int(3 * x / width), 2)]


def trace(structure: Structure, place: str, phrasing: int) -> str:
    """The reasoning trace for a structure's query of index `phrasing`; at most 25 words."""
    template, clue = divmod(phrasing, len(structure.reasons))
    return TEMPLATES[template % len(TEMPLATES)].format(clue=structure.reasons[clue], name=structure.name, place=place)
