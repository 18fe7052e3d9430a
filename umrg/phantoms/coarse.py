"""Coarse annotations as clinics have them: boxes drawn too loosely and off the middle, points set roughly."""

from collections.abc import Sequence

import numpy as np

Box = tuple[int, int, int, int]
Point = tuple[int, int]

# All as shares of the exact box's side along the axis. How far each edge is drawn outward: mean and standard
# deviation, within bounds.
LOOSENING, SPREAD, BOUNDS = 0.22, 0.1, (0.02, 0.5)
# Standard deviation of the whole box's place, and of each point's.
DISPLACEMENT = 0.12
JITTER = 0.12


def loosen_box(box: Box, width: int, height: int, rng: np.random.Generator) -> Box:
    """Move each edge of a box (XYXY, inclusive, original pixels) outward, then all together, clipped to the image."""
    sides = np.array([box[2] - box[0] + 1, box[3] - box[1] + 1] * 2)
    outward = np.clip(rng.normal(LOOSENING, SPREAD, 4), *BOUNDS) * (-1, -1, 1, 1)
    aside = np.tile(rng.normal(0, DISPLACEMENT, 2).clip(-2 * DISPLACEMENT, 2 * DISPLACEMENT), 2)
    left, top, right, bottom = np.rint(np.array(box) + (outward + aside) * sides).astype(int).tolist()
    return max(left, 0), max(top, 0), min(right, width - 1), min(bottom, height - 1)


def jitter_points(
    points: Sequence[Point], box: Box, width: int, height: int, rng: np.random.Generator
) -> tuple[Point, ...]:
    """Displace points (XY, original pixels) by shares of the sides of the exact box, clipped to the image."""
    sides = (box[2] - box[0] + 1, box[3] - box[1] + 1)
    moved = np.rint(np.array(points) + rng.normal(0, JITTER, (len(points), 2)) * sides).astype(int)
    return tuple((int(x), int(y)) for x, y in np.clip(moved, 0, (width - 1, height - 1)))
