"""Rewards and Dice compared with plain loops: `python -m bench.rewards`.

completions_per_s: completions per second on one core, parsed and scored with the preset `hard`. The plain loop computes
    the same eight terms with regular expressions and small numpy arrays, without optimisation.
dice16_ms: milliseconds for the Dice of 16 masks of 840x840 against one reference. The plain loop sums boolean arrays.

Both measure CPU time and take the fastest of several rounds, so that other load on the machine matters little.
"""

import json
import math
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.machine import processor
from rewards.case import Reference
from rewards.scoring import Scorer
from umrg.answers import format_answer
from umrg.frames import Box, PointPair, Size
from umrg.metrics import mask_dice

ROUNDS = 7
THINK = (
    "The question alludes to the organ that clears the blood and is replaced by dialysis. In this axial CT the "
    "candidates lie beside the spine. The bean-shaped structure on the left of the image enhances evenly, has a smooth "
    "outline and a bright rim, and is set apart from the liver by a thin dark line. The vessels in front of it run "
    "towards its hilum, which opens to the middle. Its upper pole reaches the lower edge of the spleen, its lower pole "
    "ends above the iliac crest. Neither the muscle behind it nor the bowel before it has that shape, so this is it."
)


def cases(count: int) -> list[tuple[str, Reference]]:
    """Completions of about 850 characters, whose boxes and points are off by about 5 % of the image, each with its
    reference."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        x, y, width, height = rng.integers((0, 0, 60, 60), (500, 500, 300, 300)).tolist()
        box: Box = (x, y, x + width, y + height)
        points: PointPair = ((x + width / 4, y + height / 3), (x + width / 1.5, y + height / 2))
        shift = rng.normal(0, 40, size=8)
        x1, x2 = sorted((box[0] + shift[0], box[2] + shift[2]))
        y1, y2 = sorted((box[1] + shift[1], box[3] + shift[3]))
        (ax, ay), (bx, by) = points
        guess = ((ax + shift[4], ay + shift[5]), (bx + shift[6], by + shift[7]))
        completion = format_answer(box=(x1, y1, x2, y2), points=guess, think=THINK)
        found.append((completion, Reference(box=box, points=points, size=Size(840, 840))))
    return found


def plain_reward(completion: str, reference: Reference) -> float:
    """The published `hard` reward of a well-formed completion, in straightforward numpy."""
    think = re.search(r"<think>(.*?)</think>", completion, re.DOTALL)
    block = re.search(r"<answer>(.*?)</answer>", completion, re.DOTALL)
    assert think and think.group(1).strip() and block
    fields = json.loads(block.group(1).replace("'", '"'))
    box, target = np.array(fields["bbox"], dtype=float), np.array(reference.box, dtype=float)
    pair = np.array([fields["points_1"], fields["points_2"]], dtype=float)
    aims = np.array(reference.points, dtype=float)
    position, area = _validity(aims, box), _area_validity(box, target)
    inside, spread = _validity(pair, target), 1.0 if np.linalg.norm(pair[0] - pair[1]) > 10 else 0.5
    boxes = [_damped(value, position, area) for value in _box_values(box, target)]
    points = [_damped(value, inside, spread) for value in _point_values(pair, aims, target)]
    return 2.0 + sum(boxes) + sum(points)


def _box_values(box: NDArray[Any], target: NDArray[Any]) -> list[float]:
    overlap = np.prod(np.clip(np.minimum(box[2:], target[2:]) - np.maximum(box[:2], target[:2]), 0, None))
    sides, aims = box[2:] - box[:2], target[2:] - target[:2]
    iou = float(overlap) / (np.prod(sides) + np.prod(aims) - overlap)
    align = min(2.0, np.mean(np.abs(box - target)) / np.linalg.norm(aims))
    area = np.log(np.prod(sides) / np.prod(aims))
    aspect = np.log((sides[0] / sides[1]) / (aims[0] / aims[1]))
    return [_slog(iou), _sexp(align, 1.0), _sexp(min(1.0, np.hypot(area, aspect)), 0.5)]


def _point_values(pair: NDArray[Any], aims: NDArray[Any], target: NDArray[Any]) -> list[float]:
    (ca, ra), (cb, rb) = ((p.mean(axis=0), np.linalg.norm(p[0] - p[1]) / 2) for p in (pair, aims))
    distance = np.linalg.norm(ca - cb)
    # Outside [-1, 1] if the circles are disjoint or one contains the other; the clipped angles then give an overlap of
    # 0, or the area of the smaller one.
    a, b = np.arccos(
        np.clip([(distance**2 + r * r - s * s) / (2 * distance * r) for r, s in ((ra, rb), (rb, ra))], -1, 1)
    )
    lens = ra**2 * (a - np.sin(2 * a) / 2) + rb**2 * (b - np.sin(2 * b) / 2)
    union = np.pi * ra**2 + np.pi * rb**2 - lens
    error = min(np.mean(np.abs(pair - aims)), np.mean(np.abs(pair - aims[::-1])))
    align = min(2.0, error / np.linalg.norm(target[2:] - target[:2]))
    directions = [(p[1] - p[0]) / np.linalg.norm(p[1] - p[0]) for p in (pair, aims)]
    return [_slog(float(2 * lens / union)), _sexp(align, 1.0), _slog(abs(np.dot(*directions)))]


def _validity(points: NDArray[Any], box: NDArray[Any]) -> float:
    return float(np.prod([1.0 if np.all(box[:2] <= p) and np.all(p <= box[2:]) else 0.5 for p in points]))


def _area_validity(box: NDArray[Any], target: NDArray[Any]) -> float:
    return 1.0 if 0.5 < np.prod(box[2:] - box[:2]) / np.prod(target[2:] - target[:2]) < 2.0 else 0.5


def _slog(value: float) -> float:
    return float(0.9 * np.log(3 * value + 1) / np.log(4) + 0.1)


def _sexp(value: float, centre: float) -> float:
    low, here, high = (1 / (1 + np.exp(3 * (v - centre))) for v in (2.0, value, 0.0))
    return float(0.9 * (here - low) / (high - low) + 0.1)


def _damped(value: float, first: float, second: float) -> float:
    return round(float(np.clip(value * (0.7 + 0.3 * (first + second) / 2), 0, 1)), 4)


def ellipses(count: int) -> NDArray[np.bool_]:
    """Masks bool [count, 840, 840] of ellipses near the centre, each about 5 % of the image."""
    rng = np.random.default_rng(1)
    y, x = np.ogrid[:840, :840]
    centres, radii = rng.normal(420, 30, size=(count, 2)), rng.uniform(80, 140, size=(count, 2))
    return np.stack(
        [((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 < 1 for (cx, cy), (rx, ry) in zip(centres, radii, strict=True)]
    )


def plain_dice(masks: NDArray[np.bool_], reference: NDArray[np.bool_]) -> list[float]:
    return [float(2 * (mask & reference).sum() / (mask.sum() + reference.sum())) for mask in masks]


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds of the fastest of several rounds."""
    best = math.inf
    for _ in range(ROUNDS):
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
    return best


