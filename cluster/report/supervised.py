"""The page of a supervised run: the losses, and what the optimizer did. It is made of the run's folder as it is, at any
time."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.report import charts
from cluster.report.pages import write_page
from cluster.run_folder import RunFolder

VALIDATION = ("validation/loss", "validation_loss")
CURVES = {
    "Loss (nats/token)": ("learner/loss", "loss"),
    "Loss on held-out images (nats/token)": VALIDATION,
    "Gradient norm": ("learner/grad_norm", "grad_norm"),
    "Learning rate": ("learner/lr", "lr"),
}
"""The names of a metric, today's and that of older runs, by the title of its chart."""


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
        lowest=min((line[name] for line in metrics for name in VALIDATION if name in line), default=None),
        config=(run.path / "config.yaml").read_text(encoding="utf-8"),
        charts=[
            charts.curves(title, [int(step) for step, _ in points], {title: [value for _, value in points]})
            for title, names in CURVES.items()
            if (points := [(line["step"], line[name]) for line in metrics for name in names if name in line])
        ],
    )
