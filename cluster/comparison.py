"""Two sets of answers to the same rows, compared row by row: before and after a run, and two evaluations
(`medreasoner compare RUN_A RUN_B`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import ArrayLike
from rich.console import Console
from rich.table import Table

from cluster.config import EvaluateConfig
from cluster.data import open_held_out
from cluster.evaluation import FIGURES
from cluster.figures import GREEDY, TITLES
from cluster.records import Record, read_results, records_of
from cluster.report import write_comparison_report
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


def _mean(records: Sequence[Mapping[str, Any]], figure: str) -> float:
    return float(np.mean([record["metrics"][figure] for record in records]))


def compare(first: Path, second: Path, out: Path | None = None) -> Path:
    """Print paired differences of the greedy answers of two evaluations over the rows that both answered, and write a
    page of the rows that changed most, `report/compared-with-<first>.html` of the second by default. Raises ValueError
    where they share no row."""
    answers = greedy_answers(first), greedy_answers(second)
    shared = [row for row in answers[1] if row in answers[0]]
    if not shared:
        raise ValueError(f"{first} and {second} have no row in common; compare evaluations of the same data")
    before, after = ({row: [records[row]] for row in shared} for records in answers)
    differences = compare_records(before, after, GREEDY)
    console, names = Console(), (first.name, second.name)
    console.print(_table(names, differences, len(shared)))
    if note := _lenience(names, (before, after)):
        console.print(note)
    config = EvaluateConfig.model_validate(yaml.safe_load((second / "config.yaml").read_bytes()))
    rows = [sample for sample in open_held_out(config, RunFolder(second)) if sample.id in before]
    path = out or second / "report" / f"compared-with-{first.name}.html"
    return write_comparison_report(path, names, differences, rows, answers, note=note)


def greedy_answers(run: Path) -> dict[str, Record]:
    """The record of the greedy answer to each row of an evaluation."""
    return {
        row: next(record for record in records if record["kind"] == "greedy")
        for row, records in read_results(run / "results.jsonl").items()
    }


def _lenience(names: tuple[str, str], answers: Sequence[Mapping[str, Sequence[Record]]]) -> str:
    """What of the figures hangs on lenient reading; "" where nothing does."""
    counts = [sum(record.get("read") == "lenient" for (record,) in records.values()) for records in answers]
    parts = [f"{count} of {name}" for count, name in zip(counts, names, strict=True) if count]
    return f"Answers that were read leniently: {', '.join(parts)}." if parts else ""


def _table(names: tuple[str, str], differences: Mapping[str, Mapping[str, float]], count: int) -> Table:
    table = Table("figure", *names, "difference", "95 % interval", title=f"{count} rows, paired", title_justify="left")
    for figure, pair in differences.items():
        interval = f"{pair['low']:+.3f} … {pair['high']:+.3f}"
        table.add_row(TITLES[figure], f"{pair['before']:.3f}", f"{pair['after']:.3f}", f"{pair['gain']:+.3f}", interval)
    return table