def compare_rewards(count: int) -> tuple[float, float]:
    """Completions per second, ours and the plain loop's, after a check that both compute the same rewards."""
    given, scorer = cases(count), Scorer.of_preset("hard")
    ours = [scorer.score(scorer.read(text), reference).total for text, reference in given]
    plain = [plain_reward(text, reference) for text, reference in given]
    assert np.allclose(ours, plain, atol=1e-3), "the plain loop computes another reward"
    fast = seconds(lambda: [scorer.score(scorer.read(text), reference).total for text, reference in given])
    slow = seconds(lambda: [plain_reward(text, reference) for text, reference in given])
    return count / fast, count / slow


def compare_dice() -> tuple[float, float]:
    """Milliseconds for 16 masks, ours and the plain loop's, after a check that both compute the same."""
    reference, *rest = ellipses(17)
    masks = np.stack(rest)
    assert np.allclose([mask_dice(mask, reference) for mask in masks], plain_dice(masks, reference))
    fast = seconds(lambda: [mask_dice(mask, reference) for mask in masks])
    slow = seconds(lambda: plain_dice(masks, reference))
    return 1000 * fast, 1000 * slow


def table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def main() -> None:
    rate, plain_rate = compare_rewards(2000)
    dice, plain = compare_dice()
    print(
        table(
            [
                ("", "ours", "plain loop", "ratio"),
                ("completions/s, hard, parsed", f"{rate:,.0f}", f"{plain_rate:,.0f}", f"{rate / plain_rate:.1f}x"),
                ("ms for Dice of 16 masks 840x840", f"{dice:.2f}", f"{plain:.2f}", f"{plain / dice:.1f}x"),
            ]
        )
    )
    figures = {
        "processor": processor(),
        "completions_per_s": round(rate),
        "completions_per_s_ratio": round(rate / plain_rate, 2),
        "dice16_ms": round(dice, 3),
        "dice16_ratio": round(plain / dice, 2),
    }
    print(figures["processor"])
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
