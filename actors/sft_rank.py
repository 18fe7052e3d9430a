"""The supervised learner's actor: one ZeRO rank in a process of its own."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from actors.zero_actor import ZeroActor
from learner.update_report import SftReport
from umrg.sample import Sample

if TYPE_CHECKING:
    from learner.sft import SftRank


class SupervisedRank(ZeroActor):
    """Every method is called on all ranks, with all images, each given as the samples that ask about it."""

    def update(self, images: Sequence[Sequence[Sample]]) -> SftReport:
        """Make the reference answers likelier, by one update."""
        return self._sft().update(images)

    def loss(self, images: Sequence[Sequence[Sample]]) -> tuple[float, int]:
        """Negative log-likelihood of the reference answers, and of how many tokens it is the sum."""
        return self._sft().loss(images)

    def _sft(self) -> "SftRank":
        from learner.sft import SftRank

        return SftRank(self.running())
