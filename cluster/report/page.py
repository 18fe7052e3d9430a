"""The page: figures before and after, curves, times, and held-out samples side by side."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from cluster.comparison import records_of
from cluster.evaluation import FIGURES
from cluster.report import charts
from cluster.run_folder import RunFolder
from umrg.atomic import written_aside
from umrg.masks import decode_rle
from umrg.pictures import Picture, overlay
from umrg.sample import Sample

CARDS = 36
SIDE = 300
_TEMPLATE = Path(__file__).with_name("page.html")
_TITLES = {"dice": "Dice", "iou": "box IoU", "pdice": "pDice", "well_formed": "well-formed"}


def write_report(run: RunFolder, held_out: Sequence[Sample]) -> Path:
    """Write `report/index.html`, from what lies in the run folder and the held-out rows."""
    metrics = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    page = jinja2.Template(_TEMPLATE.read_text(), autoescape=True, undefined=jinja2.StrictUndefined).render(
        name=run.path.name,
        summary=run.read_json("summary.json"),
        config=(run.path / "config.yaml").read_text(),
        titles=_TITLES,
        charts=all_charts(metrics),
        seconds=run.read_json("summary.json")["seconds"],
        cards=cards(run, held_out),
        count=len(held_out),
    )
    with written_aside(run.report / "index.html") as aside:
        aside.write_text(page)
    return run.report / "index.html"


def all_charts(metrics: Sequence[Mapping[str, float]]) -> list[str]:
    """The curves of a run's steps."""
    if not metrics:
        return []
    steps = [int(line["step"]) for line in metrics]

    def series(prefix: str, names: Sequence[str]) -> dict[str, list[float]]:
        return {name: [line[f"{prefix}/{name}"] for line in metrics] for name in names}

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
    rows = [sample for sample in held_out if sample.id in after]
    chosen = rows[:: max(1, len(rows) // CARDS)][:CARDS]
    return [
        {
            "query": sample.query,
            "what": f"{sample.modality} · {sample.category}",
            "id": sample.id,
            "answers": [
                _answer(name, sample, records[sample.id][0])
                for name, records in (("before", before), ("after", after))
                if sample.id in records
            ],
        }
        for sample in chosen
    ]


def _answer(name: str, sample: Sample, record: Mapping[str, Any]) -> dict[str, Any]:
    points = record["points"]
    picture = overlay(
        sample.image(),
        mask=decode_rle(record["mask"]) if record["mask"] else None,
        box=tuple(record["box"]) if record["box"] else None,
        points=(tuple(points[0]), tuple(points[1])) if points else None,
        reference_mask=sample.mask(),
        reference_box=sample.box,
        reference_points=sample.points,
        long_side=SIDE,
    )
    return {
        "name": name,
        "picture": as_data_url(picture),
        "reasoning": record["reasoning"] or record["completion"],
        "metrics": {_TITLES[figure]: record["metrics"][figure] for figure in FIGURES},
        "reward": record["reward"],
    }


def as_data_url(picture: Picture) -> str:
    """A picture as a WebP data URL."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
