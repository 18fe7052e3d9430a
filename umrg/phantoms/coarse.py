"""Coarse annotations as clinics have them: boxes drawn too loosely and off the middle, points set roughly."""

from collections.abc import Sequence

import numpy as np

Box = tuple[int, int, int, int]
Point = tuple[int, int]

# Each edge moves outward by a uniform share of the box's side across it.
LOOSENING = (0.05, 0.45)
# Then the whole box moves by up to this share of its side, either way along each axis.
DISPLACEMENT = 0.1
# Each point moves by up to this share of the exact box's side, either way along each axis.
JITTER = 0.25


def loosen_box(box: Box, width: int, height: int, rng: np.random.Generator) -> Box:
    """Move each edge of a box (XYXY, inclusive, original pixels) outward, then all together, clipped to the image."""
    sides = np.array([box[2] - box[0] + 1, box[3] - box[1] + 1] * 2)
    outward = rng.uniform(*LOOSENING, 4) * sides * (-1, -1, 1, 1)
    aside = np.tile(rng.uniform(-DISPLACEMENT, DISPLACEMENT, 2), 2) * sides
    left, top, right, bottom = np.rint(np.array(box) + outward + aside).astype(int).tolist()
    return max(left, 0), max(top, 0), min(right, width - 1), min(bottom, height - 1)


def jitter_points(
    points: Sequence[Point], box: Box, width: int, height: int, rng: np.random.Generator
) -> tuple[Point, ...]:
    """Displace points (XY, original pixels) by shares of the sides of the exact box, clipped to the image."""
    sides = (box[2] - box[0] + 1, box[3] - box[1] + 1)
    moved = np.rint(np.array(points) + rng.uniform(-JITTER, JITTER, (len(points), 2)) * sides).astype(int)
    return tuple((int(x), int(y)) for x, y in np.clip(moved, 0, (width - 1, height - 1)))
