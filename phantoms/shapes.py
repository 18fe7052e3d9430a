"""Outlines of anatomy in a normalised frame, and the pose that maps them into an image.

An outline is a closed curve, float64 [N, 2], XY in anatomy units: x to the right and y downwards from the scene's
centre (0, 0). With a zoom of 1, one unit is half of the image's side. Angles are in degrees, clockwise on screen.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

Outline = NDArray[np.float64]
XY = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Pose:
    """The position of the anatomy frame in the image."""

    centre: XY
    """Pixel XY of the frame's origin."""
    unit: float
    """Pixels per anatomy unit."""
    turn: float
    """Rotation in degrees."""
    mirrored: bool
    """Whether left and right are exchanged."""

    @classmethod
    def sample(
        cls,
        rng: np.random.Generator,
        size: int,
        *,
        zoom: tuple[float, float],
        shift: XY,
        turn: float,
        mirror: float = 0.5,
    ) -> Self:
        """Sample a pose uniformly.

        zoom: range of the zoom. shift: largest displacement along x and y, in half image sides. turn: largest rotation
        in degrees. mirror: probability of mirroring.
        """
        half = size / 2
        dx, dy = rng.uniform(-1, 1, 2)
        return cls(
            centre=(half * (1 + shift[0] * float(dx)), half * (1 + shift[1] * float(dy))),
            unit=half * float(rng.uniform(*zoom)),
            turn=float(rng.uniform(-turn, turn)),
            mirrored=bool(rng.random() < mirror),
        )

    def to_pixels(self, points: ArrayLike) -> Outline:
        """Convert anatomy XY [N, 2] to pixel XY [N, 2]."""
        flipped = np.asarray(points, dtype=np.float64) * ((-1.0 if self.mirrored else 1.0), 1.0)
        return rotate(flipped, self.turn) * self.unit + self.centre

    def to_anatomy(self, points: ArrayLike) -> Outline:
        """Convert pixel XY [N, 2] to anatomy XY [N, 2]."""
        upright = rotate((np.asarray(points, dtype=np.float64) - self.centre) / self.unit, -self.turn)
        return upright * ((-1.0 if self.mirrored else 1.0), 1.0)


def rotate(points: ArrayLike, angle: float) -> Outline:
    """Rotate points [N, 2] about the origin."""
    cosine, sine = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    turned: Outline = np.asarray(points, dtype=np.float64) @ np.array([[cosine, sine], [-sine, cosine]])
    return turned


def ellipse(centre: XY, radii: XY, angle: float = 0.0) -> Outline:
    """An ellipse with the given radii along its own axes."""
    theta = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    return rotate(np.stack([radii[0] * np.cos(theta), radii[1] * np.sin(theta)], axis=1), angle) + centre


def blob(
    rng: np.random.Generator,
    centre: XY,
    radii: XY,
    *,
    roughness: float = 0.12,
    lobes: int = 5,
    angle: float = 0.0,
) -> Outline:
    """An irregular ellipse, whose radius varies by a fraction of about `roughness` in harmonics 2 to `lobes`."""
    # Harmonic 1 is left out, because it would mostly displace the shape.
    theta = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    orders = np.arange(2, lobes + 1)[:, None]
    weights = rng.normal(0, roughness, (len(orders), 1)) / np.sqrt(orders)
    phases = rng.uniform(0, 2 * np.pi, (len(orders), 1))
    radius = np.clip(1 + (weights * np.cos(orders * theta + phases)).sum(axis=0), 0.4, 1.8)
    points = np.stack([radii[0] * radius * np.cos(theta), radii[1] * radius * np.sin(theta)], axis=1)
    return rotate(points, angle) + centre


def spline(knots: ArrayLike, steps: int = 6) -> Outline:
    """The closed Catmull-Rom curve through the knots [K, 2]."""
    knot = np.asarray(knots, dtype=np.float64)
    return _catmull_rom(np.roll(knot, 1, 0), knot, np.roll(knot, -1, 0), np.roll(knot, -2, 0), steps)


def curve(knots: ArrayLike, steps: int = 6) -> Outline:
    """The open Catmull-Rom curve through the knots [K, 2]."""
    knot = np.asarray(knots, dtype=np.float64)
    ends = np.concatenate([knot[:1], knot, knot[-1:]])
    inner = _catmull_rom(ends[:-3], ends[1:-2], ends[2:-1], ends[3:], steps)
    return np.concatenate([inner, knot[-1:]])


def _catmull_rom(before: Outline, start: Outline, end: Outline, after: Outline, steps: int) -> Outline:
    t = np.linspace(0, 1, steps, endpoint=False)[None, :, None]
    p0, p1, p2, p3 = (points[:, None, :] for points in (before, start, end, after))
    path = p1 + 0.5 * t * (p2 - p0 + t * (2 * p0 - 5 * p1 + 4 * p2 - p3 + t * (3 * (p1 - p2) + p3 - p0)))
    flat: Outline = path.reshape(-1, 2)
    return flat


def tube(knots: ArrayLike, widths: float | Sequence[float]) -> Outline:
    """A band along an open curve. widths: its full width, or several widths at equal steps from start to end."""
    line = curve(knots)
    given = np.atleast_1d(np.asarray(widths, dtype=np.float64))
    return ribbon(line, np.interp(np.linspace(0, 1, len(line)), np.linspace(0, 1, len(given)), given))


def ribbon(line: Outline, widths: float | NDArray[np.float64]) -> Outline:
    """A band along a polyline [N, 2]. widths: its full width, or one width per vertex."""
    half = np.broadcast_to(np.asarray(widths, dtype=np.float64), len(line))[:, None] / 2
    along = np.gradient(line, axis=0)
    normal = np.stack([-along[:, 1], along[:, 0]], axis=1) / (np.linalg.norm(along, axis=1, keepdims=True) + 1e-9)
    return np.concatenate([line + normal * half, (line - normal * half)[::-1]])


def vary(
    rng: np.random.Generator,
    points: ArrayLike,
    *,
    shift: float = 0.04,
    stretch: float = 0.15,
    turn: float = 10.0,
    jitter: float = 0.012,
) -> Outline:
    """Randomly move, scale, rotate and jitter points about their centre, so that no two organs are alike."""
    knot = np.asarray(points, dtype=np.float64)
    middle = knot.mean(axis=0)
    factors = rng.uniform(1 - stretch, 1 + stretch) * rng.uniform(1 - stretch / 3, 1 + stretch / 3, 2)
    own = rotate((knot - middle) * factors, float(rng.uniform(-turn, turn)))
    varied: Outline = own + middle + rng.uniform(-shift, shift, 2) + rng.normal(0, jitter, knot.shape)
    return varied


def scatter(
    rng: np.random.Generator, radii: Sequence[float], *, reach: XY, gap: float = 0.03, tries: int = 60
) -> list[XY | None]:
    """Centres within ±reach for discs of the given radii that do not overlap; None for a disc without room."""
    centres: list[XY | None] = []
    placed: list[tuple[float, float, float]] = []
    for radius in radii:
        found: XY | None = None
        for x, y in rng.uniform(-1, 1, (tries, 2)) * reach:
            if all(np.hypot(x - ox, y - oy) > radius + other + gap for ox, oy, other in placed):
                found = (float(x), float(y))
                placed.append((*found, radius))
                break
        centres.append(found)
    return centres
