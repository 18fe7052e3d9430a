"""Terms that compare the expert's mask with the reference mask. A malformed answer gives 0.

Every term raises MissingMask if a well-formed answer has no mask, and ValueError if the reference has none or the two
differ in size.
"""

import numpy as np
from numpy.typing import NDArray

from rewards.case import Case, looks_at_masks
from rewards.options import Pixels
from umrg import metrics
from umrg.mistake import Mistake


class MissingMask(RuntimeError):
    """A well-formed answer came without the expert's mask: a fault of the pipeline, never of the answer."""


@looks_at_masks
def mask_dice(case: Case) -> float:
    """Dice of the two masks."""
    return metrics.mask_dice(*_masks(case)) if case.answer.promptable else 0.0


@looks_at_masks
def mask_iou(case: Case) -> float:
    """Intersection over union of the two masks."""
    return metrics.mask_iou(*_masks(case)) if case.answer.promptable else 0.0


@looks_at_masks
def boundary(case: Case, *, tolerance: Pixels = 2.0) -> float:
    """The fraction of both outlines' length that lies within the tolerance of the other outline: the normalised surface
    Dice of Nikolov et al. (2021, arXiv:1809.04430)."""
    if not case.answer.promptable:
        return 0.0
    return metrics.surface_dice(*_masks(case), tolerance=tolerance * case.pixel)


def _masks(case: Case) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    if case.mask is None:
        raise MissingMask("a well-formed answer reached a mask term without the expert's mask")
    if case.reference.mask is None:
        raise Mistake("a mask term needs reference masks; use data with masks, or no mask terms")
    return case.mask, case.reference.mask
