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
    answers: tuple[Mapping[str, Record], Mapping[str, Record]],
    rows: Mapping[str, Sample],
    *,
    note: str = "",
    remarks: Sequence[str] = (),
) -> Path:
    """Write the page.

    differences: `cluster.comparison.paired_interval` by metric. answers: the greedy records of each evaluation by row,
    of the rows that both answered. rows: of those that changed most (`most_changed`), as far as they can be read. note:
    a remark on how the metrics came about. remarks: as in `write_page`.
    """
    shown = most_changed(answers)
    cards = [
        pair(rows.get(row), {name: records[row] for name, records in zip(_distinct(names), answers, strict=True)})
        for row in shown
    ]
    return write_page(
        path,
        "comparison.html",
        remarks=remarks,
        name=" → ".join(names),
        names=names,
        titles=METRICS,
        differences=differences,
        cards=cards,
        note=note,
        count=len(answers[0]),
    )


def most_changed(answers: tuple[Mapping[str, Record], Mapping[str, Record]]) -> list[str]:
    """The rows that the page shows: those whose Dice differs most."""
    first, second = answers

    def change(row: str) -> float:
        return abs(float(second[row]["metrics"]["dice"] - first[row]["metrics"]["dice"]))

    return sorted(second, key=change, reverse=True)[:CARDS]


def _distinct(names: tuple[str, str]) -> tuple[str, str]:
    """Two runs may have one name in two folders."""
    return names if names[0] != names[1] else (f"{names[0]} (first)", f"{names[1]} (second)")
