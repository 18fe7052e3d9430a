"""The reward's part of a run's configuration."""

from typing import Self

from pydantic import Field, model_validator

from rewards.scoring import Scorer
from umrg.config import Config


class TermConfig(Config):
    """A reward term by name, and its weight."""

    name: str
    weight: float = Field(default=1.0, ge=0)


class RewardConfig(Config):
    """Either a preset's name, or weighted terms."""

    preset: str | None = None
    terms: list[TermConfig] = Field(default_factory=list)

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.preset is None) == (not self.terms):
            raise ValueError("give either reward.preset or reward.terms")
        self.scorer(think=True)
        return self

    def scorer(self, *, think: bool) -> Scorer:
        """The scorer; a preset leaves out `format_think` where the prompt asks for no thinking."""
        if self.preset is not None:
            return Scorer.of_preset(self.preset, think=think)
        return Scorer({term.name: term.weight for term in self.terms})
