"""The scorer: from weighted terms to a reward.

scorer = Scorer.of_preset("mask")
reference = Reference.of_sample(sample, with_mask=scorer.uses_mask)
answer = scorer.read(completion.text).to_original(frames, Frame.MODEL)
drawn = Drawn.of(segment(answer), reference) if scorer.uses_mask and answer.promptable else None
reward = scorer.score(answer, reference, drawn, step=group.step)    # reward.total, reward.parts["bbox_iou"]
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from rewards.case import Case, Drawn, Reference, Term
from rewards.options import Option, at_step, checked_options
from rewards.presets import MASK_TERMS, find_preset, find_term
from rewards.user_terms import UserTerm
from umrg.answers import Answer, parse_answer, parse_published
from umrg.mistake import Mistake

_RELEASED_SIDE = 840.0
"""Side of the released dataset's images, to which the published thresholds in pixels refer."""


@dataclass(frozen=True, kw_only=True)
class Reward:
    """What an answer is worth."""

    total: float
    """The weighted sum of the parts."""
    parts: Mapping[str, float]
    """The value of each term in [0, 1], before weighting, by name."""


@dataclass(frozen=True, kw_only=True)
class WeightedTerm:
    """A term as a scorer uses it, with its weight and its checked options."""

    name: str
    term: Term
    weight: float
    options: Mapping[str, Option]

    @classmethod
    def find(cls, name: str, weight: float, options: Mapping[str, object]) -> Self:
        """The term of that name. Raises ValueError for an unknown name, and for a weight or option out of range."""
        term = find_term(name)
        if not (math.isfinite(weight) and weight >= 0):
            raise Mistake(f"the weight of reward term {name!r} is {weight}; give a finite one, 0 or more")
        checked = checked_options(name, term, options)
        if isinstance(term, UserTerm):
            term.try_out(checked)
        return cls(name=name, term=term, weight=float(weight), options=checked)

    def value(self, case: Case, step: int) -> float:
        """The term's value at a training step, in [0, 1]."""
        # The common case, a term without given options, skips the schedules.
        value = self.term(case, **at_step(self.options, step)) if self.options else self.term(case)
        assert 0.0 <= value <= 1.0, f"reward term {self.name!r} gave {value}, outside [0, 1]"
        return value


class Scorer:
    """Scores answers by a weighted sum of terms.

    weights: the weight of each term, by name or import path; a term with weight 0 is reported without counting.
    options: the options of each term, by its name, as in a configuration (`rewards.options`).
    think: whether the prompt asks for reasoning.
    published: as in the published code, the first think block and the first answer block of a completion count, and
        thresholds in pixels are not scaled. Otherwise the answer after the thoughts counts (`umrg.answers`), and
        thresholds are scaled by the image's long side / 840.

    Raises ValueError for an unknown term, for a weight or option out of range, and if no weight is above 0.
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
            raise Mistake("the reward is always 0; give at least one term a weight above 0")
        # What a user's own term looks at is unknown, so it is given everything.
        self.uses_mask = any(term.name in MASK_TERMS or isinstance(term.term, UserTerm) for term in self._terms)

    @classmethod
    def of_preset(cls, name: str, *, think: bool = True) -> Self:
        """The scorer of a preset; `format_think` is left out if the prompt asks for no thinking.

        Raises ValueError for an unknown name.
        """
        preset = find_preset(name)
        weights = {term: weight for term, weight in preset.weights.items() if think or term != "format_think"}
        return cls(weights, think=think, published=preset.published)

    def read(self, completion: str) -> Answer:
        """Parse a completion with the parser that belongs to this reward."""
        return parse_published(completion) if self._published else parse_answer(completion)

    def score(self, answer: Answer, reference: Reference, drawn: Drawn | None = None, *, step: int = 0) -> Reward:
        """Score one answer. Answer, reference and the expert's mask are in original pixels.

        step: the training step, which scheduled options follow; 0 in evaluation.

        Raises MissingMask if `uses_mask` and a promptable answer comes without a mask, ValueError if the reference has
        no mask then, and RewardTermError if a user's own term fails.
        """
        pixel = 1.0 if self._published else reference.size.long_side / _RELEASED_SIDE
        case = Case(answer=answer, reference=reference, drawn=drawn, pixel=pixel, think=self._think)
        parts = {term.name: term.value(case, step) for term in self._terms}
        return Reward(total=sum(self.weights[name] * value for name, value in parts.items()), parts=parts)
