"""MRI of the head: a sagittal or axial slice, T1-weighted with contrast medium."""

import numpy as np

from phantoms import looks
from phantoms.canvas import Canvas, Mask
from phantoms.shapes import Outline, Pose, blob, curve, ellipse, spline, tube, vary

# Sagittal slice, facing left.
SCALP = [
    (-.30, -.84), (.20, -.90), (.68, -.66), (.88, -.20), (.78, .24), (.58, .52), (.54, .95),
    (.50, 1.4), (-.12, 1.4), (-.20, .98), (-.58, 1.0), (-.68, .82), (-.66, .62), (-.72, .50),
    (-.70, .40), (-.88, .34), (-.72, .02), (-.74, -.24), (-.62, -.60)
]  # fmt: skip
CRANIUM = [
    (-.26, -.76), (.20, -.81), (.62, -.58), (.79, -.18), (.72, .20), (.54, .44), (.32, .52),
    (.22, .66), (.06, .66), (.02, .40), (-.12, .18), (-.40, .12), (-.62, -.02), (-.66, -.24),
    (-.56, -.54)
]  # fmt: skip
CEREBRUM = [
    (-.24, -.70), (.20, -.75), (.58, -.53), (.73, -.16), (.66, .10), (.40, .10), (.20, .04),
    (.02, .12), (-.20, .10), (-.44, .04), (-.58, -.06), (-.60, -.26), (-.50, -.50)
]  # fmt: skip
CEREBELLUM = [(.22, .14), (.42, .13), (.60, .18), (.62, .32), (.48, .44), (.30, .44), (.22, .32)]  # fmt: skip
BRAINSTEM = [
    (.00, .04), (.16, .04), (.20, .20), (.19, .36), (.20, .56), (.20, .74), (.08, .74), (.09, .54),
    (.00, .42), (-.05, .30), (.02, .18)
]  # fmt: skip
CALLOSUM = [
    (-.30, -.02), (-.36, -.14), (-.26, -.26), (-.02, -.32), (.22, -.28), (.36, -.14), (.32, -.04)
]  # fmt: skip
VENTRICLE = [
    (-.26, -.06), (-.28, -.14), (-.18, -.20), (-.02, -.25), (.16, -.22), (.28, -.12), (.22, -.06),
    (.08, -.12), (-.08, -.12)
]  # fmt: skip
# Axial slice, facing up: each side of the midline has one lateral ventricle.
HORN = [
    (.05, -.08), (.08, -.26), (.17, -.38), (.22, -.30), (.16, -.12), (.15, .04), (.24, .22),
    (.30, .36), (.22, .38), (.12, .20), (.06, .06)
]  # fmt: skip


def draw(rng: np.random.Generator, size: int) -> Canvas:
    """Paint a sagittal slice with probability 0.6, else an axial one, often with an enhancing tumour."""
    # Only sagittal slices show cerebellum and brainstem.
    canvas = _sagittal(rng, size) if rng.random() < 0.6 else _axial(rng, size)
    coil = 1 + np.float32(0.16) * looks.smooth_noise(rng, size, 3)
    blurred = looks.soften(canvas.image * coil, 0.6 * size / 224)
    canvas.image = looks.rician(rng, blurred, rng.uniform(0.02, 0.045))
    return canvas


def _sagittal(rng: np.random.Generator, size: int) -> Canvas:
    canvas = Canvas(size, Pose.sample(rng, size, zoom=(0.84, 1.22), shift=(0.26, 0.24), turn=18, mirror=0.3), 0.0)
    canvas.paint(spline(SCALP), 0.66)
    canvas.paint(
        spline(np.array(SCALP) * 0.965 + (0.015, 0.01)),
        0.38,
        texture=looks.smooth_noise(rng, size, 20) * 0.05,
    )
    _face(canvas, rng)
    canvas.paint(spline(np.array(CRANIUM) * 1.05), 0.08)
    canvas.paint(spline(CRANIUM), 0.16)
    brain = canvas.paint(spline(CEREBRUM), 0.52)
    _sulci(canvas, rng, brain)
    canvas.paint(vary(rng, spline(CEREBELLUM), shift=0.02, jitter=0, turn=5), 0.62, name="cerebellum")
    _folia(canvas, canvas.masks["cerebellum"])
    canvas.paint(vary(rng, spline(BRAINSTEM), shift=0.01, jitter=0, turn=4, stretch=0.08), 0.80, name="brainstem")
    ventricle = spline(VENTRICLE)
    swelling = rng.uniform(1.0, 1.45)
    canvas.paint(
        (ventricle - (0, -0.16)) * (1.0, swelling) + (0, -0.16 + (swelling - 1) * 0.07),
        0.07,
        name="ventricle",
    )
    canvas.paint(tube(CALLOSUM, [0.09, 0.07, 0.06, 0.07, 0.10]), 0.86)
    canvas.paint(ellipse((0.03, -0.04), (0.13, 0.08)), 0.60)
    places = [(-.38, -.40), (.10, -.52), (.50, -.26), (-.46, -.10), (.52, -.02)]  # fmt: skip
    _tumour(canvas, rng, places, brain)
    return canvas


