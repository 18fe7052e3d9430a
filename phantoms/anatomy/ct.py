"""CT: an axial slice of the upper abdomen in a soft-tissue window."""

import numpy as np

from phantoms import looks
from phantoms.canvas import Canvas, Mask
from phantoms.shapes import Pose, blob, curve, ellipse, spline, tube, vary

LIVER = [
    (-.80, -.06), (-.72, -.34), (-.42, -.52), (-.05, -.52), (.14, -.42), (-.04, -.28), (-.20, -.12),
    (-.28, .08), (-.42, .32), (-.62, .36), (-.76, .18)
]  # fmt: skip
STOMACH = [
    (.14, -.46), (.44, -.54), (.66, -.38), (.64, -.12), (.44, -.02), (.28, -.16), (.14, -.28)
]  # fmt: skip
SPLEEN = [(.84, -.04), (.80, .22), (.62, .44), (.46, .46), (.54, .26), (.58, .08), (.68, -.08)]  # fmt: skip
KIDNEY = [
    (.24, .18), (.30, .06), (.42, .04), (.50, .16), (.50, .32), (.42, .42), (.30, .38), (.26, .30),
    (.31, .24)
]  # fmt: skip
VERTEBRA = [
    (-.17, .26), (-.12, .14), (.12, .14), (.17, .26), (.13, .38), (.30, .50), (.16, .48), (.05, .54),
    (.0, .68), (-.05, .54), (-.16, .48), (-.30, .50), (-.13, .38)
]  # fmt: skip


