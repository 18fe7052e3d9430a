"""The page of two evaluations compared: paired differences, and the rows that changed most."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from cluster.records import Record
from cluster.report.pages import write_page
from cluster.report.training import pair
from rewards.answer_metrics import METRICS
from umrg.sample import Sample

CARDS = 60
"""Rows that the page shows."""


def write_comparison_report(
    path: Path,
    names: tuple[str, str],
    differences: Mapping[str, Mapping[str, float]],
    rows: Sequence[Sample],
    answers: tuple[Mapping[str, Record], Mapping[str, Record]],
    *,
    note: str = "",
) -> Path:
    """Write the page.

    differences: `cluster.comparison.paired_interval` by metric. rows: the rows that both evaluations answered. answers:
    the greedy records of each evaluation by row. note: a remark on how the metrics came about.
    """
    first, second = answers

    def change(sample: Sample) -> float:
        return float(second[sample.id]["metrics"]["dice"] - first[sample.id]["metrics"]["dice"])

    most = sorted(rows, key=lambda sample: abs(change(sample)), reverse=True)[:CARDS]
    cards = [
        pair(sample, [(name, [records[sample.id]]) for name, records in zip(names, answers, strict=True)])
        for sample in most
    ]
    return write_page(
        path,
        "comparison.html",
        name=" → ".join(names),
        names=names,
        titles=METRICS,
        differences=differences,
        cards=cards,
        note=note,
        count=len(rows),
    )
