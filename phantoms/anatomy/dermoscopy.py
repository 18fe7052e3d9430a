"""Dermoscopy: magnified skin, seen through a contact lens."""

import numpy as np

from phantoms import looks
from phantoms.canvas import Canvas
from phantoms.shapes import XY, Pose, blob, curve, scatter

LESIONS = ("melanoma", "naevus", "haemangioma", "seborrhoeic keratosis")


def draw(rng: np.random.Generator, size: int) -> Canvas:
    """Paint up to four lesions of different kinds on skin, often with hairs, a ruler or a round field of view."""
    pose = Pose.sample(rng, size, zoom=(0.85, 1.2), shift=(0.1, 0.1), turn=180)
    skin = rng.uniform((0.80, 0.60, 0.50), (0.96, 0.78, 0.68)).astype(np.float32)
    canvas = Canvas(size, pose, skin)
    canvas.image += (looks.smooth_noise(rng, size, 5) * np.float32(0.025))[..., None]
    canvas.image += (looks.smooth_noise(rng, size, size // 4) * np.float32(0.02))[..., None]
    kinds = rng.permutation(LESIONS)[: int(rng.integers(2, 5))].tolist()
    radii = rng.uniform(0.32, 0.50, len(kinds)).tolist()
    for kind, place, radius in zip(kinds, scatter(rng, radii, reach=(0.58, 0.58), gap=0.02), radii, strict=True):
        if place is not None:
            _PAINTERS[kind](canvas, rng, place, radius)
    if rng.random() < 0.6:
        _hairs(canvas, rng)
    if rng.random() < 0.3:
        _ruler(canvas)
    canvas.image = looks.grain(rng, looks.vignette(looks.soften(canvas.image, 0.7 * size / 224), 0.40), 0.012)
    if rng.random() < 0.4:
        canvas.crop(looks.radial(size) < 1.12)
    return canvas


def _melanoma(canvas: Canvas, rng: np.random.Generator, place: XY, radius: float) -> None:
    outline = blob(rng, place, (radius, radius * rng.uniform(0.65, 0.95)), roughness=0.14, lobes=10)
    mottle = looks.smooth_noise(rng, canvas.size, 14) * np.float32(0.06)
    whole = canvas.paint(outline, (0.22, 0.12, 0.10), name="melanoma", soft=0.012, texture=mottle)
    patches = (((0.06, 0.04, 0.05), 0.45), ((0.42, 0.48, 0.60), 0.32), ((0.48, 0.22, 0.14), 0.30))
    for tone, share in patches:
        x, y = np.array(place) + rng.normal(0, radius * 0.35, 2)
        patch = blob(rng, (x, y), (radius * share, radius * share * 0.8), roughness=0.2)
        canvas.paint(patch, tone, soft=0.04, within=whole, hides=False)


def _naevus(canvas: Canvas, rng: np.random.Generator, place: XY, radius: float) -> None:
    radius *= 0.85
    outline = blob(rng, place, (radius, radius * rng.uniform(0.85, 1.0)), roughness=0.03)
    brown = (0.60, 0.37, 0.24)
    whole = canvas.paint(outline, brown, name="naevus", soft=0.02)
    # The pigment network: two crossing gratings, distorted by smooth noise.
    x, y = canvas.anatomy_grid()
    warp = looks.smooth_noise(rng, canvas.size, 12)
    net = np.maximum(np.sin(66 * x + 16 * y + warp), np.sin(66 * y - 16 * x + warp)).astype(np.float32)
    canvas.image -= (np.float32(0.09) * whole * np.clip(net - 0.3, 0, 1))[..., None]
    canvas.paint((outline - place) * 0.5 + place, (0.48, 0.27, 0.17), soft=0.08, opacity=0.7, hides=False)


def _haemangioma(canvas: Canvas, rng: np.random.Generator, place: XY, radius: float) -> None:
    radius *= 0.85
    outline = blob(rng, place, (radius, radius * rng.uniform(0.8, 1.0)), roughness=0.06)
    whole = canvas.paint(outline, (0.86, 0.40, 0.40), name="haemangioma", soft=0.015)
    lakes = np.array(place) + rng.uniform(-1, 1, (26, 2)) * radius * 0.75
    for x, y in lakes.tolist():
        lake = blob(rng, (x, y), (radius * 0.18, radius * 0.15), roughness=0.08)
        canvas.paint(lake, (0.70, 0.06, 0.14), within=whole, soft=0.008, hides=False)


def _keratosis(canvas: Canvas, rng: np.random.Generator, place: XY, radius: float) -> None:
    outline = blob(rng, place, (radius, radius * rng.uniform(0.7, 1.0)), roughness=0.07, lobes=9)
    wax = looks.smooth_noise(rng, canvas.size, 40) * np.float32(0.05)
    canvas.paint(outline, (0.70, 0.58, 0.38), name="seborrhoeic keratosis", soft=0.006, texture=wax)
    for tone, count in (((0.96, 0.93, 0.78), 16), ((0.34, 0.22, 0.12), 12)):
        spread = np.array(place) + rng.uniform(-0.62, 0.62, (count, 2)) * radius
        canvas.dots(spread, rng.uniform(0.018, 0.034, count).tolist(), tone, opacity=0.9)


def _hairs(canvas: Canvas, rng: np.random.Generator) -> None:
    for _ in range(int(rng.integers(3, 9))):
        start = rng.uniform(-1.2, 1.2, 2)
        way = rng.uniform(0, 2 * np.pi)
        end = start + np.array([np.cos(way), np.sin(way)]) * rng.uniform(0.7, 1.4)
        middle = (start + end) / 2 + rng.normal(0, 0.10, 2)
        canvas.line(curve([start, middle, end]), (0.14, 0.09, 0.07), width=0.014, opacity=0.85)


def _ruler(canvas: Canvas) -> None:
    for tick in np.linspace(-0.9, 0.9, 19):
        height = 0.12 if abs(tick * 10 % 5) < 0.5 else 0.07
        canvas.line(np.array([(tick, 0.98), (tick, 0.98 - height)]), (0.1, 0.1, 0.12), width=0.012, opacity=0.8)


_PAINTERS = {
    "melanoma": _melanoma,
    "naevus": _naevus,
    "haemangioma": _haemangioma,
    "seborrhoeic keratosis": _keratosis,
}
