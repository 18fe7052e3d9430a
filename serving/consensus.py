"""The consensus of several samples of one answer: a vote of their masks, pixel by pixel."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from umrg.metrics import mask_dice


@dataclass(frozen=True, kw_only=True)
class Vote:
    """What several samples have in common."""

    mask: NDArray[np.bool_]
    """bool [H, W]: pixels that lie in the masks of more than half of the samples. Where there are none, the mask of
    the sample that agrees best with the others."""
    chosen: int
    """Index of the sample whose mask has the largest Dice with the vote; of several, the first."""
    confidence: float | None
    """Agreement, from 0 to 1: the mean Dice of the samples' masks with the vote, or of the others' with the one mask
    that stands for a vote without pixels. A sample without a mask counts 0. None for a single sample."""


def vote(masks: Sequence[NDArray[np.bool_] | None]) -> Vote | None:
    """The consensus of samples; None where none has a mask.

    masks: of each sample the mask, bool [H, W], all of one size; None for a sample without a usable answer, which
    votes for no pixel. Raises ValueError for masks of different sizes.
    """
    drawn = {sample: mask for sample, mask in enumerate(masks) if mask is not None}
    if not drawn:
        return None
    if len(masks) == 1:
        return Vote(mask=drawn[0], chosen=0, confidence=None)
    common = _majority(list(drawn.values()), len(masks))
    if not common.any():
        return _medoid(drawn, len(masks))
    dice = {sample: mask_dice(mask, common) for sample, mask in drawn.items()}
    return Vote(mask=common, chosen=_first_best(dice), confidence=sum(dice.values()) / len(masks))


def _majority(masks: Sequence[NDArray[np.bool_]], samples: int) -> NDArray[np.bool_]:
    votes = np.zeros(masks[0].shape, dtype=np.uint16)
    for mask in masks:
        votes += mask
    return votes > samples // 2


def _medoid(drawn: dict[int, NDArray[np.bool_]], samples: int) -> Vote:
    """The mask with the largest mean Dice with the others."""
    agreement = dict.fromkeys(drawn, 0.0)
    for one in drawn:
        for other in drawn:
            if one < other:
                dice = mask_dice(drawn[one], drawn[other])
                agreement[one] += dice
                agreement[other] += dice
    chosen = _first_best(agreement)
    return Vote(mask=drawn[chosen], chosen=chosen, confidence=agreement[chosen] / (samples - 1))


def _first_best(agreement: dict[int, float]) -> int:
    return max(agreement, key=lambda sample: (agreement[sample], -sample))
