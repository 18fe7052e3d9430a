"""The expert's mask against the reference mask."""

import numpy as np
from numpy.typing import NDArray

from rewards.case import Case
from umrg.answers import Answer, Form
from umrg.metrics import mask_dice as dice


class MissingMask(RuntimeError):
    """A well-formed answer came without the expert's mask: a fault of the pipeline, never of the answer."""


def promptable(answer: Answer) -> bool:
    """The answer's box and points can be given to the expert. Mask terms give 0 to any other answer."""
    return answer.form is Form.CORRECT


def mask_dice(case: Case) -> float:
    """Dice of the expert's mask with the reference mask; 0 for a malformed answer.

    Raises MissingMask where a well-formed answer has no mask, and ValueError where the reference has none or
    the two differ in size.
    """
    if not promptable(case.answer):
        return 0.0
    return dice(*_masks(case))


def _masks(case: Case) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    if case.mask is None:
        raise MissingMask("a well-formed answer reached a mask term without the expert's mask")
    if case.reference.mask is None:
        raise ValueError("a mask term needs reference masks; use data with masks, or no mask terms")
    return case.mask, case.reference.mask
