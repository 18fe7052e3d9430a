"""The page of a supervised run: the losses, and what the optimizer did. It is made of the run's folder as it is, at any
time."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.report import charts
from cluster.report.pages import write_page
from cluster.run_folder import RunFolder

VALIDATION = "validation/loss"
CURVES = {
    "Loss (nats/token)": "learner/loss",
    "Loss on held-out images (nats/token)": VALIDATION,
    "Gradient norm": "learner/grad_norm",
    "Learning rate": "learner/lr",
}
"""Metrics by the title of their chart."""


def write_supervised_report(
    run: RunFolder, summary: Mapping[str, Any], *, path: Path | None = None, remarks: Sequence[str] = ()
) -> Path:
    """Write the page, by default to `report/index.html`. remarks: as in `write_page`."""
    metrics = run.metrics()
    return write_page(
        path or run.report / "index.html",
        "supervised.html",
        remarks=remarks,
        name=run.path.resolve().name,
        summary=summary,
        steps=len(metrics),
        lowest=min((line[VALIDATION] for line in metrics if VALIDATION in line), default=None),
        config=(run.path / "config.yaml").read_text(encoding="utf-8"),
        charts=[chart for title, name in CURVES.items() if (chart := _chart(title, name, metrics))],
    )


def _chart(title: str, name: str, metrics: Sequence[Mapping[str, float]]) -> str | None:
    """The curve of a metric over the steps that have it; None where none has."""
    lines = [line for line in metrics if name in line]
    if not lines:
        return None
    return charts.curves(title, [int(line["step"]) for line in lines], {name: [line[name] for line in lines]})
