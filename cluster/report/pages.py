"""What all pages share: the templates, and the drawing of a sample with its answer as SVG layers, each of which can be
switched on and off."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jinja2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from skimage.measure import approximate_polygon, find_contours

from umrg.atomic import write_text
from umrg.frames import Box, PointPair, Size
from umrg.masks import decode_rle
from umrg.sample import Sample

T = TypeVar("T")

SIDE = 300
"""Longest side of a picture, in pixels."""

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def write_page(path: Path, template: str, *, remarks: Sequence[str] = (), **content: Any) -> Path:
    """Render a template of this folder to a file; returns the file's path. remarks: on the page itself, above all else,
    such as that it is of a run that still goes on."""
    page = _TEMPLATES.get_template(template).render(remarks=remarks, **content)
    write_text(path, page)
    return path


def drawn(record: Mapping[str, Any], sample: Sample | None) -> dict[str, Any]:
    """The argument of the templates' `figure` macro: the image, and prediction and reference as shapes over it. sample:
    the row that the record answers; without it there is neither the image nor the reference mask."""
    size = sample.size if sample else _extent(record)
    return {
        "picture": as_data_url(sample.image()) if sample else None,
        "width": size.width,
        "height": size.height,
        "stroke": size.long_side / SIDE,
        "reference": shapes(sample.mask(), sample.box, sample.points)
        if sample
        else shapes(None, _box(record["reference_box"]), _points(record["reference_points"])),
        "prediction": shapes(
            decode_rle(record["mask"]) if record["mask"] else None, _box(record["box"]), _points(record["points"])
        ),
    }


def _extent(record: Mapping[str, Any]) -> Size:
    """Of the image that a record answers a question about; where no mask tells it, of the reference box."""
    if record["mask"]:
        height, width = record["mask"]["size"]
        return Size(width, height)
    _, _, right, bottom = record["reference_box"]
    return Size(math.ceil(right) + 1, math.ceil(bottom) + 1)


def _box(values: Sequence[float] | None) -> Box | None:
    return (values[0], values[1], values[2], values[3]) if values else None


def _points(values: Sequence[Sequence[float]] | None) -> PointPair | None:
    return ((values[0][0], values[0][1]), (values[1][0], values[1][1])) if values else None


def shapes(mask: NDArray[np.bool_] | None, box: Box | None, points: PointPair | None) -> dict[str, Any]:
    """A mask's outline as an SVG path, a box as (x, y, width, height), and points, in SVG coordinates, where the centre
    of pixel 0 lies at 0.5. box: XYXY with inclusive maximum."""
    return {
        "mask": "" if mask is None else outline(mask),
        "box": None if box is None else (box[0], box[1], box[2] - box[0] + 1, box[3] - box[1] + 1),
        "points": [] if points is None else [(x + 0.5, y + 0.5) for x, y in points],
    }


def outline(mask: NDArray[np.bool_]) -> str:
    """The outlines of a mask (bool [H, W]) as an SVG path, exact to half a pixel of the picture."""
    tolerance = max(mask.shape) / SIDE / 2
    parts = []
    for contour in find_contours(np.pad(mask, 1).astype(np.uint8), 0.5):
        corners = approximate_polygon(contour, tolerance) - 0.5
        parts.append("M" + "L".join(f"{x:.1f} {y:.1f}" for y, x in corners) + "Z")
    return "".join(parts)


def as_data_url(picture: NDArray[np.uint8]) -> str:
    """An image (uint8 [H, W, 3]) as a WebP data URL, scaled down to at most `SIDE` pixels per side."""
    image = Image.fromarray(picture)
    image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=75)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def spread(rows: Sequence[T], count: int) -> list[T]:
    """At most `count` of them, spread evenly."""
    return list(rows[:: max(1, -(-len(rows) // count))])
