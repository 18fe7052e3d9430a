"""Figures of an evaluation from its records: per row, then means with intervals, overall and by stratum.

records of a row ──row_figures──► figures of the row ──summarise──► metrics.json ──tables──► table.md, table.csv
"""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from cluster.records import Record
from umrg.dataset import Dataset
from umrg.masks import decode_rle
from umrg.metrics import box_iou, mask_dice
from umrg.sample import Sample

DRAWS = 2000
GREEDY = (
    "iou",
    "pdice",
    "pdice_published",
    "dice_points",
    "dice_box",
    "dice",
    "mask_iou",
    "oracle_dice",
    "well_formed",
)
TITLES = {
    "iou": "IoU",
    "pdice": "pDice",
    "pdice_published": "pDice (published)",
    "dice_points": "Dice, points",
    "dice_box": "Dice, box",
    "dice": "Dice, both",
    "mask_iou": "mask IoU",
    "oracle_dice": "ceiling",
    "well_formed": "well-formed",
    "mean_iou": "mean IoU",
    "best_iou": "best IoU",
    "consensus_iou": "consensus IoU",
    "mean_dice": "mean Dice",
    "best_dice": "best Dice",
    "consensus_dice": "consensus Dice",
}


def row_figures(records: Sequence[Record], sample: Sample) -> dict[str, float]:
    """Figures of one row. Of the greedy answer its metrics (`GREEDY`; an expert that takes no points has no
    `dice_points`); of k sampled ones their mean, their best
    (best@k, by the reference: a ceiling of choosing) and their consensus (by vote, without the reference)."""
    greedy = [record for record in records if record["kind"] == "greedy"]
    sampled = [record for record in records if record["kind"] == "sampled"]
    found = {name: greedy[0]["metrics"][name] for name in GREEDY if name in greedy[0]["metrics"]}
    if sampled:
        for name in ("iou", "dice"):
            values = [record["metrics"][name] for record in sampled]
            found[f"mean_{name}"], found[f"best_{name}"] = float(np.mean(values)), max(values)
        found.update(consensus(sampled, sample))
    return found


def as_malformed(records: Sequence[Record]) -> list[Record]:
    """The same answers, with those that were read leniently counted as malformed, as a strict reading has them."""
    return [_malformed(record) if record.get("read") == "lenient" else record for record in records]


def _malformed(record: Record) -> Record:
    metrics = {name: value if name == "oracle_dice" else 0.0 for name, value in record["metrics"].items()}
    return {**record, "failure": "read leniently", "metrics": metrics}


def consensus(sampled: Sequence[Record], sample: Sample) -> dict[str, float]:
    """Dice and box IoU of what most of k answers agree on, pixel by pixel: the pixels that more than half of their
    masks hold, and the tight box of the pixels that more than half of their boxes hold. A malformed answer votes for
    nothing. The idea is that of spatial voting over sampled regions (GUI-RC, arXiv:2508.05615)."""
    size = sample.size
    masks = np.zeros((size.height, size.width), dtype=np.int32)
    boxes = np.zeros_like(masks)
    for record in sampled:
        if record["failure"] is None:
            masks += decode_rle(record["mask"])
            x1, y1, x2, y2 = (round(v) for v in record["box"])
            boxes[max(0, y1) : max(0, y2 + 1), max(0, x1) : max(0, x2 + 1)] += 1
    agreed = 2 * boxes > len(sampled)
    return {
        "consensus_dice": mask_dice(2 * masks > len(sampled), sample.mask()),
        "consensus_iou": _tight_iou(agreed, sample),
    }


def _tight_iou(agreed: NDArray[np.bool_], sample: Sample) -> float:
    if not agreed.any():
        return 0.0
    ys, xs = np.flatnonzero(agreed.any(axis=1)), np.flatnonzero(agreed.any(axis=0))
    return box_iou((float(xs[0]), float(ys[0]), float(xs[-1]), float(ys[-1])), sample.box)


class Seen:
    """What a reasoner was trained on: queries, categories and modalities. Empty where nobody said."""

    def __init__(self, trained_on: Sequence[Any]) -> None:
        self.known = bool(trained_on)
        self.words = {info.query for info in trained_on}
        self.categories = {info.category for info in trained_on}
        self.modalities = {info.modality for info in trained_on}

    @classmethod
    def of_files(cls, files: Sequence[Path]) -> Self:
        """What is asked in some parquet files."""
        return cls(Dataset.open(files).infos if files else ())

    def strata(self, sample: Sample) -> dict[str, str]:
        """The strata that a row belongs to, by their kind. A row may itself say whether its phrasing was held out."""
        found = {
            "supercategory": sample.supercategory,
            "category": sample.category,
            "modality": sample.modality,
        }
        if self.known:
            found["phrasing"] = _seen(sample.query in self.words)
            found["category seen"] = _seen(sample.category in self.categories)
            found["modality seen"] = _seen(sample.modality in self.modalities)
        elif phrasing := sample.extra.get("phrasing"):
            found["phrasing"] = "seen" if phrasing == "seen" else "unseen"
        return found


