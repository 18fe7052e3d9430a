"""Two sets of sample records about the same rows, compared pair by pair."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from cluster.evaluation import FIGURES
from cluster.records import read_records
from cluster.run_folder import RunFolder

Records = Mapping[str, Sequence[Mapping[str, Any]]]
"""Sample records by the id of the row that they answer."""


def paired_interval(before: ArrayLike, after: ArrayLike, *, draws: int = 10_000, seed: int = 0) -> dict[str, float]:
    """Means over rows of before and after, of their difference, and the difference's 95 % interval by bootstrap over
    rows."""
    first, second = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    gain = second - first
    rng = np.random.default_rng(seed)
    means = gain[rng.integers(len(gain), size=(draws, len(gain)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return {
        "before": float(first.mean()),
        "after": float(second.mean()),
        "gain": float(gain.mean()),
        "low": float(low),
        "high": float(high),
    }


def compare_records(before: Records, after: Records, figures: Sequence[str] = FIGURES) -> dict[str, dict[str, float]]:
    """`paired_interval` of each figure, over the rows that both answer."""
    shared = [row for row in after if row in before]
    return {
        figure: paired_interval(*([_mean(records[row], figure) for row in shared] for records in (before, after)))
        for figure in (figures if shared else ())
    }


def compare_run(run: RunFolder) -> dict[str, dict[str, dict[str, float]]]:
    """Greedy and sampled answers after a run beside those before it; nothing where one of the two is missing."""
    found = {
        kind: compare_records(records_of(run, f"before-{kind}"), records_of(run, f"after-{kind}"))
        for kind in ("greedy", "sampled")
    }
    return {kind: figures for kind, figures in found.items() if figures}


def records_of(run: RunFolder, name: str) -> dict[str, list[dict[str, Any]]]:
    """The records under a name in a run's `samples/`; none where there is no such file."""
    path = run.samples / f"{name}.parquet"
    found: dict[str, list[dict[str, Any]]] = {}
    for record in read_records(path) if path.exists() else []:
        found.setdefault(record["sample_id"], []).append(record)
    return found


def _mean(records: Sequence[Mapping[str, Any]], figure: str) -> float:
    return float(np.mean([record["metrics"][figure] for record in records]))
