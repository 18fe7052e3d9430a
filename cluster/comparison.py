"""Answers to the same rows compared row by row: those before and after a training run, and those of two evaluations
(`medreasoner compare RUN_A RUN_B`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from rich.console import Console
from rich.table import Table

from cluster.answered_rows import answered_rows
from cluster.config import EvaluateConfig
from cluster.figures import greedy_record, interval
from cluster.records import Record, read_results, read_samples
from cluster.report import write_comparison_report
from cluster.report.comparison import most_changed
from cluster.run_folder import RunFolder, kept_config
from rewards.answer_metrics import METRICS, TRAINING_METRICS
from umrg.mistake import Mistake

RecordsByRow = Mapping[str, Sequence[Record]]
"""Records by the id of the row that they answer."""

Differences = dict[str, dict[str, float]]
"""`paired_interval` by metric."""


def paired_interval(before: ArrayLike, after: ArrayLike) -> dict[str, float]:
    """Means over rows before and after, the mean difference ("gain") and its 95 % interval by bootstrap over rows."""
    first, second = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    differences = second - first
    (low,), (high,) = interval(differences[None], resamples=10_000)
    return {
        "before": float(first.mean()),
        "after": float(second.mean()),
        "gain": float(differences.mean()),
        "low": float(low),
        "high": float(high),
    }


def compare_records(
    before: RecordsByRow, after: RecordsByRow, metrics: Sequence[str] = tuple(TRAINING_METRICS)
) -> Differences:
    """`paired_interval` of each metric that both sides have, over the rows that both answer; empty where they share no
    row."""
    shared = [row for row in after if row in before]
    # An expert that takes no points has no dice_points, for example.
    measured = [records[shared[0]][0]["metrics"] for records in (before, after)] if shared else [{}]
    return {
        metric: paired_interval(*([_mean(records[row], metric) for row in shared] for records in (before, after)))
        for metric in metrics
        if all(metric in each for each in measured)
    }


def _mean(records: Sequence[Record], metric: str) -> float:
    return float(np.mean([record["metrics"][metric] for record in records]))


def compare_run(run: RunFolder, newest: str = "after") -> dict[str, Differences]:
    """The differences between a run's held-out answers before training and in a later evaluation, for greedy and for
    sampled answers; a kind without answers on both sides is left out."""
    found = {}
    for kind in ("greedy", "sampled"):
        before, after = (read_samples(run.samples / f"{when}-{kind}.parquet") for when in ("before", newest))
        found[kind] = compare_records(before, after)
    return {kind: differences for kind, differences in found.items() if differences}


def compare(first: Path, second: Path, out: Path | None = None) -> Path:
    """Compare the greedy answers of two evaluations over the rows that both answered: print the paired differences, and
    write a page with the rows that changed most to `out`, by default `report/compared-with-<first>.html` of the second.
    Raises ValueError where they share no row."""
    all_answers = greedy_answers(first), greedy_answers(second)
    shared = [row for row in all_answers[1] if row in all_answers[0]]
    if not shared:
        raise Mistake(f"{first} and {second} have no row in common; compare evaluations of the same data")
    answers = _only(all_answers[0], shared), _only(all_answers[1], shared)
    before, after = ({row: [record] for row, record in each.items()} for each in answers)
    differences = compare_records(before, after, tuple(METRICS))
    console, names = Console(), (first.resolve().name, second.resolve().name)
    console.print(_table(names, differences, len(shared)))
    if note := _lenience(names, (before, after)):
        console.print(note)
    source, shown = kept_config(EvaluateConfig, second).data.eval, most_changed(answers)
    found = answered_rows(source, RunFolder(second), [answers[1][row] for row in shown])
    for remark in found.remarks:
        console.print(remark, soft_wrap=True)
    path = out or second / "report" / f"compared-with-{names[0]}.html"
    return write_comparison_report(path, names, differences, answers, found.rows, note=note, remarks=found.remarks)


def greedy_answers(run: Path) -> dict[str, Record]:
    """The record of the greedy answer to each row of an evaluation."""
    return {row: greedy_record(records) for row, records in read_results(run / "results.jsonl").items()}


def _only(records: Mapping[str, Record], rows: Sequence[str]) -> dict[str, Record]:
    return {row: records[row] for row in rows}


def _table(names: tuple[str, str], differences: Mapping[str, Mapping[str, float]], count: int) -> Table:
    table = Table("metric", *names, "difference", "95 % interval", title=f"{count} rows, paired", title_justify="left")
    for metric, pair in differences.items():
        ends = f"{pair['low']:+.3f} … {pair['high']:+.3f}"
        table.add_row(METRICS[metric], f"{pair['before']:.3f}", f"{pair['after']:.3f}", f"{pair['gain']:+.3f}", ends)
    return table


def _lenience(names: tuple[str, str], answers: Sequence[RecordsByRow]) -> str:
    """How many of each evaluation's answers were read leniently; "" where none was."""
    counts = [sum(record.get("read") == "lenient" for (record,) in records.values()) for records in answers]
    parts = [f"{count} of {name}" for count, name in zip(counts, names, strict=True) if count]
    return f"Answers that were read leniently: {', '.join(parts)}." if parts else ""
