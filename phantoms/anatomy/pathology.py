"""Pathology: a section stained with haematoxylin (blue nuclei) and eosin (pink stroma).

The canvas holds the densities of haematoxylin, eosin and blood in its three channels, which the Beer-Lambert law turns
into colours at the end.
"""

import numpy as np

from phantoms import looks
from phantoms.canvas import Canvas, Mask
from phantoms.shapes import XY, Outline, Pose, blob, ellipse, scatter

# Glands appear twice, so that they are drawn more often than the others.
STRUCTURES = ("gland", "tumour nest", "arteriole", "fat tissue", "gland", "lymphoid follicle")
PALE = (0.02, 0.03, 0.0)


def draw(rng: np.random.Generator, size: int) -> Canvas:
    """Paint up to five tissue structures that do not overlap in fibrous stroma."""
    pose = Pose.sample(rng, size, zoom=(0.85, 1.15), shift=(0.1, 0.1), turn=180)
    canvas = Canvas(size, pose, (0.16, 0.30, 0.0))
    _stroma(canvas, rng)
    kinds = list(dict.fromkeys(rng.permutation(STRUCTURES).tolist()))[: int(rng.integers(3, 6))]
    radii = rng.uniform(0.34, 0.50, len(kinds)).tolist()
    for kind, place, radius in zip(kinds, scatter(rng, radii, reach=(0.68, 0.68)), radii, strict=True):
        if place is not None:
            _PAINTERS[kind](canvas, rng, place, radius)
    canvas.image += (looks.smooth_noise(rng, size, size // 3) * np.float32(0.035))[..., None]
    densities = looks.soften(canvas.image, 0.5 * size / 224) * np.append(rng.uniform(0.8, 1.25, 2), 1).astype(
        np.float32
    )
    canvas.image = looks.grain(rng, looks.stain(np.maximum(densities, 0)), 0.012)
    return canvas


def _stroma(canvas: Canvas, rng: np.random.Generator) -> None:
    size = canvas.size
    waves = looks.smooth_noise(rng, size, 5, 26) + looks.smooth_noise(rng, size, 12, 60) * np.float32(0.6)
    canvas.image[..., 1] += np.float32(0.07) * waves
    _nuclei(canvas, rng, rng.uniform(-1.3, 1.3, (150, 2)), 0.017, 0.9)


def _nuclei(canvas: Canvas, rng: np.random.Generator, centres: Outline, radius: float, density: float) -> None:
    sizes = radius * rng.uniform(0.75, 1.3, len(centres))
    canvas.dots(centres, sizes.tolist(), (density, 0.25, 0.0), opacity=0.9)


def _inside(rng: np.random.Generator, outline: Outline, count: int) -> Outline:
    """Random points within a star-shaped outline."""
    # The square root makes the density per area uniform; 0.9 keeps points off the rim.
    middle = outline.mean(axis=0)
    start, share = rng.integers(len(outline), size=count), rng.uniform(0, 1, (count, 1))
    rim = outline[start] * share + outline[(start + 1) % len(outline)] * (1 - share)
    points: Outline = middle + (rim - middle) * np.sqrt(rng.uniform(0, 0.9, (count, 1)))
    return points


def _gland(canvas: Canvas, rng: np.random.Generator, place: XY, radius: float) -> None:
    outline = blob(rng, place, (radius, radius * rng.uniform(0.7, 1.0)), roughness=0.08, angle=rng.uniform(0, 180))
    canvas.paint(outline, (0.34, 0.42, 0.0), name="gland")
    _nuclei(canvas, rng, (outline[::3] - place) * 0.88 + place, 0.034, 1.35)
    _nuclei(canvas, rng, (outline[1::4] - place) * 0.74 + place, 0.026, 1.2)
    canvas.paint((outline - place) * 0.58 + place, PALE, hides=False)


def _tumour_nest(canvas: Canvas, rng: np.random.Generator, place: XY, radius: float) -> None:
    outline = blob(rng, place, (radius, radius * rng.uniform(0.75, 1.0)), roughness=0.16, lobes=8)
    canvas.paint(outline, (0.36, 0.50, 0.0), name="tumour nest")
    _nuclei(canvas, rng, _inside(rng, outline, int(260 * radius)), 0.036, 1.05)
    _nuclei(canvas, rng, _inside(rng, outline, int(120 * radius)), 0.042, 1.7)


def _arteriole(canvas: Canvas, rng: np.random.Generator, place: XY, radius: float) -> None:
    outline = blob(rng, place, (radius, radius * rng.uniform(0.75, 1.0)), roughness=0.05, angle=rng.uniform(0, 180))
    canvas.paint(outline, (0.12, 0.62, 0.0), name="arteriole")
    for ring in (0.94, 0.80, 0.68):
        path = (outline - place) * ring + place
        canvas.line(np.concatenate([path, path[:1]]), (0.22, 0.85, 0.0), width=0.014, opacity=0.7)
    _nuclei(canvas, rng, (outline[::6] - place) * 0.86 + place, 0.02, 1.0)
    lumen = canvas.paint((outline - place) * 0.56 + place, PALE, hides=False)
    _red_cells(canvas, rng, (outline - place) * 0.52 + place, lumen)


def _red_cells(canvas: Canvas, rng: np.random.Generator, outline: Outline, lumen: Mask) -> None:
    canvas.dots(
        _inside(rng, outline, 90),
        rng.uniform(0.018, 0.026, 90).tolist(),
        (0.0, 0.35, 1.0),
        opacity=0.85,
        within=lumen,
    )


def _fat_tissue(canvas: Canvas, rng: np.random.Generator, place: XY, radius: float) -> None:
    outline = blob(rng, place, (radius, radius), roughness=0.07)
    whole = canvas.paint(outline, (0.15, 0.50, 0.0), name="fat tissue")
    cell = radius * rng.uniform(0.24, 0.30)
    row, column = (axis.ravel() for axis in np.meshgrid(np.arange(-5, 6), np.arange(-5, 6)))
    cells = np.stack([(column + 0.5 * (row % 2)) * 1.02, row * 0.88], axis=1) * cell + rng.normal(0, 0.012, (121, 2))
    cells = cells[np.hypot(*cells.T) < radius * 1.05] + place
    canvas.dots(cells, (cell * rng.uniform(0.44, 0.53, len(cells))).tolist(), PALE, within=whole)


def _lymphoid_follicle(canvas: Canvas, rng: np.random.Generator, place: XY, radius: float) -> None:
    outline = ellipse(place, (radius, radius * rng.uniform(0.8, 1.0)), rng.uniform(0, 180))
    canvas.paint(outline, (0.75, 0.22, 0.0), name="lymphoid follicle", soft=0.02)
    _nuclei(canvas, rng, _inside(rng, outline, int(1100 * radius)), 0.016, 1.9)
    canvas.paint((outline - place) * 0.45 + place, (0.42, 0.25, 0.0), soft=0.05, opacity=0.75, hides=False)


_PAINTERS = {
    "gland": _gland,
    "tumour nest": _tumour_nest,
    "arteriole": _arteriole,
    "fat tissue": _fat_tissue,
    "lymphoid follicle": _lymphoid_follicle,
}
