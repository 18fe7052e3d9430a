"""The page of a training run: figures before and after, curves, times, and held-out samples side by side."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.evaluation import FIGURES
from cluster.records import records_of
from cluster.report import charts
from cluster.report.pages import drawn, spread, write_page
from cluster.run_folder import RunFolder
from umrg.sample import Sample

CARDS = 36
_TITLES = {"dice": "Dice", "iou": "box IoU", "pdice": "pDice", "well_formed": "well-formed"}


def write_report(run: RunFolder, summary: Mapping[str, Any], held_out: Sequence[Sample]) -> Path:
    """Write `report/index.html`, from what lies in the run folder, its summary and the held-out rows."""
    metrics = run.metrics()
    return write_page(
        run.report / "index.html",
        "training.html",
        name=run.path.name,
        summary=summary,
        config=(run.path / "config.yaml").read_text(encoding="utf-8"),
        titles=_TITLES,
        charts=all_charts(metrics),
        seconds=summary["seconds"],
        cards=cards(run, held_out),
        count=len(held_out),
    )


def all_charts(metrics: Sequence[Mapping[str, float]]) -> list[str]:
    """The curves of a run's steps."""
    if not metrics:
        return []
    steps = [int(line["step"]) for line in metrics]

    def series(prefix: str, names: Sequence[str]) -> dict[str, list[float]]:
        # A phase such as the start lies before some steps only.
        return {name: [line.get(f"{prefix}/{name}", 0.0) for line in metrics] for name in names}

    parts = [name.removeprefix("reward/") for name in metrics[0] if name.startswith("reward/")]
    parts = [name for name in parts if name not in ("spread", "flat_groups")]
    phases = [name.removeprefix("seconds/") for name in metrics[0] if name.startswith("seconds/")]
    return [
        charts.curves("Sampled answers", steps, series("answers", ("dice", "iou", "pdice", "well_formed"))),
        charts.curves("Reward and its parts", steps, series("reward", parts)),
        charts.curves(
            "Surprise (nats a token) and spread of rewards",
            steps,
            {
                "surprise": [line["answers/surprise"] for line in metrics],
                "spread": [line["reward/spread"] for line in metrics],
            },
        ),
        charts.curves("Learner", steps, series("learner", ("grad_norm", "kl", "clipped"))),
        charts.curves("Engine against learner (nats)", steps, series("learner", ("engine_gap", "canary_gap"))),
        charts.stacked(
            "Seconds a step, by phase", steps, series("seconds", [name for name in phases if name != "step"]), "s"
        ),
    ]


def cards(run: RunFolder, held_out: Sequence[Sample]) -> list[dict[str, Any]]:
    """Held-out samples as they were answered before and after, greedily; spread evenly over the rows."""
    before, after = (records_of(run, f"{name}-greedy") for name in ("before", "after"))
    return [
        pair(sample, [("before", before.get(sample.id)), ("after", after[sample.id])])
        for sample in spread([sample for sample in held_out if sample.id in after], CARDS)
    ]


def pair(sample: Sample, answers: Sequence[tuple[str, Sequence[Mapping[str, Any]] | None]]) -> dict[str, Any]:
    """A sample with the first of each named answers' records side by side."""
    return {
        "query": sample.query,
        "what": f"{sample.modality} · {sample.category}",
        "answers": [
            {
                "name": name,
                "drawn": drawn(sample, records[0]),
                "reasoning": records[0]["reasoning"] or records[0]["completion"],
                "metrics": {_TITLES[figure]: records[0]["metrics"][figure] for figure in FIGURES},
            }
            for name, records in answers
            if records
        ],
    }
