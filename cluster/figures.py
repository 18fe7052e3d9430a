"""Figures of an evaluation, computed from its records: per row, then means with intervals, overall and by stratum.

A metric belongs to one answer (`rewards.answer_metrics`), a figure to a row or to several: the metric of the greedy
answer, or what the sampled answers come to together.

records of a row ──row_figures──► figures of the row ──summarise──► metrics.json ──tables──► table.md, table.csv
"""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap

from cluster.config import EvaluateConfig
from cluster.records import Record
from rewards.answer_metrics import METRICS
from umrg.config import written
from umrg.dataset import Dataset
from umrg.keypoints import tight_box
from umrg.masks import decode_rle
from umrg.metrics import box_iou, mask_dice
from umrg.prompts import PromptSpec
from umrg.sample import Sample

TITLES = {
    **METRICS,
    "mean_iou": "mean IoU",
    "best_iou": "best IoU",
    "consensus_iou": "consensus IoU",
    "mean_dice": "mean Dice",
    "best_dice": "best Dice",
    "consensus_dice": "consensus Dice",
}
"""Titles of all figures, in the order of the columns."""

_BATCH_VALUES = 2**20
"""Resampled values that are in memory at a time."""


def greedy_record(records: Sequence[Record]) -> Record:
    """The record of the greedy answer among those of a row."""
    return next(record for record in records if record["kind"] == "greedy")


def row_figures(records: Sequence[Record], sample: Sample | None) -> dict[str, float]:
    """Figures of one row: the greedy answer's metrics and, of the k sampled answers, the mean, the best and the
    consensus. The best is chosen by the reference (best@k), which bounds what choosing among the answers can reach; the
    consensus is a vote that needs no reference. With an expert that takes no points there is no `dice_points`, and
    without the row (`sample`) no consensus, because the reference mask is not recorded."""
    metrics = greedy_record(records)["metrics"]
    sampled = [record for record in records if record["kind"] == "sampled"]
    figures = {name: metrics[name] for name in METRICS if name in metrics}
    if sampled:
        for name in ("iou", "dice"):
            values = [record["metrics"][name] for record in sampled]
            figures[f"mean_{name}"], figures[f"best_{name}"] = float(np.mean(values)), max(values)
        if sample is not None:
            figures.update(consensus(sampled, sample))
    return figures


def as_malformed(records: Sequence[Record]) -> list[Record]:
    """The same records with the leniently read answers counted as malformed, as strict reading would have them."""
    return [_malformed(record) if record.get("read") == "lenient" else record for record in records]


def _malformed(record: Record) -> Record:
    metrics = {name: value if name == "oracle_dice" else 0.0 for name, value in record["metrics"].items()}
    return {**record, "failure": "read leniently", "metrics": metrics}


def consensus(sampled: Sequence[Record], sample: Sample) -> dict[str, float]:
    """Dice and box IoU of the pixel-wise majority of k answers: of the pixels that more than half of the masks cover,
    and of the tight box around the pixels that more than half of the boxes cover. A malformed answer covers nothing but
    counts among the k. The idea is that of spatial voting over sampled regions (GUI-RC, arXiv:2508.05615)."""
    size = sample.size
    masks = np.zeros((size.height, size.width), dtype=np.int32)
    boxes = np.zeros_like(masks)
    for record in sampled:
        if record["failure"] is None:
            masks += decode_rle(record["mask"])
            x1, y1, x2, y2 = (round(v) for v in record["box"])
            boxes[max(0, y1) : max(0, y2 + 1), max(0, x1) : max(0, x2 + 1)] += 1
    majority = 2 * boxes > len(sampled)
    return {
        "consensus_dice": mask_dice(2 * masks > len(sampled), sample.mask()),
        "consensus_iou": box_iou(tight_box(majority), sample.box) if majority.any() else 0.0,
    }


class TrainingCoverage:
    """The queries, categories and modalities that a reasoner was trained on, to tell seen from unseen rows."""

    def __init__(self, trained_on: Sequence[Any]) -> None:
        """trained_on: the infos (`umrg.dataset`) of the training rows; empty where they are unknown."""
        self.known = bool(trained_on)
        self.queries = {info.query for info in trained_on}
        self.categories = {info.category for info in trained_on}
        self.modalities = {info.modality for info in trained_on}

    @classmethod
    def of_files(cls, files: Sequence[Path]) -> Self:
        """The coverage of the rows of some parquet files."""
        return cls(Dataset.open(files).infos if files else ())

    def strata(self, sample: Sample) -> dict[str, str]:
        """The strata that a row belongs to, by their kind. Where the training rows are unknown, the row itself may say
        whether its phrasing was held out."""
        strata = {
            "supercategory": sample.supercategory,
            "category": sample.category,
            "modality": sample.modality,
        }
        if self.known:
            strata["phrasing"] = _seen(sample.query in self.queries)
            strata["category seen"] = _seen(sample.category in self.categories)
            strata["modality seen"] = _seen(sample.modality in self.modalities)
        elif phrasing := sample.extra.get("phrasing"):
            strata["phrasing"] = _seen(phrasing == "seen")
        return strata