def _face(canvas: Canvas, rng: np.random.Generator) -> None:
    canvas.paint(spline([(-.66, .16), (-.40, .20), (-.14, .30), (-.20, .44), (-.60, .42)]), 0.06)  # fmt: skip
    canvas.paint(blob(rng, (-0.40, 0.68), (0.22, 0.15)), 0.48)
    throat = [(-.66, .52), (-.40, .47), (-.12, .52), (-.04, .80), (-.04, 1.2)]  # fmt: skip
    canvas.paint(tube(throat, 0.05), 0.04)
    for step in range(5):
        canvas.paint(ellipse((0.12 + step * 0.012, 0.80 + step * 0.14), (0.085, 0.055)), 0.50)
    canvas.paint(tube([(.22, .70), (.28, 1.0), (.32, 1.4)], 0.10), 0.12)  # fmt: skip
    canvas.paint(tube([(.20, .66), (.27, 1.0), (.31, 1.4)], 0.055), 0.66)  # fmt: skip


def _sulci(canvas: Canvas, rng: np.random.Generator, brain: Mask) -> None:
    x, y = canvas.anatomy_grid()
    folds = np.sin(19 * x + 3 * _warp(rng, canvas.size)) * np.sin(17 * y + 3 * _warp(rng, canvas.size))
    depth = np.clip((np.hypot(x / 0.68, (y + 0.2) / 0.56) - 0.45) * 2.2, 0, 1)
    canvas.image += brain * (0.15 * (1 - depth) - 0.26 * depth * np.clip(folds - 0.25, 0, 1))


def _warp(rng: np.random.Generator, size: int) -> looks.Field:
    return looks.smooth_noise(rng, size, 7) * np.float32(0.4)


def _folia(canvas: Canvas, cerebellum: Mask) -> None:
    x, y = canvas.anatomy_grid()
    leaves = np.sin(26 * np.arctan2(y - 0.28, x - 0.20) * 0.8) > 0.2
    canvas.image -= np.float32(0.26) * (cerebellum & leaves)


def _tumour(canvas: Canvas, rng: np.random.Generator, places: list[tuple[float, float]], brain: Mask) -> None:
    if rng.random() < 0.2:
        return
    x, y = places[int(rng.integers(len(places)))]
    radius = rng.uniform(0.15, 0.23)
    outline = blob(rng, (x, y), (radius, radius * rng.uniform(0.8, 1.2)), roughness=0.12, lobes=7)
    rim = looks.smooth_noise(rng, canvas.size, 26) * np.float32(0.07)
    canvas.paint((outline - (x, y)) * 1.5 + (x, y), 0.34, within=brain, soft=0.04, hides=False)
    canvas.paint(outline, 0.92, name="brain tumour", within=brain, texture=rim, soft=0.006)
    core = (outline - (x, y)) * rng.uniform(0.35, 0.6) + (x, y)
    canvas.paint(core, 0.24, within=brain, hides=False, soft=0.02)


def _axial(rng: np.random.Generator, size: int) -> Canvas:
    canvas = Canvas(size, Pose.sample(rng, size, zoom=(0.80, 1.15), shift=(0.26, 0.24), turn=30), 0.0)
    narrow = rng.uniform(0.72, 0.82)
    for scale, tone in ((1.0, 0.70), (0.955, 0.07), (0.89, 0.16)):
        canvas.paint(ellipse((0, 0), (narrow * scale, 0.96 * scale)), tone)
    brain = canvas.paint(_lobed(rng, narrow * 0.87, 0.83), 0.50)
    _sulci_axial(canvas, rng, brain, narrow)
    falx = [(0, -.84), (.008, -.4), (0, 0), (-.006, .4), (0, .84)]  # fmt: skip
    canvas.line(curve(falx), 0.14, width=0.022)
    swelling = rng.uniform(0.95, 1.35)
    for side in (-1, 1):
        horn = vary(rng, spline(HORN), shift=0.01, stretch=0.06, jitter=0, turn=3)
        canvas.paint(horn * (side * swelling * 1.1, 1.1), 0.06, name="ventricle")
        canvas.paint(ellipse((side * 0.22 * swelling, 0.02), (0.09, 0.16), side * -12), 0.56, hides=False, opacity=0.7)
    places = [(-.40, -.40), (.42, -.36), (-.46, .10), (.46, .16), (.32, .52), (-.34, .54)]  # fmt: skip
    _tumour(canvas, rng, places, brain)
    return canvas


def _lobed(rng: np.random.Generator, width: float, height: float) -> Outline:
    return blob(rng, (0, 0), (width, height), roughness=0.012, lobes=9)


def _sulci_axial(canvas: Canvas, rng: np.random.Generator, brain: Mask, narrow: float) -> None:
    x, y = canvas.anatomy_grid()
    radius = np.hypot(x / narrow, y / 0.95)
    folds = np.sin(30 * np.arctan2(y, x) + 5 * _warp(rng, canvas.size) + 6 * radius)
    rim = np.clip((radius - 0.52) * 4, 0, 1)
    canvas.image += brain * (0.16 * (1 - rim) - 0.28 * rim * np.clip(folds - 0.2, 0, 1))
