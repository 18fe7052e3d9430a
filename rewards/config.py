"""The reward's part of a run's configuration."""

from collections import Counter
from typing import Self

from pydantic import ConfigDict, Field, model_validator

from rewards.scoring import Scorer
from umrg.config import Config
from umrg.mistake import Mistake


class TermConfig(Config):
    """A reward term, with its options as further keys: numbers, true, false, or a schedule
    `{start: …, end: …, steps: …}` in place of a number."""

    # A term's signature says which options it has; `rewards.options` checks them.
    model_config = ConfigDict(frozen=True, extra="allow")

    name: str
    """Name of a term, or import path of one of your own (`my_pkg.my_module:my_term`)."""
    weight: float = Field(default=1.0, ge=0)
    """Its weight in the sum; 0 reports the term only."""


class RewardConfig(Config):
    """The reward: either a preset, or weighted terms."""

    preset: str | None = None
    """`base`, `soft`, `hard` (as published) or `mask`."""
    terms: list[TermConfig] = Field(default_factory=list)
    """Weighted terms, summed."""

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.preset is None) == (not self.terms):
            raise Mistake("give either reward.preset or reward.terms")
        twice = [name for name, count in Counter(term.name for term in self.terms).items() if count > 1]
        if twice:
            raise Mistake(f"reward.terms names {twice[0]!r} more than once; give each term once")
        self.scorer(think=True)
        return self

    def scorer(self, *, think: bool) -> Scorer:
        """The scorer; a preset leaves out `format_think` where the prompt asks for no thinking."""
        if self.preset is not None:
            return Scorer.of_preset(self.preset, think=think)
        weights = {term.name: term.weight for term in self.terms}
        options = {term.name: term.model_extra or {} for term in self.terms}
        return Scorer(weights, options, think=think)
