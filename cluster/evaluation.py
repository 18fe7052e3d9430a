"""One function that evaluates a model: before and after a run, on the way, and by itself."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cluster.clock import Clock
from cluster.experience import Draw, Experience, gain
from cluster.workers import Workers
from umrg.group import Group
from umrg.sample import Sample

SEED = 20_000_003
"""Evaluations draw the same random numbers whatever the run, so that two models are compared on equal terms."""

FIGURES = ("dice", "iou", "pdice", "well_formed")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """greedy: one answer a row. sampled: n answers a row, none where n is 0."""

    greedy: Sequence[Experience]
    sampled: Sequence[Experience]

    def summary(self) -> dict[str, dict[str, float]]:
        """Mean figures of the greedy and of the sampled answers; n counts rows."""
        parts = {"greedy": self.greedy, "sampled": self.sampled}
        return {name: figures(part) for name, part in parts.items() if part}


def figures(experience: Sequence[Experience]) -> dict[str, float]:
    """Means over rows of means over each row's answers."""
    means = {name: float(np.mean(row_means(experience, name))) for name in FIGURES}
    return {**means, "n": len(experience)}


def row_means(experience: Sequence[Experience], metric: str) -> list[float]:
    """Mean of a metric over each row's answers."""
    return [float(np.mean([answer.metrics[metric] for answer in each.scored])) for each in experience]


def questions(rows: Sequence[Sample]) -> list[Group]:
    """Rows as groups to be evaluated. A row's place gives its seed, so a part of them is answered as in the whole."""
    return [Group(run="evaluation", step=0, index=i, sample=row) for i, row in enumerate(rows)]


def evaluate(
    workers: Workers, groups: Sequence[Group], *, n: int, temperature: float, max_tokens: int, thorough: bool = False
) -> Evaluation:
    """Answer held-out rows greedily and, where n > 0, n times at a temperature. thorough: with the metrics for
    which the expert runs more than once an answer."""
    clock = Clock()
    greedy = Draw(n=1, temperature=0.0, max_tokens=max_tokens, run_seed=SEED)
    sampled = Draw(n=n, temperature=temperature, max_tokens=max_tokens, run_seed=SEED)
    return Evaluation(
        greedy=gain(workers, groups, greedy, clock, thorough=thorough),
        sampled=gain(workers, groups, sampled, clock, thorough=thorough) if n else (),
    )
