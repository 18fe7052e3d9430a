"""The page of a training run: metrics before and after, curves, times, and held-out samples side by side."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.advice import advice_after, loads
from cluster.display import reward_parts, section
from cluster.records import Record, read_samples
from cluster.report import charts
from cluster.report.pages import drawn, spread, write_page
from cluster.run_folder import RunFolder
from cluster.timesheet import AWAITED
from rewards.answer_metrics import TRAINING_METRICS
from umrg.sample import Sample

CARDS = 36
"""Held-out samples that the page shows."""


def write_report(run: RunFolder, summary: Mapping[str, Any], held_out: Sequence[Sample]) -> Path:
    """Write `report/index.html` from the run folder, the run's summary and the held-out rows."""
    metrics = run.metrics()
    return write_page(
        run.report / "index.html",
        "training.html",
        name=run.path.name,
        summary=summary,
        config=(run.path / "config.yaml").read_text(encoding="utf-8"),
        titles=TRAINING_METRICS,
        charts=all_charts(metrics),
        seconds=summary["seconds"],
        roles=loads(metrics),
        advice=advice_after(metrics),
        cards=cards(run, held_out),
        count=len(held_out),
    )


def all_charts(metrics: Sequence[Mapping[str, float]]) -> list[str]:
    """The curves over a run's steps. A curve whose metric some step lacks is left out, such as those of masks where the
    reward needs none, and so is a chart without any curve."""
    if not metrics:
        return []
    steps = [int(line["step"]) for line in metrics]
    groups: dict[str, dict[str, str]] = {
        "Sampled answers": {name: f"answers/{name}" for name in TRAINING_METRICS},
        "Reward and its parts": {name: f"reward/{name}" for name in reward_parts(metrics[0])},
        "Negative log-likelihood (nats/token), reward std": {"nll": "answers/nll", "reward std": "reward/std"},
        "Learner": {name: f"learner/{name}" for name in ("grad_norm", "kl", "clip_fraction")},
        "Engine against learner (nats)": {name: f"learner/{name}" for name in ("engine_gap", "canary_gap")},
        "Busy, share of a step": {role: f"busy/{role}" for role in AWAITED},
    }
    found = []
    for title, names in groups.items():
        series = {
            label: [line[name] for line in metrics]
            for label, name in names.items()
            if all(name in line for line in metrics)
        }
        if series:
            found.append(charts.curves(title, steps, series))
    if seconds := phase_seconds(metrics):
        found.append(charts.stacked("Seconds per step, by phase", steps, seconds, "s"))
    return found


def phase_seconds(metrics: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Seconds that each step spent in each phase; 0 in the steps without that phase."""
    lines = [section(line, "seconds") for line in metrics]
    phases = dict.fromkeys(phase for line in lines for phase in line if phase != "step")
    return {phase: [line.get(phase, 0.0) for line in lines] for phase in phases}


def cards(run: RunFolder, held_out: Sequence[Sample]) -> list[dict[str, Any]]:
    """Held-out samples with the greedy answers before and after training, spread evenly over the rows."""
    before, after = (read_samples(run.samples / f"{name}-greedy.parquet") for name in ("before", "after"))
    return [
        pair(sample, [("before", before.get(sample.id)), ("after", after[sample.id])])
        for sample in spread([sample for sample in held_out if sample.id in after], CARDS)
    ]


def pair(sample: Sample, answers: Sequence[tuple[str, Sequence[Record] | None]]) -> dict[str, Any]:
    """A sample with named answers side by side: the first record of each; a name without records is left out."""
    return {
        "query": sample.query,
        "what": f"{sample.modality} · {sample.category}",
        "answers": [
            {
                "name": name,
                "drawn": drawn(sample, records[0]),
                "reasoning": records[0]["reasoning"] or records[0]["completion"],
                "metrics": {title: records[0]["metrics"][metric] for metric, title in TRAINING_METRICS.items()},
            }
            for name, records in answers
            if records
        ],
    }
