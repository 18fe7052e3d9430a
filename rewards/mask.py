"""Terms that compare the expert's mask with the reference mask. A malformed answer gives 0.

Every term raises MissingMask if a well-formed answer has no mask, and ValueError if the reference has none or the two
differ in size.
"""

from rewards.case import Case, Drawn, looks_at_masks
from rewards.options import Pixels
from umrg.metrics import surface_dice


class MissingMask(RuntimeError):
    """A well-formed answer came without the expert's mask: a fault of the pipeline, never of the answer."""


@looks_at_masks
def mask_dice(case: Case) -> float:
    """Dice of the two masks."""
    return _drawn(case).overlap.dice if case.answer.promptable else 0.0


@looks_at_masks
def mask_iou(case: Case) -> float:
    """Intersection over union of the two masks."""
    return _drawn(case).overlap.iou if case.answer.promptable else 0.0


@looks_at_masks
def boundary(case: Case, *, tolerance: Pixels = 2.0) -> float:
    """The fraction of both outlines' length that lies within the tolerance of the other outline: the normalised surface
    Dice of Nikolov et al. (2021, arXiv:1809.04430)."""
    if not case.answer.promptable:
        return 0.0
    return surface_dice(_drawn(case).mask, case.reference.target, tolerance=tolerance * case.pixel)


def _drawn(case: Case) -> Drawn:
    if case.drawn is None:
        raise MissingMask("a well-formed answer reached a mask term without the expert's mask")
    return case.drawn
