"""Weighted terms to a reward.

scorer = Scorer.of_preset("mask")
reference = Reference.of_sample(sample, with_mask=scorer.uses_mask)
answer = scorer.read(completion.text).to_original(frames, Frame.MODEL)
mask = segment(answer) if scorer.needs_mask(answer) else None
reward = scorer.score(answer, reference, mask, step=group.step)     # reward.total, reward.parts["bbox_iou"]
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from rewards.case import Case, Reference, Term
from rewards.options import Option, at_step, checked_options
from rewards.presets import MASK_TERMS, find_preset, find_term
from rewards.user_terms import UserTerm
from umrg.answers import Answer, parse_answer, parse_published

_RELEASED_SIDE = 840.0


@dataclass(frozen=True, kw_only=True)
class Reward:
    """total: the weighted sum of the parts. parts: each term's value in [0, 1], before weighting, by name."""

    total: float
    parts: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class WeightedTerm:
    """A term as a scorer uses it: checked, with its weight and the options that were given."""

    name: str
    term: Term
    weight: float
    options: Mapping[str, Option]

    @classmethod
    def find(cls, name: str, weight: float, options: Mapping[str, object]) -> Self:
        """The term of that name. Raises ValueError for an unknown one, and for a weight or option out of range."""
        term = find_term(name)
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"the weight of reward term {name!r} is {weight}; give a finite one, 0 or more")
        checked = checked_options(name, term, options)
        if isinstance(term, UserTerm):
            term.try_out(checked)
        return cls(name=name, term=term, weight=float(weight), options=checked)

    def value(self, case: Case, step: int) -> float:
        """The term's value at a training step, in [0, 1]."""
        value = self.term(case, **at_step(self.options, step)) if self.options else self.term(case)
        assert 0.0 <= value <= 1.0, f"reward term {self.name!r} gave {value}, outside [0, 1]"
        return value


class Scorer:
    """Scores answers by weighted terms.

    weights: weight of each term, by name or import path; a term of weight 0 is reported and does not count.
    options: options of a term, by its name, as a configuration gives them (`rewards.options`).
    think: whether the prompt asks for reasoning.
    published: as the published code does it, the first blocks of a completion count, and thresholds in pixels are of
        the released 840 frame, whatever the image. Otherwise the answer after the thoughts counts (`umrg.answers`), and
        thresholds are taken times the image's long side / 840.

    Raises ValueError for an unknown term, a weight or option out of range, and no weight above 0.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        options: Mapping[str, Mapping[str, object]] | None = None,
        *,
        think: bool = True,
        published: bool = False,
    ) -> None:
        given = options or {}
        self._terms = [WeightedTerm.find(name, weight, given.get(name, {})) for name, weight in weights.items()]
        self._think, self._published = think, published
        self.weights = {term.name: term.weight for term in self._terms}
        self.maximum = sum(self.weights.values())
        if self.maximum == 0:
            raise ValueError("the reward is always 0; give at least one term a weight above 0")
        # What a user's own term looks at is not known, so it is given all there is.
        self.uses_mask = any(term.name in MASK_TERMS or isinstance(term.term, UserTerm) for term in self._terms)

    @classmethod
    def of_preset(cls, name: str, *, think: bool = True) -> Self:
        """The scorer of a preset; without `format_think` where the prompt asks for no thinking.

        Raises ValueError for an unknown name.
        """
        preset = find_preset(name)
        weights = {term: weight for term, weight in preset.weights.items() if think or term != "format_think"}
        return cls(weights, think=think, published=preset.published)

    def read(self, completion: str) -> Answer:
        """What a completion says, as this scorer wants it read."""
        return parse_published(completion) if self._published else parse_answer(completion)

    def needs_mask(self, answer: Answer) -> bool:
        """`score` wants the expert's mask for this answer."""
        return self.uses_mask and answer.promptable

    def score(
        self, answer: Answer, reference: Reference, mask: NDArray[np.bool_] | None = None, *, step: int = 0
    ) -> Reward:
        """Score one answer, given in original pixels, like the reference and the expert's mask (bool [H, W]).

        step: the training step, by which scheduled options change; 0 in evaluation.

        Raises MissingMask where `needs_mask` and there is none, ValueError where the reference lacks its own, and
        RewardTermError where a user's own term fails.
        """
        pixel = 1.0 if self._published else reference.size.long_side / _RELEASED_SIDE
        case = Case(answer=answer, reference=reference, mask=mask, pixel=pixel, think=self._think)
        parts = {term.name: term.value(case, step) for term in self._terms}
        return Reward(total=sum(self.weights[name] * value for name, value in parts.items()), parts=parts)
