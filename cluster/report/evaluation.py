"""The page of an evaluation: tables, distributions, malformed answers, and a gallery to filter and sort."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.figures import TITLES
from cluster.records import Record
from cluster.report import charts
from cluster.report.pages import drawn, write_page
from umrg.sample import Sample

Answers = Mapping[str, Record]
"""The record of each row's greedy answer."""


def write_evaluation_report(
    path: Path,
    name: str,
    metrics: Mapping[str, Any],
    greedy: Answers,
    rows: Mapping[str, Sample],
    *,
    limit: int,
    remarks: Sequence[str] = (),
) -> Path:
    """Write the page.

    name: of the run. metrics: the content of metrics.json. greedy: the record of each row's greedy answer. rows: those
    of the gallery (`chosen`), as far as they can be read. limit: the most rows in the gallery; where there are more,
    half of it are the worst rows and the other half are spread evenly over the rest. remarks: as in `write_page`.
    """
    return write_page(
        path,
        "evaluation.html",
        remarks=remarks,
        name=name,
        metrics=metrics,
        titles={name: title for name, title in TITLES.items() if name in metrics["overall"]},
        charts=all_charts(metrics, greedy),
        cards=[card(greedy[row], rows.get(row)) for row in chosen(greedy, limit)],
        count=len(greedy),
    )


def chosen(greedy: Answers, limit: int) -> list[str]:
    """The rows of the gallery, at most `limit`, by ascending Dice."""
    order = sorted(greedy, key=lambda row: greedy[row]["metrics"]["dice"])
    if len(order) <= limit:
        return order
    worst, others = order[: limit // 2], order[limit // 2 :]
    left = limit - len(worst)
    return worst + [others[i * len(others) // left] for i in range(left)]


def all_charts(metrics: Mapping[str, Any], greedy: Answers) -> list[str]:
    """Distributions over rows, and Dice by stratum."""
    dice = {TITLES[name]: [each["metrics"][name] for each in greedy.values()] for name in ("dice", "oracle_dice")}
    iou = {"IoU": [each["metrics"]["iou"] for each in greedy.values()]}
    found = [
        charts.histogram("Dice of the mask, and its ceiling", dice, "Dice"),
        charts.histogram("IoU of the box", iou, "IoU"),
    ]
    for kind, parts in metrics["by"].items():
        if len(parts) > 1:
            means = {f"{name} ({part['n']})": tuple(part["dice"].values()) for name, part in parts.items()}
            found.append(charts.bars(f"Dice by {kind}", means, "Dice, 95 % interval"))
    return found


def card(record: Record, sample: Sample | None) -> dict[str, Any]:
    """The content of a row's card in the gallery. sample: the row; None if it cannot be read."""
    figures = record["metrics"]
    return {
        "id": record["sample_id"],
        "query": record["query"],
        "category": record["category"],
        "modality": record["modality"],
        "failure": record["failure"] or "",
        "lenient": record.get("read") == "lenient",
        "dice": figures["dice"],
        "iou": figures["iou"],
        "ceiling": figures["oracle_dice"],
        "reasoning": record["reasoning"] or record["completion"],
        "parts": record["parts"],
        "reward": record["reward"],
        "drawn": drawn(record, sample),
    }
