"""Ultrasound: a sector scan of the upper abdomen or of a pregnancy."""

import numpy as np

from phantoms import looks
from phantoms.canvas import Canvas, Mask
from phantoms.shapes import XY, Outline, Pose, blob, curve, ellipse, spline, tube, vary

GALLBLADDER = [
    (-.26, .02), (-.16, -.11), (.04, -.16), (.22, -.10), (.28, .02), (.20, .13), (.02, .16),
    (-.16, .10)
]  # fmt: skip


def draw(rng: np.random.Generator, size: int) -> Canvas:
    """Paint an abdominal or obstetric scan: speckled tissue in a fan below the probe, brightest at the focal depth."""
    canvas = _abdomen(rng, size) if rng.random() < 0.5 else _pregnancy(rng, size)
    distance, angle = _beam(size)
    fan = (np.abs(angle) < 42) & (distance > 0.24) & (distance < 2.05)
    depth_gain = np.clip(1.15 - 0.22 * np.abs(distance - 1.0), 0.3, 1.2)
    image = looks.speckle(rng, canvas.image * depth_gain, amount=0.75, across=size // 3, down=size // 2)
    image = looks.soften(image, 0.55 * size / 224)
    canvas.image = looks.grain(rng, image, 0.012)
    canvas.crop(fan)
    return canvas


def _beam(size: int) -> tuple[looks.Field, looks.Field]:
    """Each pixel's distance from the fan's apex, in half image sides, and its beam angle in degrees (0 is down)."""
    axis = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(2 / size)
    x, y = axis[None, :] - 1, axis[:, None] + np.float32(0.14)
    return np.hypot(x, y), np.degrees(np.arctan2(x, y))


def _tissue(rng: np.random.Generator, size: int, tone: float) -> Canvas:
    canvas = Canvas(size, Pose.sample(rng, size, zoom=(0.84, 1.15), shift=(0.16, 0.16), turn=20, mirror=0.3), tone)
    canvas.image += looks.smooth_noise(rng, size, 9) * np.float32(0.05)
    return canvas


def _abdomen(rng: np.random.Generator, size: int) -> Canvas:
    canvas = _tissue(rng, size, 0.40)
    canvas.paint(tube([(-1.6, .70), (-.5, .84), (.3, .80), (1.6, .30)], 0.06), 0.95, soft=0.02)  # fmt: skip
    for _ in range(3):
        start = rng.uniform((-0.9, -0.6), (0.5, 0.5))
        step = rng.uniform((0.10, -0.12), (0.22, 0.12))
        path = np.array([start, start + step, start + step * (2, 1.4)])
        canvas.paint(tube(path, 0.08), 0.66, soft=0.01)
        canvas.paint(tube(path, 0.045), 0.06)
    places = [(-.42, -.10), (.38, .22)] if rng.random() < 0.5 else [(.36, -.08), (-.36, .26)]  # fmt: skip
    _kidney(canvas, rng, places[1])
    _gallbladder(canvas, rng, places[0])
    return canvas


def _kidney(canvas: Canvas, rng: np.random.Generator, place: XY) -> None:
    centre = (place[0] + float(rng.normal(0, 0.06)), place[1] + float(rng.normal(0, 0.06)))
    cortex = vary(rng, ellipse(centre, (0.40, 0.23)), jitter=0, turn=40)
    middle = cortex.mean(axis=0)
    canvas.paint((cortex - middle) * 1.06 + middle, 0.72, soft=0.01)
    whole = canvas.paint(cortex, 0.22, name="kidney")
    sinus = (cortex - middle) * (0.62, 0.42) + middle
    canvas.paint(sinus, 0.78, within=whole, hides=False, soft=0.03)


def _gallbladder(canvas: Canvas, rng: np.random.Generator, place: XY) -> None:
    centre = np.array(place) + rng.normal(0, 0.08, 2)
    sac = vary(rng, spline(GALLBLADDER), shift=0.0, stretch=0.15, jitter=0, turn=50) * 1.2 + centre
    middle = sac.mean(axis=0)
    canvas.paint((sac - middle) * 1.10 + middle, 0.85)
    # Posterior acoustic enhancement: bile attenuates sound less than tissue, so what lies behind it is brighter.
    canvas.image += np.float32(0.20) * _behind(canvas, (float(middle[0]), float(middle[1])), 0.16)
    bile = canvas.paint(sac, 0.03, name="gallbladder")
    if rng.random() < 0.7:
        _stone(canvas, rng, sac, bile)


def _stone(canvas: Canvas, rng: np.random.Generator, sac: Outline, bile: Mask) -> None:
    middle = sac.mean(axis=0)
    along = sac[int(rng.integers(len(sac)))] - middle
    radius = float(rng.uniform(0.105, 0.135))
    x, y = (middle + along * max(0.0, 1 - 1.25 * radius / np.linalg.norm(along))).tolist()
    # A stone reflects the sound and casts an acoustic shadow.
    shadow = _behind(canvas, (x, y), radius * 0.9)
    canvas.image *= 1 - np.float32(0.9) * shadow
    stone = blob(rng, (x, y), (radius, radius * 0.85), roughness=0.05)
    canvas.paint(stone, 0.98, name="gallstone", hides=False)


def _behind(canvas: Canvas, place: XY, radius: float) -> looks.Field:
    """How much each pixel lies in the sound's path behind a disc, from 0 to 1; the disc is in anatomy units."""
    distance, angle = _beam(canvas.size)
    column, row = canvas.pose.to_pixels([place])[0]
    x, y = column * 2 / canvas.size - 1, row * 2 / canvas.size + 0.14
    reach, heading = np.hypot(x, y), np.degrees(np.arctan2(x, y))
    width = np.degrees(radius * canvas.pose.unit * 2 / canvas.size / max(reach, 0.2))
    inside: looks.Field = np.clip((width - np.abs(angle - heading)) / 1.5, 0, 1) * np.clip(
        (distance - reach) * 12, 0, 1
    )
    return inside


def _pregnancy(rng: np.random.Generator, size: int) -> Canvas:
    canvas = _tissue(rng, size, 0.36)
    sac = blob(rng, (0, 0.08), (0.98, 0.66), roughness=0.05)
    canvas.paint(sac * 1.04, 0.62)
    fluid = canvas.paint(sac, 0.05)
    _placenta(canvas, rng, fluid)
    head, trunk = [(-.44, .04), (.30, .16)] if rng.random() < 0.5 else [(.44, .06), (-.30, .14)]  # fmt: skip
    _limbs(canvas, rng, trunk)
    _trunk(canvas, rng, trunk)
    _head(canvas, rng, head)
    return canvas


def _placenta(canvas: Canvas, rng: np.random.Generator, fluid: Mask) -> None:
    side = float(rng.choice((-1, 1)))
    ends = rng.uniform(0.5, 0.8)
    path = [(-ends, side * 0.42 + 0.08), (-ends / 2, side * 0.56 + 0.08), (0, side * 0.62 + 0.08),
            (ends / 2, side * 0.56 + 0.08), (ends, side * 0.42 + 0.08)]  # fmt: skip
    lumps = looks.smooth_noise(rng, canvas.size, 24) * np.float32(0.10)
    band = tube(path, [0.06, rng.uniform(0.24, 0.36), 0.06])
    canvas.paint(band, 0.60, name="placenta", texture=lumps, within=fluid, soft=0.008)


def _limbs(canvas: Canvas, rng: np.random.Generator, trunk: XY) -> None:
    for _ in range(2):
        start = np.array(trunk) + rng.uniform(-0.15, 0.15, 2)
        knee = start + np.array([rng.uniform(-0.35, 0.35), rng.choice((-0.3, 0.3))])
        canvas.paint(tube([start, knee], 0.10), 0.36, soft=0.02)
        canvas.line(curve([start, knee]), 0.95, width=0.03)


def _trunk(canvas: Canvas, rng: np.random.Generator, place: XY) -> None:
    body = vary(rng, ellipse(place, (0.34, 0.27)), jitter=0, turn=30)
    x, y = body.mean(axis=0).tolist()
    whole = canvas.paint(body, 0.50, name="fetal abdomen")
    canvas.paint((body - (x, y)) * 0.92 + (x, y), 0.36, within=whole, hides=False)
    canvas.paint(blob(rng, (x + 0.10, y - 0.04), (0.08, 0.06)), 0.04, within=whole, hides=False)
    canvas.paint(ellipse((x - 0.20, y + 0.02), (0.06, 0.05)), 0.95, within=whole, hides=False, soft=0.01)


def _head(canvas: Canvas, rng: np.random.Generator, place: XY) -> None:
    skull = vary(rng, ellipse(place, (0.36, 0.28)), jitter=0, turn=45)
    middle = skull.mean(axis=0)
    whole = canvas.paint(skull, 0.98, name="fetal head")
    brain = (skull - middle) * 0.86 + middle
    canvas.paint(brain, 0.20, within=whole, hides=False)
    axis = (skull[0] - middle) * 0.78
    canvas.line(np.stack([middle - axis, middle + axis]), 0.85, width=0.025)
    for side in (-1, 1):
        across = (skull[10] - middle) * 0.35 * side
        canvas.line(
            curve([middle + across - axis * 0.4, middle + across * 1.2, middle + across + axis * 0.4]),
            0.6,
            width=0.03,
        )
