"""Coarse annotations, like those from clinical routine: loose and displaced boxes, inaccurate points, all on a grid."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Box = tuple[int, int, int, int]
Point = tuple[int, int]

# All values are fractions of the exact box's side along the same axis. These are the mean, the standard deviation and
# the bounds of the distance by which each edge is moved outward.
LOOSENING, SPREAD, BOUNDS = 0.3, 0.1, (0.05, 0.6)
# Standard deviation of the displacement of the whole box, and of each point.
DISPLACEMENT = 0.25
JITTER = 0.12
# All coordinates are rounded to multiples of this many pixels, as if annotated on a thumbnail.
GRID = 10


def loosen_box(box: Box, width: int, height: int, rng: np.random.Generator) -> Box:
    """Move each edge of a box (XYXY, inclusive, original pixels) outward, displace the box, round it to the grid, and
    clip it to the image."""
    sides = np.array([box[2] - box[0] + 1, box[3] - box[1] + 1] * 2)
    outward = np.clip(rng.normal(LOOSENING, SPREAD, 4), *BOUNDS) * (-1, -1, 1, 1)
    aside = np.tile(rng.normal(0, DISPLACEMENT, 2).clip(-2 * DISPLACEMENT, 2 * DISPLACEMENT), 2)
    left, top, right, bottom = _on_grid(np.array(box) + (outward + aside) * sides).tolist()
    return max(left, 0), max(top, 0), min(right, width - 1), min(bottom, height - 1)


def jitter_points(
    points: Sequence[Point], box: Box, width: int, height: int, rng: np.random.Generator
) -> tuple[Point, ...]:
    """Displace points (XY, original pixels) by fractions of the exact box's sides, round them to the grid, and clip
    them to the image."""
    sides = (box[2] - box[0] + 1, box[3] - box[1] + 1)
    moved = _on_grid(np.array(points) + rng.normal(0, JITTER, (len(points), 2)) * sides)
    return tuple((int(x), int(y)) for x, y in np.clip(moved, 0, (width - 1, height - 1)))


def _on_grid(coordinates: NDArray[np.floating]) -> NDArray[np.int64]:
    return (np.rint(coordinates / GRID) * GRID).astype(np.int64)
