"""Collecting groups, which means sampling and scoring them: for a training step, and for an evaluation."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
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


def collect(
    workers: Workers,
    groups: Sequence[Group],
    sampling: SamplingParams,
    depth: ScoringDepth,
    *,
    tolerated: float = 0.0,
    phase: Callable[[str], AbstractContextManager[None]] = lambda name: nullcontext(),
    meanwhile: Callable[[], None] = lambda: None,
) -> list[Collected]:
    """Sample and score groups; a group is scored while others are still being sampled. Those that cannot be, because
    they kill whatever works on them, or end in errors, are put aside: they are missing from the result, and listed in
    `workers.put_aside`.

    tolerated: share of the groups that may be put aside; above it TooManyFailures is raised. phase: times the phases
    "rollout" and "score". meanwhile: called at least once a second, when the learner is idle."""
    refs = {group.id: GroupRefs.put(group) for group in groups}
    ledger = Ledger(refs)
    sampling_post, scoring_post = workers.rollouts.sampling(refs, sampling), workers.segmenters.scoring(refs, depth)
    collector = Collector(ledger, sampling_post, scoring_post, workers.calls)

    def turn() -> None:
        tend(workers)
        collector.dispatch()
        workers.calls.turn()
        meanwhile()
        if len(ledger.aside) > tolerated * len(refs):
            raise TooManyFailures(
                f"{len(ledger.aside)} of {len(refs)} groups could not be sampled or scored; the last: "
                f"{ledger.aside[-1].id}: {ledger.aside[-1].cause}"
            )

    with phase("rollout"):
        while not ledger.sampled:
            turn()
    with phase("score"):
        while not ledger.closed:
            turn()
    workers.put_aside += [f"{entry.id}: {entry.cause}" for entry in ledger.aside]
    scored = {id: entry.scored for id, entry in ledger.entries.items() if entry.stage == "scored"}
    return [Collected(scored=value, refs=(refs[id].group, ref)) for id, (value, ref) in scored.items()]


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
