"""OCT: a cross-section of the retina at the macula, the vitreous above and the choroid below."""

from dataclasses import dataclass

import numpy as np

from phantoms import looks
from phantoms.canvas import Canvas
from phantoms.shapes import Pose, blob

# Brightness of the retinal layers by their depth between the inner (0) and the outer surface (1).
LAYER_DEPTHS = (0.0, 0.04, 0.16, 0.20, 0.36, 0.40, 0.50, 0.54, 0.62, 0.66, 0.84, 0.87, 0.91, 0.94, 1.0)
LAYER_TONES = (0.55, 0.85, 0.80, 0.50, 0.52, 0.30, 0.32, 0.52, 0.50, 0.20, 0.20, 0.75, 0.75, 0.34, 0.40)


@dataclass(frozen=True, kw_only=True)
class Surfaces:
    """The interfaces between tissues, as fields [S, S] of anatomy y, which increases outwards from the vitreous."""

    inner: looks.Field
    """Inner surface of the retina."""
    outer: looks.Field
    """Outer surface of the retina."""
    pigment: looks.Field
    """Retinal pigment epithelium."""
    bruch: looks.Field
    """Bruch's membrane."""
    sclera: looks.Field
    """Inner surface of the sclera."""


def draw(rng: np.random.Generator, size: int) -> Canvas:
    """Paint curved retinal layers with the foveal pit, and one to three lesions."""
    pose = Pose.sample(rng, size, zoom=(0.88, 1.20), shift=(0.24, 0.34), turn=18, mirror=0.5)
    canvas = Canvas(size, pose, 0.06)
    x, y = canvas.anatomy_grid()
    lesions = rng.permutation(["fluid", "detachment", "cyst"])[: int(rng.integers(1, 4))].tolist()
    surfaces = _surfaces(rng, x, lesions)
    _layers(canvas, rng, y, surfaces)
    fluid_gap = (y > surfaces.outer) & (y <= surfaces.pigment - 0.012)
    if "fluid" in lesions:
        canvas.fill(fluid_gap, 0.05, name="subretinal fluid")
    if "detachment" in lesions:
        canvas.fill((y > surfaces.pigment + 0.07) & (y <= surfaces.bruch), 0.42, name="pigment epithelium detachment")
    if "cyst" in lesions:
        _cyst(canvas, rng, x, y, surfaces)
    image = looks.speckle(rng, canvas.image, amount=0.55, across=size // 2, down=size)
    canvas.image = looks.grain(rng, looks.soften(image, 0.5 * size / 224), 0.025)
    return canvas


def _surfaces(rng: np.random.Generator, x: looks.Field, lesions: list[str]) -> Surfaces:
    bend = rng.uniform(-0.12, 0.22)
    bruch = np.float32(0.22) + np.float32(bend) * x**2 + np.float32(0.01) * np.sin(9 * x)
    left, right = (-0.42, 0.42) if rng.random() < 0.5 else (0.42, -0.42)
    raised = _dome(rng, x, left, (0.20, 0.30)) if "detachment" in lesions else np.zeros_like(x)
    lifted = _dome(rng, x, right, (0.18, 0.30)) if "fluid" in lesions else np.zeros_like(x)
    pigment = bruch - 0.07 - raised
    outer = pigment - 0.012 - lifted
    pit = 0.22 * np.exp(-((x / 0.22) ** 2))
    thickness = np.float32(rng.uniform(0.44, 0.56)) - pit
    choroid = np.float32(rng.uniform(0.22, 0.36)) + np.float32(0.02) * np.sin(5 * x)
    return Surfaces(inner=outer - thickness, outer=outer, pigment=pigment, bruch=bruch, sclera=bruch + choroid)


def _dome(rng: np.random.Generator, x: looks.Field, place: float, height: tuple[float, float]) -> looks.Field:
    """The height field of a dome that lifts a surface."""
    width = rng.uniform(0.28, 0.40)
    offset = (x - np.float32(place + rng.normal(0, 0.08))) / np.float32(width)
    bump: looks.Field = np.float32(rng.uniform(*height)) * np.clip(1 - offset**2, 0, None) ** np.float32(0.8)
    return bump


def _layers(canvas: Canvas, rng: np.random.Generator, y: looks.Field, surfaces: Surfaces) -> None:
    depth = (y - surfaces.inner) / (surfaces.outer - surfaces.inner)
    retina = (depth >= 0) & (depth <= 1)
    tones = np.interp(depth, LAYER_DEPTHS, LAYER_TONES).astype(np.float32)
    canvas.image[retina] = tones[retina]
    canvas.fill((y > surfaces.pigment - 0.012) & (y <= surfaces.pigment + 0.07), 0.98)
    vessels = looks.smooth_noise(rng, canvas.size, 22, 26)
    choroid = (y > surfaces.bruch) & (y <= surfaces.sclera)
    fade = np.clip(1.2 - 1.2 * (y - surfaces.bruch) / (surfaces.sclera - surfaces.bruch), 0.4, 1)
    canvas.fill(choroid, (fade * np.where(vessels > 0.35, 0.26, 0.62)).astype(np.float32)[choroid], name="choroid")
    behind = y > surfaces.sclera
    canvas.fill(behind, np.clip(0.30 - 0.5 * (y - surfaces.sclera), 0.05, 1)[behind].astype(np.float32))


def _cyst(canvas: Canvas, rng: np.random.Generator, x: looks.Field, y: looks.Field, surfaces: Surfaces) -> None:
    place = float(rng.choice((-0.42, 0.42)) + rng.normal(0, 0.10))
    near = np.abs(x - place) < 0.02
    if not near.any():  # the pose has moved this column out of the image
        return
    depth = (y - surfaces.inner) / (surfaces.outer - surfaces.inner)
    retina = (depth > 0.08) & (depth < 0.92)
    top, bottom = float(surfaces.inner[near].mean()), float(surfaces.outer[near].mean())
    radii = (rng.uniform(0.15, 0.26), (bottom - top) * rng.uniform(0.28, 0.35))
    outline = blob(rng, (place, top + (bottom - top) * 0.52), radii, roughness=0.06)
    canvas.paint(outline, 0.04, name="retinal cyst", within=retina)
