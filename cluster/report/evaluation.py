"""The page of an evaluation: tables, distributions, malformed answers, and a gallery to filter and sort."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.figures import TITLES
from cluster.records import Record
from cluster.report import charts
from cluster.report.pages import drawn, write_page
from cluster.run_folder import RunFolder
from umrg.sample import Sample

Figures = Mapping[str, Mapping[str, float]]


def write_evaluation_report(
    run: RunFolder,
    metrics: Mapping[str, Any],
    rows: Sequence[Sample],
    greedy: Mapping[str, Record],
    figures: Figures,
    *,
    limit: int,
) -> Path:
    """Write `report/index.html`.

    metrics: the content of metrics.json. greedy: the record of each row's greedy answer. figures: the figures of each
    row. limit: the most samples in the gallery; where there are more rows, half of it are the worst rows and the other
    half are spread evenly over the rest.
    """
    shown = chosen(rows, figures, limit)
    return write_page(
        run.report / "index.html",
        "evaluation.html",
        name=run.path.name,
        metrics=metrics,
        titles={name: title for name, title in TITLES.items() if name in metrics["overall"]},
        charts=all_charts(metrics, figures),
        cards=[card(sample, greedy[sample.id], figures[sample.id]) for sample in shown],
        count=len(rows),
    )


def chosen(rows: Sequence[Sample], figures: Figures, limit: int) -> list[Sample]:
    """The rows of the gallery, at most `limit`, by ascending Dice."""
    order = sorted(rows, key=lambda sample: figures[sample.id]["dice"])
    if len(order) <= limit:
        return order
    worst, others = order[: limit // 2], order[limit // 2 :]
    left = limit - len(worst)
    return worst + [others[i * len(others) // left] for i in range(left)]


def all_charts(metrics: Mapping[str, Any], figures: Figures) -> list[str]:
    """Distributions over rows, and Dice by stratum."""
    dice = {TITLES[name]: [row[name] for row in figures.values()] for name in ("dice", "oracle_dice")}
    iou = {"IoU": [row["iou"] for row in figures.values()]}
    found = [
        charts.histogram("Dice of the mask, and its ceiling", dice, "Dice"),
        charts.histogram("IoU of the box", iou, "IoU"),
    ]
    for kind, parts in metrics["by"].items():
        if len(parts) > 1:
            means = {f"{name} ({part['n']})": tuple(part["dice"].values()) for name, part in parts.items()}
            found.append(charts.bars(f"Dice by {kind}", means, "Dice, 95 % interval"))
    return found


def card(sample: Sample, record: Record, figures: Mapping[str, float]) -> dict[str, Any]:
    """The content of a row's card in the gallery."""
    return {
        "id": sample.id,
        "query": sample.query,
        "category": sample.category,
        "modality": sample.modality,
        "failure": record["failure"] or "",
        "lenient": record.get("read") == "lenient",
        "dice": figures["dice"],
        "iou": figures["iou"],
        "ceiling": figures["oracle_dice"],
        "reasoning": record["reasoning"] or record["completion"],
        "parts": record["parts"],
        "reward": record["reward"],
        "drawn": drawn(sample, record),
    }