def _seen(value: bool) -> str:
    return "seen" if value else "unseen"


def summarise(
    rows: Mapping[str, Mapping[str, float]], strata: Mapping[str, Mapping[str, str]], failures: Mapping[str, str]
) -> dict[str, Any]:
    """Means over rows with 95 % intervals, by bootstrap over rows: overall and by stratum, and failures by cause.

    rows: figures by row. strata: of each row, by kind. failures: cause by row, of the rows whose greedy answer failed.
    """
    overall = {"n": len(rows), **_means(list(rows.values()))}
    by: dict[str, dict[str, Any]] = {}
    for kind in dict.fromkeys(kind for found in strata.values() for kind in found):
        parts: dict[str, list[Mapping[str, float]]] = {}
        for row, figures in rows.items():
            if kind in strata[row]:
                parts.setdefault(strata[row][kind], []).append(figures)
        by[kind] = {name: {"n": len(parts[name]), **_means(parts[name])} for name in sorted(parts)}
    causes = sorted(set(failures.values()))
    counted = {cause: sorted(row for row, why in failures.items() if why == cause) for cause in causes}
    return {"overall": overall, "by": by, "failures": counted}


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    names = list(rows[0])
    values = np.array([[row[name] for name in names] for row in rows])
    rng = np.random.default_rng(0)
    # A row drawn k times counts k times: all draws are one matrix product.
    counts = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=DRAWS)
    low, high = np.percentile(counts @ values / len(rows), [2.5, 97.5], axis=0)
    return {
        name: {"mean": round(float(mean), 6), "low": round(float(a), 6), "high": round(float(b), 6)}
        for name, mean, a, b in zip(names, values.mean(axis=0), low, high, strict=True)
    }


def markdown(metrics: Mapping[str, Any]) -> str:
    """The table in the published layout: all rows first, then each super-category; figures in percent. Further strata
    follow, with the same columns. Where answers were read leniently, a second table counts them as malformed."""
    if "lenient" not in metrics:
        return _markdown_table(metrics)
    lenient, count = metrics["lenient"], metrics["overall"]["n"]
    said = f"{lenient['greedy']} of {count} greedy answers were read leniently. Counted as malformed:"
    return f"{_markdown_table(metrics)}\n{said}\n\n{_markdown_table(lenient['as_malformed'])}"


def _markdown_table(metrics: Mapping[str, Any]) -> str:
    overall = metrics["overall"]
    figures = [name for name in TITLES if name in overall]
    lines = [
        "| | n | " + " | ".join(TITLES[name] for name in figures) + " |",
        "|---|---|" + "---|" * len(figures),
        _line("**all**", overall, figures, intervals=True),
    ]
    for kind, parts in metrics["by"].items():
        lines += [f"| *{kind}* |" + " |" * (len(figures) + 1)]
        lines += [_line(name, part, figures, intervals=False) for name, part in parts.items()]
    return "\n".join(lines) + "\n"


def _line(title: str, part: Mapping[str, Any], figures: Sequence[str], *, intervals: bool) -> str:
    cells = []
    for name in figures:
        value = part[name]
        interval = f" ({100 * value['low']:.1f}-{100 * value['high']:.1f})" if intervals else ""
        cells.append(f"{100 * value['mean']:.2f}{interval}")
    return f"| {title} | {part['n']} | " + " | ".join(cells) + " |"


def comma_separated(metrics: Mapping[str, Any]) -> str:
    """One line a stratum and figure: kind, stratum, n, figure, mean, low, high. Where answers were read leniently, the
    kind also says which lines count them as malformed."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["kind", "stratum", "n", "figure", "mean", "low", "high"])
    parts = _parts(metrics)
    if "lenient" in metrics:
        strict = _parts(metrics["lenient"]["as_malformed"])
        parts += [(f"{kind}, lenient as malformed", name, part) for kind, name, part in strict]
    for kind, stratum, part in parts:
        for name in (name for name in TITLES if name in part):
            writer.writerow([kind, stratum, part["n"], name, *(part[name][end] for end in ("mean", "low", "high"))])
    return buffer.getvalue()


def _parts(metrics: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, Any]]]:
    strata = [(kind, name, part) for kind, found in metrics["by"].items() for name, part in found.items()]
    return [("overall", "all", metrics["overall"]), *strata]