def recorded_strata(record: Record) -> dict[str, str]:
    """The strata that a row belongs to, as far as its records tell."""
    return {kind: record[kind] for kind in ("supercategory", "category", "modality")}


def figures_of(
    answers: Mapping[str, Sequence[Record]],
    rows: Mapping[str, Sample],
    coverage: TrainingCoverage,
    *,
    lenient: bool = False,
) -> dict[str, Any]:
    """`summarise` of an evaluation's records, by row; with `lenient` also as `lenient_figures`. rows: all of them or,
    where they cannot be read any more, none."""
    greedy = {row: greedy_record(records) for row, records in answers.items()}
    strata = {row: coverage.strata(rows[row]) if rows else recorded_strata(greedy[row]) for row in answers}
    failures = {row: record["failure"] for row, record in greedy.items() if record["failure"]}
    found = summarise({row: row_figures(records, rows.get(row)) for row, records in answers.items()}, strata, failures)
    return {**found, "lenient": lenient_figures(answers, rows, strata)} if lenient else found


def lenient_figures(
    answers: Mapping[str, Sequence[Record]], rows: Mapping[str, Sample], strata: Mapping[str, Mapping[str, str]]
) -> dict[str, Any]:
    """How many greedy and sampled answers were read leniently, and the figures with these counted as malformed."""
    kinds = [record["kind"] for records in answers.values() for record in records if record.get("read") == "lenient"]
    figures = {row: row_figures(as_malformed(records), rows.get(row)) for row, records in answers.items()}
    summary = summarise(figures, strata, {})
    return {
        "greedy": kinds.count("greedy"),
        "sampled": kinds.count("sampled"),
        "as_malformed": {"overall": summary["overall"], "by": summary["by"]},
    }


def _seen(value: bool) -> str:
    return "seen" if value else "unseen"


def summarise(
    rows: Mapping[str, Mapping[str, float]], strata: Mapping[str, Mapping[str, str]], failures: Mapping[str, str]
) -> dict[str, Any]:
    """Mean figures with 95 % bootstrap intervals, overall and by stratum, and the rows that failed by cause.

    rows: figures by row. strata: the strata of each row, by kind. failures: the cause for each row whose greedy answer
    is malformed.
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


def settings(config: EvaluateConfig, spec: PromptSpec) -> dict[str, Any]:
    """The settings reported with the metrics. spec: of the model, which the configuration may name by a URI."""
    return {
        "model": written(config.model) if config.model else f"{config.endpoint.model} at {config.endpoint.url}",  # type: ignore[union-attr]
        "expert": config.expert,
        "preprocess": config.segmenter.preprocess,
        "prompt": spec.name,
        "think": spec.think,
        "frame": spec.frame.value,
        **{name: bound for name in ("min_pixels", "max_pixels") if (bound := getattr(spec, name)) is not None},
        "answers": config.answers,
        "n": config.n,
        "temperature": config.temperature,
        "max_tokens": config.rollout.max_tokens,
    }


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    names = list(rows[0])
    values = np.array([[row[name] for row in rows] for name in names])
    low, high = interval(values)
    return {
        name: {"mean": round(float(mean), 6), "low": round(float(a), 6), "high": round(float(b), 6)}
        for name, mean, a, b in zip(names, values.mean(axis=-1), low, high, strict=True)
    }


def interval(values: NDArray[np.float64], *, resamples: int = 2000) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Lower and upper ends of the 95 % percentile-bootstrap intervals of the means over rows; the seed is fixed.

    values: [figures, rows]. The figures share the resampled rows. Where a figure is constant, as it is with one row,
    both ends are its mean.
    """
    mean = values.mean(axis=-1)
    if values.shape[-1] == 1:
        # scipy refuses to resample a single observation.
        return mean, mean
    found = bootstrap(
        (values,),
        np.mean,
        axis=-1,
        vectorized=True,
        method="percentile",
        n_resamples=resamples,
        batch=max(1, _BATCH_VALUES // values.size),
        rng=np.random.default_rng(0),
    ).confidence_interval
    # Sums over other orders of the same number may differ from it in the last digit.
    constant = np.ptp(values, axis=-1) == 0
    return np.where(constant, mean, found.low), np.where(constant, mean, found.high)


def markdown(metrics: Mapping[str, Any]) -> str:
    """The table in the published layout, in percent: all rows, then each super-category, then the further strata. Where
    answers were read leniently, a second table counts them as malformed."""
    if "lenient" not in metrics:
        return _markdown_table(metrics)
    lenient, count = metrics["lenient"], metrics["overall"]["n"]
    heading = f"{lenient['greedy']} of {count} greedy answers were read leniently. Counted as malformed:"
    return f"{_markdown_table(metrics)}\n{heading}\n\n{_markdown_table(lenient['as_malformed'])}"


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
    """One line per stratum and figure: kind, stratum, n, figure, mean, low, high. Where answers were read leniently,
    further lines, marked in `kind`, count them as malformed."""
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