def draw(rng: np.random.Generator, size: int) -> Canvas:
    """Paint a body wall with subcutaneous fat and ribs, the spine, and five organs in contrast-enhanced CT."""
    pose = Pose.sample(rng, size, zoom=(0.86, 1.24), shift=(0.30, 0.26), turn=20, mirror=0.2)
    canvas = Canvas(size, pose, 0.02)
    noise = looks.smooth_noise(rng, size, size // 5) * np.float32(0.022)
    # The patient table.
    canvas.line(np.array([(-1.3, .86), (-.6, .92), (.6, .92), (1.3, .86)]), 0.35, width=0.025)  # fmt: skip
    _body_wall(canvas, rng)
    _bowel(canvas, rng)
    liver = canvas.paint(vary(rng, spline(LIVER), jitter=0), rng.uniform(0.52, 0.60), name="liver", texture=noise)
    _liver_vessels(canvas, rng, liver)
    _liver_tumour(canvas, rng, liver)
    _stomach(canvas, rng)
    spleen = vary(rng, spline(SPLEEN) * 1.1 - (0.07, 0.02), jitter=0, turn=6)
    canvas.paint(spleen, rng.uniform(0.62, 0.68), name="spleen", texture=noise * 0.6)
    _kidney(canvas, rng)
    _spine(canvas, rng)
    # The inferior vena cava, which is not a target.
    canvas.paint(ellipse((-0.20, 0.04), (0.10, 0.08)), 0.66)
    aorta = rng.uniform((0.02, -0.02), (0.1, 0.03))
    radius = rng.uniform(0.115, 0.16)
    canvas.paint(ellipse((float(aorta[0]), float(aorta[1])), (radius, radius)), rng.uniform(0.86, 0.94), name="aorta")
    canvas.image = looks.grain(rng, looks.soften(canvas.image, 0.7 * size / 224), rng.uniform(0.02, 0.05))
    return canvas


def _body_wall(canvas: Canvas, rng: np.random.Generator) -> None:
    width, height = rng.uniform((0.98, 0.72), (1.06, 0.82))
    rim = rng.uniform(0.05, 0.12)
    canvas.paint(ellipse((0, 0.04), (width + rim, height + rim)), 0.20)
    canvas.paint(ellipse((0, 0.04), (width, height)), 0.42)
    canvas.paint(ellipse((0, 0.0), (width - 0.09, height - 0.12)), 0.19)
    for side in (-1, 1):
        canvas.paint(ellipse((side * 0.36, 0.60), (0.27, 0.15), side * -14), 0.43)
    for angle in np.radians([15, 48, 80, 110, 140, 172, 205, 240, 300, 335]) + rng.normal(0, 0.05, 10):
        spot = ((width - 0.05) * np.cos(angle), 0.02 + (height - 0.06) * np.sin(angle))
        canvas.paint(ellipse(spot, (0.085, 0.034), float(np.degrees(angle)) + 90), 0.95)


def _bowel(canvas: Canvas, rng: np.random.Generator) -> None:
    for x, y in [(0.05, -0.20), (0.22, -0.02), (-0.08, -0.36)]:
        centre = (x + float(rng.normal(0, 0.05)), y + float(rng.normal(0, 0.04)))
        canvas.paint(blob(rng, centre, (0.12, 0.09)), 0.40)
        canvas.paint(blob(rng, centre, (0.07, 0.05)), rng.uniform(0.1, 0.32))


def _liver_vessels(canvas: Canvas, rng: np.random.Generator, liver: Mask) -> None:
    # `line` cannot be clipped, so the pixels outside the liver are restored afterwards.
    before = canvas.image[~liver].copy()
    for x, y in rng.uniform((-0.72, -0.36), (-0.3, 0.16), (5, 2)).tolist():
        canvas.line(
            curve([(-0.20, -0.20), ((x - 0.2) / 2, (y - 0.2) / 2 - 0.03), (x, y)]),
            0.74,
            width=0.03,
            opacity=0.6,
        )
    canvas.image[~liver] = before


def _liver_tumour(canvas: Canvas, rng: np.random.Generator, liver: Mask) -> None:
    if rng.random() < 0.35:
        return
    centre = rng.uniform((-0.62, -0.34), (-0.30, 0.12))
    radius = rng.uniform(0.13, 0.21)
    outline = blob(rng, (centre[0], centre[1]), (radius, radius * rng.uniform(0.8, 1.1)), roughness=0.08)
    canvas.paint(outline, 0.30, name="liver tumour", within=liver, hides=False)
    canvas.paint((outline - centre) * 0.55 + centre, 0.20, within=liver, hides=False, soft=0.02)


def _stomach(canvas: Canvas, rng: np.random.Generator) -> None:
    wall = vary(rng, spline(STOMACH), jitter=0, turn=14)
    middle = wall.mean(axis=0)
    whole = canvas.paint(wall, 0.50, name="stomach")
    lumen = canvas.paint((wall - middle) * 0.82 + middle, 0.36, within=whole, hides=False)
    # The patient lies on the back, so gas rises to the front of the stomach, above a fluid level.
    _, y = canvas.anatomy_grid()
    canvas.fill(lumen & (y < middle[1] + rng.uniform(-0.10, 0.04)), 0.03, hides=False)


def _kidney(canvas: Canvas, rng: np.random.Generator) -> None:
    cortex = vary(rng, spline(KIDNEY) * 1.15 - (0.05, 0.03), jitter=0, turn=12)
    middle = cortex.mean(axis=0)
    whole = canvas.paint(cortex, 0.80, name="kidney")
    canvas.paint((cortex - middle) * 0.45 + middle - (0.03, 0), 0.45, within=whole, hides=False, soft=0.01)


def _spine(canvas: Canvas, rng: np.random.Generator) -> None:
    bone = canvas.paint(
        vary(rng, spline(VERTEBRA), jitter=0, shift=0.02, turn=4) * 1.1 - (0, 0.02), 0.97, name="vertebra"
    )
    canvas.paint(ellipse((0, 0.26), (0.11, 0.08)), 0.78, within=bone, hides=False, soft=0.02)
    canvas.paint(ellipse((0, 0.42), (0.07, 0.05)), 0.40, hides=False)
    for side in (-1, 1):
        canvas.paint(tube([(side * 0.2, 0.03), (side * 0.14, 0.14), (side * 0.12, 0.2)], 0.05), 0.45)
