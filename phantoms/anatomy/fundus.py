"""Fundus photography: the retina, seen through the pupil."""

import numpy as np

from phantoms import looks
from phantoms.canvas import Canvas
from phantoms.shapes import Pose, blob, curve, ellipse, rotate

# The optic disc is on the left and the macula near the centre; vessels arch from the disc around the macula.
ARCADES = [
    [(-.42, 0), (-.32, -.26), (-.06, -.46), (.34, -.48), (.74, -.30)],
    [(-.42, 0), (-.32, .26), (-.06, .46), (.34, .50), (.74, .30)],
    [(-.42, 0), (-.54, -.28), (-.68, -.52), (-.72, -.78)],
    [(-.42, 0), (-.54, .28), (-.68, .52), (-.72, .78)],
    [(-.42, 0), (-.66, -.05), (-.92, -.10)],
]  # fmt: skip


def draw(rng: np.random.Generator, size: int) -> Canvas:
    """Paint optic disc, macula and vessels on a red background, often with a haemorrhage or an exudate."""
    pose = Pose.sample(rng, size, zoom=(0.92, 1.22), shift=(0.18, 0.18), turn=22, mirror=0.3)
    ground = np.array([0.80, 0.36, 0.14]) * rng.uniform(0.85, 1.1)
    canvas = Canvas(size, pose, ground.astype(np.float32))
    canvas.image += (looks.smooth_noise(rng, size, 10) * np.float32(0.025))[..., None]
    macula = np.array([0.26, 0.04]) + rng.normal(0, 0.03, 2)
    spot = (float(macula[0]), float(macula[1]))
    canvas.paint(ellipse(spot, (0.34, 0.32)), (0.62, 0.22, 0.09), soft=0.08, opacity=0.7)
    radius = rng.uniform(0.17, 0.23)
    canvas.paint(ellipse(spot, (radius, radius)), (0.30, 0.07, 0.04), name="macula", soft=0.03)
    _vessels(canvas, rng)
    _disc(canvas, rng)
    _lesions(canvas, rng)
    canvas.image *= np.clip(1.12 - 0.45 * looks.radial(size) ** 2, 0, None)[..., None]
    canvas.image = looks.grain(rng, looks.soften(canvas.image, 0.6 * size / 224), 0.012)
    canvas.crop(looks.radial(size) < 0.97)
    return canvas


def _vessels(canvas: Canvas, rng: np.random.Generator) -> None:
    for knots in ARCADES:
        for tone, width, sway in (((0.46, 0.06, 0.05), 0.038, 0.02), ((0.66, 0.14, 0.08), 0.024, 0.05)):
            path = np.array(knots) + np.linspace(0, 1, len(knots))[:, None] * rng.normal(0, sway, (len(knots), 2))
            canvas.line(curve(path), tone, width=width, opacity=0.85)
            for _ in range(3):
                knot = int(rng.integers(1, len(path)))
                ahead = rotate(path[knot] - path[knot - 1], rng.choice((-1, 1)) * rng.uniform(25, 60))
                twig = curve([path[knot], path[knot] + ahead * 0.5 + rng.normal(0, 0.02, 2), path[knot] + ahead])
                canvas.line(twig, tone, width=width * 0.45, opacity=0.7)


def _disc(canvas: Canvas, rng: np.random.Generator) -> None:
    radii = rng.uniform((0.17, 0.19), (0.22, 0.25))
    disc = ellipse((-0.42, 0.0), (radii[0], radii[1]))
    canvas.paint(disc, (0.98, 0.80, 0.46), name="optic disc", soft=0.012)
    cup = (disc - (-0.42, 0)) * rng.uniform(0.35, 0.7) + (-0.40, 0)
    canvas.paint(cup, (1.0, 0.93, 0.70), soft=0.03, hides=False)
    for knots in ARCADES[:4]:
        canvas.line(curve(knots)[:7], (0.50, 0.08, 0.05), width=0.03, opacity=0.75)


def _lesions(canvas: Canvas, rng: np.random.Generator) -> None:
    angles = np.radians(rng.uniform(20, 120, 2)) * (rng.permutation([-1, 1]))
    bleed, exudate = np.array([0.26, 0.04]) + np.stack([np.cos(angles), np.sin(angles)], 1) * rng.uniform(
        0.40, 0.56, (2, 1)
    )
    if rng.random() < 0.65:
        outline = blob(
            rng,
            (bleed[0], bleed[1]),
            (rng.uniform(0.17, 0.25), rng.uniform(0.14, 0.20)),
            roughness=0.14,
            lobes=8,
        )
        canvas.paint(outline, (0.40, 0.01, 0.03), name="retinal haemorrhage", soft=0.01)
    if rng.random() < 0.65:
        radius = rng.uniform(0.15, 0.22)
        outline = blob(rng, (exudate[0], exudate[1]), (radius, radius * 0.8), roughness=0.10, lobes=12)
        patches = looks.smooth_noise(rng, canvas.size, 34) * np.float32(0.07)
        canvas.paint(outline, (0.96, 0.84, 0.34), name="hard exudate", texture=patches, soft=0.015)
        spots = exudate + rng.normal(0, radius * 1.1, (12, 2))
        canvas.dots(spots, rng.uniform(0.008, 0.02, 12).tolist(), (0.96, 0.86, 0.36), opacity=0.8)
