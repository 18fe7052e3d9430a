"""Collecting groups, which means sampling and scoring them: for a training step, and for an evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from actors.calls import Ref
from actors.collector import Collector
from actors.ledger import Ledger
from actors.pools import GroupRefs
from cluster.weight_sync import tend
from cluster.workers import Workers
from rewards.answer_metrics import TRAINING_METRICS
from rewards.scored import ScoredGroup, ScoringDepth
from umrg.group import Group, SamplingParams
from umrg.sample import Sample

SEED = 20_000_003
"""Evaluations use the same random numbers in every run, so that two models are compared on equal terms."""

SUMMARY_METRICS = tuple(TRAINING_METRICS)


@dataclass(frozen=True, kw_only=True)
class Collected:
    """A scored group, with its references in Ray's object store for the learner's ranks."""

    scored: ScoredGroup
    refs: tuple[Ref, Ref]
    """Of its `Group`, with the image, and of the `ScoredGroup`."""


class TooManyFailures(RuntimeError):
    """More groups were put aside than the configuration tolerates."""


class Collecting:
    """Groups on their way through rollouts and segmenters. Those that cannot be sampled and scored, because they kill
    whatever works on them, or end in errors, are put aside."""

    def __init__(
        self,
        workers: Workers,
        groups: Sequence[Group],
        sampling: SamplingParams,
        depth: ScoringDepth,
        *,
        tolerated: float = 0.0,
    ) -> None:
        """tolerated: how many groups may be put aside."""
        self._workers, self._tolerated = workers, tolerated
        self._refs = {group.id: GroupRefs.put(group) for group in groups}
        self._ledger = Ledger(self._refs)
        self._collector = Collector(
            self._ledger,
            workers.rollouts.sampling(self._refs, sampling),
            workers.segmenters.scoring(self._refs, depth),
            workers.calls,
        )

    @property
    def sampled(self) -> bool:
        """No group is left to be sampled."""
        return self._ledger.sampled

    @property
    def closed(self) -> bool:
        """Every group is scored or put aside."""
        return self._ledger.closed

    @property
    def aside(self) -> int:
        """How many groups were put aside."""
        return len(self._ledger.aside)

    def dispatch(self) -> None:
        """Make the calls that there is room for. Raises TooManyFailures if more groups were put aside than are
        tolerated."""
        self._collector.dispatch()
        aside = self._ledger.aside
        if len(aside) > self._tolerated:
            raise TooManyFailures(
                f"{len(aside)} of {len(self._refs)} groups could not be sampled or scored; the last: {aside[-1].id}: "
                f"{aside[-1].cause}"
            )

    def collected(self) -> list[Collected]:
        """The scored groups, once all are closed; those that were put aside are listed in `workers.put_aside`."""
        assert self.closed
        self._workers.put_aside += [f"{entry.id}: {entry.cause}" for entry in self._ledger.aside]
        scored = {id: entry.scored for id, entry in self._ledger.entries.items() if entry.stage == "scored"}
        return [Collected(scored=value, refs=(self._refs[id].group, ref)) for id, (value, ref) in scored.items()]


def collect(
    workers: Workers, groups: Sequence[Group], sampling: SamplingParams, depth: ScoringDepth
) -> list[Collected]:
    """Sample and score groups; a group is scored while others are still being sampled. Raises TooManyFailures if one is
    put aside."""
    collecting = Collecting(workers, groups, sampling, depth)
    while not collecting.closed:
        tend(workers)
        collecting.dispatch()
        workers.calls.turn()
    collecting.dispatch()
    return collecting.collected()


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The answers to held-out rows, scored."""

    greedy: Sequence[ScoredGroup]
    """One answer per row."""
    sampled: Sequence[ScoredGroup]
    """n answers per row; none if n is 0."""

    def summary(self) -> dict[str, dict[str, float]]:
        """Mean figures of the greedy and of the sampled answers; `n` is the number of rows."""
        parts = {"greedy": self.greedy, "sampled": self.sampled}
        return {name: figures(part) for name, part in parts.items() if part}


def figures(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    """Each figure's mean over rows of its mean over the row's answers."""
    means = {name: float(np.mean(row_means(groups, name))) for name in SUMMARY_METRICS}
    return {**means, "n": len(groups)}


def row_means(groups: Sequence[ScoredGroup], metric: str) -> list[float]:
    """Mean of a metric over each row's answers."""
    return [float(np.mean([answer.metrics[metric] for answer in group.answers])) for group in groups]


def evaluation_groups(rows: Sequence[Sample]) -> list[Group]:
    """Rows as groups to be evaluated. Seeds depend on a row's index, so its answers do not depend
    on the batch that it is evaluated in."""
    return [Group(run="evaluation", step=0, index=i, sample=row) for i, row in enumerate(rows)]


def evaluate(
    workers: Workers, groups: Sequence[Group], sampling: SamplingParams, depth: ScoringDepth = "masks"
) -> Evaluation:
    """Answer held-out rows greedily and, if `sampling.n` is above 0, n times at its temperature. The seed is always
    `SEED`."""
    sampled = replace(sampling, seed=SEED)
    greedy = replace(sampled, n=1, temperature=0.0)
    return Evaluation(
        greedy=[each.scored for each in collect(workers, groups, greedy, depth)],
        sampled=[each.scored for each in collect(workers, groups, sampled, depth)] if sampling.n else (),
    )
