"""X-ray: a frontal view of the chest."""

import numpy as np

from phantoms import looks
from phantoms.canvas import Canvas, Mask
from phantoms.shapes import Pose, blob, curve, ellipse, spline, tube, vary

THORAX = [
    (-.24, -1.15), (.24, -1.15), (.30, -.86), (.74, -.76), (1.04, -.52), (1.02, -.10), (.90, .20),
    (.92, 1.2), (-.92, 1.2), (-.90, .20), (-1.02, -.10), (-1.04, -.52), (-.74, -.76), (-.30, -.86)
]  # fmt: skip
# The patient's right lung is on the viewer's left; the left lung is smaller because of the heart.
RIGHT_LUNG = [
    (-.34, -.74), (-.18, -.56), (-.14, -.20), (-.14, .10), (-.16, .38), (-.40, .36), (-.60, .42),
    (-.74, .54), (-.76, .20), (-.70, -.20), (-.56, -.58)
]  # fmt: skip
LEFT_LUNG = [
    (.34, -.74), (.18, -.56), (.15, -.28), (.20, -.08), (.42, .08), (.52, .36), (.64, .44),
    (.76, .58), (.76, .22), (.70, -.20), (.56, -.58)
]  # fmt: skip
HEART = [
    (-.08, -.16), (.08, -.28), (.20, -.20), (.30, -.04), (.48, .16), (.54, .36), (.40, .46),
    (.10, .48), (-.14, .44), (-.22, .24), (-.18, .02)
]  # fmt: skip


def draw(rng: np.random.Generator, size: int) -> Canvas:
    """Paint lungs, heart, trachea, ribs and clavicles, often with pneumonia or a pacemaker."""
    pose = Pose.sample(rng, size, zoom=(0.84, 1.18), shift=(0.30, 0.26), turn=16, mirror=0.2)
    canvas = Canvas(size, pose, 0.03)
    canvas.paint(spline(THORAX), 0.46, soft=0.02)
    right = canvas.paint(
        vary(rng, spline(RIGHT_LUNG), shift=0.03, jitter=0, turn=4), 0.14, name="right lung", soft=0.012
    )
    left = canvas.paint(vary(rng, spline(LEFT_LUNG), shift=0.03, jitter=0, turn=4), 0.14, name="left lung", soft=0.012)
    lungs = right | left
    canvas.image += lungs * looks.smooth_noise(rng, size, size // 8) * np.float32(0.02)
    _lung_vessels(canvas, rng)
    _pneumonia(canvas, rng, lungs)
    canvas.paint(tube([(0, -1.2), (0, 1.2)], 0.17), 0.60, soft=0.03, opacity=0.7, hides=False)
    _trachea(canvas, rng)
    canvas.paint(vary(rng, spline(HEART), stretch=0.18, jitter=0, turn=8), 0.74, name="heart", soft=0.015)
    _bones(canvas, rng)
    if rng.random() < 0.45:
        _pacemaker(canvas, rng)
    exposure = looks.smooth_noise(rng, size, 3) * np.float32(0.03)
    contrast = np.float32(rng.uniform(0.85, 1.15))
    blurred = looks.soften((canvas.image + exposure) * contrast, 0.7 * size / 224)
    canvas.image = looks.grain(rng, blurred, rng.uniform(0.012, 0.03))
    return canvas


def _lung_vessels(canvas: Canvas, rng: np.random.Generator) -> None:
    for side in (-1, 1):
        for angle in rng.uniform(-70, 80, 5):
            direction = np.array([side * np.cos(np.radians(angle)), np.sin(np.radians(angle))])
            root = np.array([side * 0.17, -0.12])
            knots = [
                root,
                root + direction * 0.2 + rng.normal(0, 0.02, 2),
                root + direction * rng.uniform(0.3, 0.42),
            ]
            canvas.line(curve(knots), 0.42, width=0.018, opacity=0.45)


def _pneumonia(canvas: Canvas, rng: np.random.Generator, lungs: Mask) -> None:
    if rng.random() < 0.35:
        return
    side = rng.choice((-1, 1))
    centre = (float(side * rng.uniform(0.46, 0.56)), float(rng.uniform(-0.42, 0.32)))
    radius = rng.uniform(0.20, 0.29)
    outline = blob(rng, centre, (radius * rng.uniform(0.7, 1.0), radius), roughness=0.14)
    patches = looks.smooth_noise(rng, canvas.size, 16) * np.float32(0.06)
    canvas.paint(outline, 0.62, name="pneumonia", soft=0.04, texture=patches, within=lungs, hides=False)


def _trachea(canvas: Canvas, rng: np.random.Generator) -> None:
    lean = float(rng.normal(0, 0.03))
    knots = [(0, -1.02), (lean, -0.75), (lean, -0.36)]
    canvas.paint(tube(knots, rng.uniform(0.17, 0.22)), 0.17, name="trachea", soft=0.008)
    for side in (-1, 1):
        canvas.paint(tube([(lean, -0.38), (side * 0.16, -0.20)], 0.075), 0.24, soft=0.01, hides=False)


def _bones(canvas: Canvas, rng: np.random.Generator) -> None:
    tone = float(rng.uniform(0.72, 0.85))
    for side in (-1, 1):
        for step in range(6):
            top = -0.70 + 0.19 * step
            reach = 0.58 + 0.06 * min(step, 4)
            back = [(side * 0.08, top), (side * reach * 0.6, top - 0.05), (side * reach, top + 0.12)]
            front = [(side * reach, top + 0.12), (side * reach * 0.75, top + 0.26), (side * 0.36, top + 0.38)]
            canvas.line(curve(back), tone, width=0.055, opacity=0.26)
            canvas.line(curve(front), tone, width=0.045, opacity=0.13)
        clavicle = [(side * 0.08, -0.62), (side * 0.34, -0.70), (side * 0.60, -0.80), (side * 0.82, -0.74)]
        canvas.line(curve(clavicle), 0.80, width=0.065, opacity=0.60)
        canvas.paint(ellipse((side * 0.92, -0.62), (0.12, 0.11)), 0.74, soft=0.02, opacity=0.7, hides=False)


def _pacemaker(canvas: Canvas, rng: np.random.Generator) -> None:
    side = float(rng.choice((-1, 1)))
    x, y = side * rng.uniform(0.42, 0.64), rng.uniform(-0.58, -0.30)
    lead = [(x, y), (side * 0.22, -0.66), (0.02, -0.42), (-0.02, 0.0), (0.22, 0.30)]
    canvas.line(curve(lead), 0.98, width=0.022)
    corners = np.array(
        [
            (-0.14, -0.12),
            (0.02, -0.14),
            (0.15, -0.12),
            (0.16, 0.02),
            (0.10, 0.13),
            (-0.08, 0.13),
            (-0.16, 0.03),
        ]
    )
    can = vary(rng, spline(corners) + np.array([x, y]), jitter=0, turn=40)
    middle = can.mean(axis=0)
    canvas.paint(can, 0.98, name="pacemaker")
    canvas.paint((can - middle) * 0.72 + middle, 0.84, hides=False)
    canvas.paint((can - middle) * (0.4, 0.3) + middle + (0, 0.03), 0.99, hides=False)
