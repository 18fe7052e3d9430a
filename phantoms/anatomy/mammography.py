"""Mammography: a mediolateral oblique view of one breast."""

import numpy as np

from phantoms import looks
from phantoms.canvas import Canvas, Mask
from phantoms.shapes import Pose, blob, curve, ellipse, spline, vary

# The chest wall is on the left, and the nipple points to the right.
BREAST = [
    (-1.4, -1.3), (-.56, -1.25), (-.36, -.84), (.08, -.56), (.44, -.24), (.60, .12), (.54, .44),
    (.24, .72), (-.26, .86), (-.70, .96), (-1.4, 1.1)
]  # fmt: skip
GLAND = [
    (-.52, -.30), (-.16, -.36), (.22, -.10), (.46, .14), (.24, .40), (-.16, .52), (-.50, .36),
    (-.60, .04)
]  # fmt: skip
MUSCLE = [
    (-1.4, -1.4), (-.36, -1.4), (-.50, -.90), (-.66, -.36), (-.82, .12), (-1.0, .44), (-1.4, .60)
]  # fmt: skip


def draw(rng: np.random.Generator, size: int) -> Canvas:
    """Paint glandular tissue in fat, pectoral muscle and nipple, often with a spiculated mass or a lymph node."""
    pose = Pose.sample(rng, size, zoom=(0.86, 1.15), shift=(0.24, 0.26), turn=14, mirror=0.3)
    canvas = Canvas(size, pose, 0.02)
    canvas.paint(spline(BREAST) * 1.02, 0.30)
    breast = canvas.paint(spline(BREAST), 0.22, soft=0.03)
    _fibres(canvas, rng, breast)
    nipple = np.array([0.60, 0.14]) + rng.normal(0, 0.02, 2)
    canvas.paint(blob(rng, (nipple[0], nipple[1]), (0.15, 0.12), roughness=0.05), 0.70, name="nipple", soft=0.02)
    muscle = vary(rng, spline(MUSCLE), shift=0.08, stretch=0.10, jitter=0, turn=8)
    chest = canvas.paint(muscle, 0.70, name="pectoral muscle", soft=0.02, within=breast)
    canvas.image += chest * looks.smooth_noise(rng, size, 6, 40) * np.float32(0.03)
    _node(canvas, rng, breast)
    _mass(canvas, rng, breast)
    canvas.image = looks.grain(rng, looks.soften(canvas.image, 0.5 * size / 224), rng.uniform(0.012, 0.03))
    return canvas


def _fibres(canvas: Canvas, rng: np.random.Generator, breast: Mask) -> None:
    density = np.float32(rng.uniform(0.06, 0.20))
    web = looks.smooth_noise(rng, canvas.size, 12) + looks.smooth_noise(rng, canvas.size, 36) * np.float32(0.7)
    gland = vary(rng, spline(GLAND), jitter=0)
    canvas.paint(gland, 0.30 + float(density), soft=0.08, texture=web * density * np.float32(0.6), within=breast)
    end = np.array([0.5, 0.15])
    for _ in range(9):
        start = rng.uniform((-0.7, -0.5), (-0.1, 0.6))
        path = curve(np.stack([start, (start + end) / 2 + rng.normal(0, 0.06, 2), end]))
        canvas.line(path, 0.62, width=0.014, opacity=0.35)


def _node(canvas: Canvas, rng: np.random.Generator, breast: Mask) -> None:
    if rng.random() < 0.4:
        return
    centre = rng.uniform((-0.62, -0.72), (-0.34, -0.42))
    outline = ellipse((centre[0], centre[1]), (rng.uniform(0.16, 0.21), rng.uniform(0.12, 0.15)), rng.uniform(20, 80))
    node = canvas.paint(outline, 0.92, name="lymph node", within=breast)
    canvas.paint((outline - centre) * 0.5 + centre + (0.03, 0), 0.45, within=node, hides=False)


def _mass(canvas: Canvas, rng: np.random.Generator, breast: Mask) -> None:
    if rng.random() < 0.2:
        return
    x, y = rng.uniform((-0.50, -0.22), (0.26, 0.48))
    radius = rng.uniform(0.14, 0.22)
    for angle in rng.uniform(0, 2 * np.pi, 14):
        tip = (
            x + np.cos(angle) * radius * rng.uniform(1.4, 2.1),
            y + np.sin(angle) * radius * rng.uniform(1.4, 2.1),
        )
        canvas.line(np.array([(x, y), tip]), 0.80, width=0.018, opacity=0.55)
    outline = blob(rng, (x, y), (radius, radius), roughness=0.10, lobes=9)
    canvas.paint(outline, 0.90, name="breast mass", within=breast, soft=0.015)
