"""Coarse annotations as clinics have them: boxes too loose and off the middle, points set roughly, all on a grid."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Box = tuple[int, int, int, int]
Point = tuple[int, int]

# All as shares of the exact box's side along the axis. How far each edge is drawn outward: mean and standard
# deviation, within bounds.
LOOSENING, SPREAD, BOUNDS = 0.3, 0.1, (0.05, 0.6)
# Standard deviation of the whole box's place, and of each point's.
DISPLACEMENT = 0.25
JITTER = 0.12
# Whatever is annotated lies on multiples of so many pixels, as if drawn on a thumbnail.
GRID = 10


def loosen_box(box: Box, width: int, height: int, rng: np.random.Generator) -> Box:
    """Move each edge of a box (XYXY, inclusive, original pixels) outward, then all together, to the grid; clipped to
    the image."""
    sides = np.array([box[2] - box[0] + 1, box[3] - box[1] + 1] * 2)
    outward = np.clip(rng.normal(LOOSENING, SPREAD, 4), *BOUNDS) * (-1, -1, 1, 1)
    aside = np.tile(rng.normal(0, DISPLACEMENT, 2).clip(-2 * DISPLACEMENT, 2 * DISPLACEMENT), 2)
    left, top, right, bottom = _on_grid(np.array(box) + (outward + aside) * sides).tolist()
    return max(left, 0), max(top, 0), min(right, width - 1), min(bottom, height - 1)


def jitter_points(
    points: Sequence[Point], box: Box, width: int, height: int, rng: np.random.Generator
) -> tuple[Point, ...]:
    """Displace points (XY, original pixels) by shares of the sides of the exact box, to the grid; clipped to the
    image."""
    sides = (box[2] - box[0] + 1, box[3] - box[1] + 1)
    moved = _on_grid(np.array(points) + rng.normal(0, JITTER, (len(points), 2)) * sides)
    return tuple((int(x), int(y)) for x, y in np.clip(moved, 0, (width - 1, height - 1)))


def _on_grid(coordinates: NDArray[np.floating]) -> NDArray[np.int64]:
    return (np.rint(coordinates / GRID) * GRID).astype(np.int64)
