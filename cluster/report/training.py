"""The page of a training run: metrics before and after, curves, times, and held-out samples side by side. It is made of
the run's folder as it is, at any time."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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

LAG = {
    "Lag of the weights that sampled (versions)": {"lag": "policy/lag"},
    "Mean weight that corrects for the lag": {"weight": "learner/correction"},
    "Share of these weights above their cap": {"share": "learner/truncated_fraction"},
}
"""Charts of a run whose steps overlapped."""
CACHE = {"Images whose embedding was kept, share": {"found": "segmenter/cache_hit_rate"}}
"""Charts of a run whose reward looks at masks."""


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """An evaluation that a run has recorded."""

    name: str
    """`before`, `after` or `step-NNNNNN`, by which its samples are named."""
    step: int
    kinds: Mapping[str, Mapping[str, float]]
    """Mean figures of greedy and of sampled answers."""

    @property
    def label(self) -> str:
        return "before" if self.name == "before" else f"after step {self.step}"


def evaluations(run: RunFolder) -> list[Evaluated]:
    """The first and the newest of a run's evaluations, of those up to its newest step: a run that resumed may have gone
    further before."""
    newest = max((line["step"] for line in run.metrics()), default=math.inf)
    kept = [
        Evaluated(name=name, step=each["step"], kinds={kind: each[kind] for kind in each if kind != "step"})
        for name, each in (run.read_json("evaluations.json") or {}).items()
        if each["step"] <= newest
    ]
    first = [each for each in kept if each.name == "before"]
    later = sorted((each for each in kept if each.name != "before"), key=lambda each: each.step)
    return [*first, *later[-1:]]


def write_report(
    run: RunFolder,
    summary: Mapping[str, Any],
    held_out: Sequence[Sample],
    *,
    path: Path | None = None,
    remarks: Sequence[str] = (),
) -> Path:
    """Write the page, by default to `report/index.html`, from the run folder, the run's summary and the held-out rows.
    Answers to rows that are not given are shown without their image. remarks: as in `write_page`."""
    metrics, found = run.metrics(), evaluations(run)
    shown = cards(run, found, {sample.id: sample for sample in held_out})
    return write_page(
        path or run.report / "index.html",
        "training.html",
        remarks=remarks,
        name=run.path.resolve().name,
        summary=summary,
        config=(run.path / "config.yaml").read_text(encoding="utf-8"),
        titles=TRAINING_METRICS,
        evaluations=found,
        charts=all_charts(metrics),
        seconds=summary.get("seconds") or total_seconds(metrics),
        roles=loads(metrics),
        advice=advice_after(metrics),
        cards=shown,
    )


def total_seconds(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """By phase, of all steps; what a run has not finished says."""
    return {phase: sum(values) for phase, values in phase_seconds(metrics).items()}


def all_charts(metrics: Sequence[Mapping[str, float]]) -> list[str]:
    """The curves over a run's steps. A curve whose metric some step lacks is left out, such as those of masks where the
    reward needs none, and so is a chart without any curve. How far the weights that sampled lag behind, and what
    corrects for it, is shown where steps overlapped."""
    if not metrics:
        return []
    steps = [int(line["step"]) for line in metrics]
    lagging = any(line.get("policy/lag") for line in metrics)
    groups: dict[str, dict[str, str]] = {
        "Sampled answers": {name: f"answers/{name}" for name in TRAINING_METRICS},
        "Reward and its parts": {name: f"reward/{name}" for name in reward_parts(metrics[0])},
        "Negative log-likelihood (nats/token), reward std": {"nll": "answers/nll", "reward std": "reward/std"},
        "Learner": {name: f"learner/{name}" for name in ("grad_norm", "kl", "clip_fraction")},
        "Engine against learner (nats)": {name: f"learner/{name}" for name in ("engine_gap", "canary_gap")},
        **(LAG if lagging else {}),
        **(CACHE if any(line.get("segmenter/cache_hits") for line in metrics) else {}),
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


def cards(run: RunFolder, found: Sequence[Evaluated], held_out: Mapping[str, Sample]) -> list[dict[str, Any]]:
    """Held-out rows with the greedy answers of some evaluations, spread evenly over the rows of the last."""
    answers = {each.label: read_greedy(run, each) for each in found}
    rows = list(answers[found[-1].label]) if found else []
    return [
        pair(held_out.get(row), {name: greedy[row] for name, greedy in answers.items() if row in greedy})
        for row in spread(rows, CARDS)
    ]


def read_greedy(run: RunFolder, evaluated: Evaluated) -> dict[str, Record]:
    """The greedy answer to each row in an evaluation of a training run."""
    found = read_samples(run.samples / f"{evaluated.name}-greedy.parquet")
    return {row: records[0] for row, records in found.items()}


def pair(sample: Sample | None, answers: Mapping[str, Record]) -> dict[str, Any]:
    """Named answers to a row side by side. sample: the row; None if it cannot be read."""
    record = next(iter(answers.values()))
    return {
        "query": record["query"],
        "what": f"{record['modality']} · {record['category']}",
        "answers": [
            {
                "name": name,
                "drawn": drawn(each, sample),
                "reasoning": each["reasoning"] or each["completion"],
                "metrics": {title: each["metrics"][metric] for metric, title in TRAINING_METRICS.items()},
            }
            for name, each in answers.items()
        ],
    }
