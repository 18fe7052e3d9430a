"""Endoscopy: a view along the lumen of the large bowel."""

import numpy as np

from phantoms import looks
from phantoms.canvas import Canvas
from phantoms.shapes import XY, Pose, blob, curve, ellipse, scatter, tube

MUCOSA = np.array([0.86, 0.46, 0.38], dtype=np.float32)


def draw(rng: np.random.Generator, size: int) -> Canvas:
    """Paint a folded wall that darkens towards the lumen, with a polyp and often an ulcer and forceps around it."""
    pose = Pose.sample(rng, size, zoom=(0.80, 1.15), shift=(0.10, 0.10), turn=180)
    canvas = Canvas(size, pose, MUCOSA * rng.uniform((0.92, 0.85, 0.85), (1.06, 1.1, 1.1)).astype(np.float32))
    radii = [rng.uniform(0.26, 0.42), rng.uniform(0.24, 0.36), rng.uniform(0.20, 0.30)]
    lumen, polyp, ulcer = scatter(rng, radii, reach=(0.56, 0.56), gap=0.05)
    assert lumen is not None, "the first disc always finds a place"
    _wall(canvas, rng, lumen, radii[0])
    if ulcer is not None and rng.random() < 0.7:
        _ulcer(canvas, rng, ulcer, radii[2])
    if polyp is not None:
        _polyp(canvas, rng, polyp, radii[1])
    if rng.random() < 0.55:
        _forceps(canvas, rng, polyp or lumen)
    _highlights(canvas, rng)
    canvas.image = looks.grain(rng, looks.vignette(looks.soften(canvas.image, 0.6 * size / 224), 0.55), 0.015)
    # An octagonal field of view, as endoscopes display it.
    axis = np.abs(np.arange(size) - size / 2) / (size / 2)
    across, down = np.meshgrid(axis, axis)
    canvas.crop((across + down < 1.62) & (across < 0.97) & (down < 0.97))
    return canvas


def _wall(canvas: Canvas, rng: np.random.Generator, lumen: XY, radius: float) -> None:
    size = canvas.size
    column, row = canvas.pose.to_pixels([lumen])[0]
    distance = looks.radial(size, (float(column), float(row)))
    canvas.image *= np.clip(0.30 + 0.62 * distance, 0, 1.08)[..., None]
    canvas.image += (looks.smooth_noise(rng, size, 8) * np.float32(0.03))[..., None]
    # Evenly spaced rings of a tube, seen in perspective, appear at equal steps of the logarithm of the distance.
    reach = np.maximum(distance * size / (2 * canvas.pose.unit * radius), 0.5)
    phase = np.float32(rng.uniform(7, 10)) * np.log(reach) + looks.smooth_noise(rng, size, 5) * np.float32(0.6)
    crease = np.clip(np.cos(phase), 0, 1) ** 3
    crest = np.clip(np.cos(phase - 1.1), 0, 1)
    canvas.image *= (1 - np.float32(0.30) * crease + np.float32(0.10) * crest)[..., None]
    for _ in range(7):
        start = rng.uniform(-1, 1, 2)
        steps = np.cumsum(rng.normal(0, 0.14, (4, 2)), axis=0)
        canvas.line(curve(start + steps), (0.68, 0.14, 0.14), width=0.012, opacity=0.6)
    hole = blob(rng, lumen, (radius, radius * rng.uniform(0.75, 1.0)), roughness=0.07)
    canvas.paint(hole, (0.10, 0.02, 0.02), name="bowel lumen", soft=0.02)


def _polyp(canvas: Canvas, rng: np.random.Generator, place: XY, radius: float) -> None:
    outline = blob(rng, place, (radius, radius * rng.uniform(0.8, 1.0)), roughness=0.06)
    x, y = place
    canvas.paint(np.add(outline, (0.05, 0.06)), (0.24, 0.05, 0.05), soft=0.05, opacity=0.6, hides=False)
    bumps = looks.smooth_noise(rng, canvas.size, 30) * np.float32(0.03)
    canvas.paint(outline, (0.72, 0.22, 0.20), name="polyp", texture=bumps)
    canvas.paint((outline - place) * 0.78 + (x - 0.02, y - 0.03), (0.92, 0.42, 0.38), soft=0.07, hides=False)
    canvas.paint((outline - place) * 0.40 + (x - 0.04, y - 0.06), (1.0, 0.60, 0.56), soft=0.05, hides=False)
    canvas.paint(ellipse((x - radius * 0.3, y - radius * 0.4), (0.05, 0.03), 30), (1, 1, 1), soft=0.008, hides=False)


def _ulcer(canvas: Canvas, rng: np.random.Generator, place: XY, radius: float) -> None:
    outline = blob(
        rng,
        place,
        (radius, radius * rng.uniform(0.6, 0.9)),
        roughness=0.16,
        lobes=8,
        angle=rng.uniform(0, 180),
    )
    canvas.paint((outline - place) * 1.3 + place, (0.62, 0.10, 0.12), soft=0.03, opacity=0.8)
    slough = looks.smooth_noise(rng, canvas.size, 26) * np.float32(0.08)
    canvas.paint(outline, (0.93, 0.84, 0.66), name="ulcer", texture=slough, soft=0.015)


def _forceps(canvas: Canvas, rng: np.random.Generator, goal: XY) -> None:
    angle = rng.uniform(0, 2 * np.pi)
    entry = np.array([np.cos(angle), np.sin(angle)]) * 1.6
    tip = np.array(goal) + (entry - np.array(goal)) * rng.uniform(0.30, 0.45)
    joint = tip + (entry - tip) / np.linalg.norm(entry - tip) * 0.22
    side = np.array([-(entry - tip)[1], (entry - tip)[0]]) / np.linalg.norm(entry - tip)
    canvas.paint(tube([entry, joint], 0.13), (0.50, 0.55, 0.60), name="forceps")
    canvas.paint(tube([entry, joint], 0.05), (0.86, 0.90, 0.94), hides=False)
    for way in (-1, 1):
        jaw = tube([joint, (joint + tip) / 2 + side * way * 0.07, tip + side * way * 0.13], [0.06, 0.09, 0.05])
        canvas.paint(jaw, (0.72, 0.76, 0.80), name="forceps")


def _highlights(canvas: Canvas, rng: np.random.Generator) -> None:
    centres = rng.uniform(-1, 1, (9, 2))
    canvas.dots(centres, rng.uniform(0.008, 0.028, 9).tolist(), (1.0, 0.98, 0.95), opacity=0.85)
