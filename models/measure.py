"""Evaluate the bundled models on held-out phantoms.

    python -m models.measure [--count 512] [--model models/tiny-reasoner] [--expert tiny] [--modality CT …]
                             [--phrasings seen|held_out]

Images and poses were not seen in training, and with `--phrasings held_out` neither were the queries. By default the
modalities are those that the tiny reasoner was trained on. The mean box of each structure, over other phantoms, is a
baseline that does not look at the image. Prints tables and finally one line of JSON.
"""

import argparse
import json
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from actors.experts.protocol import Embedding, Expert
from actors.experts.registry import load_expert
from models.build_tiny_reasoner import TRAINED_MODALITIES
from phantoms import rows
from reasoner.model import Reasoner, load_reasoner
from umrg.answers import Answer, parse_answer
from umrg.dataset import Dataset
from umrg.dataset_writer import write_rows
from umrg.frames import Box
from umrg.metrics import box_iou, mask_dice, pdice
from umrg.sample import Sample

HELD_OUT_SEED = 1_000_003
"""Far from the small seeds of training data."""
LOOSE = 0.2
BATCH = 32

Figures = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--model", type=Path, default=Path("models/tiny-reasoner"))
    parser.add_argument("--expert", default="tiny")
    parser.add_argument("--modality", nargs="+", default=list(TRAINED_MODALITIES))
    parser.add_argument("--phrasings", choices=["seen", "held_out"], default="seen")
    args = parser.parse_args()
    reasoner, expert = load_reasoner(args.model), load_expert(args.expert)
    samples = phantoms(args.count, HELD_OUT_SEED, args.modality, args.phrasings)
    found = measure(samples, reasoner, expert, mean_boxes(args.modality))
    _print(samples, found)
    summary = {name: round(float(np.mean(values)), 4) for name, values in found.items()}
    print(json.dumps({"count": len(samples), **summary}))


def phantoms(count: int, seed: int, modalities: Sequence[str], phrasings: Literal["seen", "held_out"]) -> list[Sample]:
    """Phantom samples, written to a file and read as any other dataset."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "phantoms.parquet"
        write_rows(path, rows(count, seed=seed, modalities=modalities, phrasings=phrasings))
        return list(Dataset.open(path))


def mean_boxes(modalities: Sequence[str], count: int = 4000) -> dict[str, Box]:
    """Mean exact box (XYXY) of each category, over phantoms of another seed."""
    boxes: dict[str, list[Box]] = defaultdict(list)
    for sample in phantoms(count, HELD_OUT_SEED + 1, modalities, "seen"):
        boxes[sample.category].append(sample.box)
    return {name: (*np.mean(several, axis=0).tolist(),) for name, several in boxes.items()}


def measure(
    samples: Sequence[Sample], reasoner: Reasoner, expert: Expert, means: dict[str, Box]
) -> dict[str, list[float]]:
    """Metrics by name, with one value per sample."""
    found: dict[str, list[float]] = defaultdict(list)
    for start in track(range(0, len(samples), BATCH), "measuring", console=Console(stderr=True)):
        batch = samples[start : start + BATCH]
        for sample, answer in zip(batch, greedy_answers(reasoner, batch), strict=True):
            embedding = expert.embed(sample.image())
            figures = {
                **expert_figures(sample, expert, embedding),
                **reasoner_figures(sample, answer, expert, embedding),
                "mean_box_iou": box_iou(means[sample.category], sample.box) if sample.category in means else 0.0,
            }
            for name, value in figures.items():
                found[name].append(value)
    return dict(found)


def greedy_answers(reasoner: Reasoner, samples: Sequence[Sample]) -> list[Answer]:
    """Answers by greedy decoding, in original pixels."""
    prompts = [reasoner.encode(sample.query, reasoner.encode_image(sample.image())) for sample in samples]
    texts = reasoner.generate(prompts, max_tokens=160)
    return [
        parse_answer(text).to_original(prompt.image.frames, reasoner.prompt.frame)
        for text, prompt in zip(texts, prompts, strict=True)
    ]


def expert_figures(sample: Sample, expert: Expert, embedding: Embedding) -> Figures:
    """Dice of the expert prompted with the reference: box and points, each alone, and boxes that are 20 % too loose."""
    reference, points = sample.mask(), np.array([sample.points], dtype=np.float64)
    box = np.array([sample.box], dtype=np.float64)
    loose = np.array([loosened(sample)], dtype=np.float64)
    prompts = {
        "expert_dice": (box, points),
        "expert_dice_box": (box, None),
        "expert_dice_points": (None, points),
        "expert_dice_loose": (loose, points),
        "expert_dice_loose_box": (loose, None),
    }
    return {
        name: mask_dice(expert.decode(embedding, boxes=boxes, points=pair).masks[0], reference)
        for name, (boxes, pair) in prompts.items()
    }


def loosened(sample: Sample) -> Box:
    """The reference box with each edge moved outward by 20 % of its side, within the image."""
    x1, y1, x2, y2 = sample.box
    dx, dy = LOOSE * (x2 - x1), LOOSE * (y2 - y1)
    right, bottom = sample.size.width - 1, sample.size.height - 1
    return max(0.0, x1 - dx), max(0.0, y1 - dy), min(right, x2 + dx), min(bottom, y2 + dy)


def reasoner_figures(sample: Sample, answer: Answer, expert: Expert, embedding: Embedding) -> Figures:
    """Well-formedness, box IoU, pDice and mask Dice of an answer; all are 0 for a malformed one."""
    if not answer.well_formed() or answer.box is None or answer.points is None:
        return {"well_formed": 0.0, "iou": 0.0, "pdice": 0.0, "dice": 0.0}
    decoded = expert.decode(embedding, boxes=np.array([answer.box]), points=np.array([answer.points]))
    return {
        "well_formed": 1.0,
        "iou": box_iou(answer.box, sample.box),
        "pdice": pdice(answer.points, sample.points),
        "dice": mask_dice(decoded.masks[0], sample.mask()),
    }


def _print(samples: Sequence[Sample], found: dict[str, list[float]]) -> None:
    console = Console(width=160)
    groups: dict[str, list[int]] = defaultdict(list)
    for i, sample in enumerate(samples):
        groups[sample.modality].append(i)
    groups["all"] = list(range(len(samples)))
    for title, names in (
        ("Expert: Dice given the reference", [name for name in found if name.startswith("expert")]),
        ("Reasoner: greedy answers", ["well_formed", "iou", "mean_box_iou", "pdice", "dice"]),
    ):
        table = Table(title=title, title_justify="left")
        table.add_column("modality")
        for name in ("n", *names):
            table.add_column(name.removeprefix("expert_"), justify="right")
        for group, indices in groups.items():
            means = (f"{np.mean([found[name][i] for i in indices]):.3f}" for name in names)
            table.add_row(group, str(len(indices)), *means)
        console.print(table)


if __name__ == "__main__":
    main()
