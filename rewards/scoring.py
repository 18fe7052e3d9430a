"""Weighted terms to a reward.

scorer = Scorer.of_preset("mask")
reference = Reference.of_sample(sample, with_mask=scorer.uses_mask)
answer = parse_answer(completion.text).to_original(frames, Frame.MODEL)
mask = segment(answer) if scorer.needs_mask(answer) else None
reward = scorer.score(answer, reference, mask)     # reward.total, reward.parts["bbox_iou"]
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from rewards.case import Case, Reference, Term
from rewards.mask import promptable
from rewards.presets import MASK_TERMS, find_preset, find_term
from umrg.answers import Answer

_RELEASED_SIDE = 840.0


@dataclass(frozen=True, kw_only=True)
class Reward:
    """total: the weighted sum of the parts. parts: each term's value in [0, 1], before weighting, by name."""

    total: float
    parts: Mapping[str, float]


class Scorer:
    """Scores answers by weighted terms.

    weights: weight of each term, by name; a term of weight 0 is reported and does not count.
    scale_pixels: thresholds in pixels are taken times the image's long side / 840, the released frame's.

    Raises ValueError for an unknown term, a weight that is negative or not finite, and no weight above 0.
    """

    def __init__(self, weights: Mapping[str, float], *, scale_pixels: bool = True) -> None:
        self.weights = {name: _checked_weight(name, weight) for name, weight in weights.items()}
        self.maximum = sum(self.weights.values())
        if self.maximum == 0:
            raise ValueError("the reward is always 0; give at least one term a weight above 0")
        self.uses_mask = not MASK_TERMS.keys().isdisjoint(weights)
        self._terms: list[tuple[str, Term, float]] = [
            (name, find_term(name), weight) for name, weight in self.weights.items()
        ]
        self._scale_pixels = scale_pixels

    @classmethod
    def of_preset(cls, name: str, *, think: bool = True) -> Self:
        """The scorer of a preset; without `format_think` where the prompt asks for no thinking.

        Raises ValueError for an unknown name.
        """
        preset = find_preset(name)
        weights = {term: weight for term, weight in preset.weights.items() if think or term != "format_think"}
        return cls(weights, scale_pixels=preset.scale_pixels)

    def needs_mask(self, answer: Answer) -> bool:
        """`score` wants the expert's mask for this answer."""
        return self.uses_mask and promptable(answer)

    def score(self, answer: Answer, reference: Reference, mask: NDArray[np.bool_] | None = None) -> Reward:
        """Score one answer, given in original pixels, like the reference and the expert's mask (bool [H, W]).

        Raises MissingMask where `needs_mask` and there is none, ValueError where the reference lacks its own.
        """
        pixel = reference.size.long_side / _RELEASED_SIDE if self._scale_pixels else 1.0
        case = Case(answer=answer, reference=reference, mask=mask, pixel=pixel)
        total, parts = 0.0, {}
        for name, term, weight in self._terms:
            value = term(case)
            assert 0.0 <= value <= 1.0, f"reward term {name!r} gave {value}, outside [0, 1]"
            parts[name] = value
            total += weight * value
        return Reward(total=total, parts=parts)


def _checked_weight(name: str, weight: float) -> float:
    find_term(name)
    if not (math.isfinite(weight) and weight >= 0):
        raise ValueError(f"the weight of reward term {name!r} is {weight}; give a finite one, 0 or more")
    return float(weight)
