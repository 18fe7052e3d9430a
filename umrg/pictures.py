"""Visualisation: overlays of masks, boxes and points on an image, contact sheets and heat maps.

Lines are rendered from signed distance fields, which gives anti-aliased edges at any size, and have a dark casing that
keeps them visible on bright and dark images. The colours are from the colour-blind-safe palette of Okabe and Ito
(https://jfly.uni-koeln.de/color/). Masks and boxes also differ in stroke: solid for the prediction, dashed for the
reference.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import distance_transform_edt, gaussian_filter

from umrg.frames import Box, PointPair
from umrg.mistake import Mistake

Picture = NDArray[np.uint8]
_Field = NDArray[np.float32]
Colour = tuple[int, int, int]

PREDICTION: Colour = (230, 159, 0)
REFERENCE: Colour = (86, 180, 233)
_CASING: Colour = (16, 16, 20)
# Opacity of the mask's tint, low enough to keep the image beneath visible.
_FILL = 0.22
_LONGEST = 1600
_PAPER: Colour = (250, 250, 248)
_INK: Colour = (28, 28, 32)
_PALE_INK: Colour = (96, 98, 106)
# Stops of a dark-to-bright colour map whose lightness rises evenly, also for colour-blind viewers.
_HEAT = ((0, 24, 56), (24, 62, 110), (86, 98, 116), (140, 135, 118), (196, 176, 98), (255, 233, 72))


def overlay(
    image: Picture,
    *,
    mask: NDArray[np.bool_] | None = None,
    box: Box | None = None,
    points: PointPair | None = None,
    reference_mask: NDArray[np.bool_] | None = None,
    reference_box: Box | None = None,
    reference_points: PointPair | None = None,
    long_side: int | None = None,
) -> Picture:
    """Draw a mask (tinted and outlined), a box and two key points (a disc and a ring) on an image.

    The reference is drawn in another colour, with dashed lines and without a tint.

    image: The image, uint8 [H, W, 3].
    mask, reference_mask: Masks, bool [H, W].
    box, reference_box: Boxes, XYXY with inclusive maximum, in original pixels.
    points, reference_points: Pairs of points, XY in original pixels.
    long_side: Long side of the result in pixels. The default is the image's own, but at most 1600.
    """
    own = max(image.shape[:2])
    scale = (long_side or min(own, _LONGEST)) / own
    canvas = _Canvas(_resized(image, scale), scale)
    # Larger shapes are drawn first, so that no tint covers a line or a point.
    if mask is not None:
        canvas.mask(mask, PREDICTION, dashed=False)
    if reference_mask is not None:
        canvas.mask(reference_mask, REFERENCE, dashed=True)
    if reference_box is not None:
        canvas.box(reference_box, REFERENCE, dashed=True)
    if box is not None:
        canvas.box(box, PREDICTION, dashed=False)
    if reference_points is not None:
        canvas.points(reference_points, REFERENCE)
    if points is not None:
        canvas.points(points, PREDICTION)
    return canvas.picture()


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A picture of a contact sheet with its caption."""

    picture: Picture
    """uint8 [H, W, 3]."""
    title: str
    """The caption's first line, shortened if it does not fit."""
    text: str = ""
    """The caption's body, wrapped to at most three lines."""


def contact_sheet(tiles: Sequence[Tile], columns: int, *, side: int = 280, heading: str = "") -> Picture:
    """Arrange tiles in a grid below a heading, each scaled into a square of `side` pixels with its caption below.

    Pictures that are not square are centred. Captions that do not fit end in an ellipsis.
    Raises ValueError if there are no tiles or no columns.
    """
    if not tiles or columns < 1:
        raise Mistake("a contact sheet needs at least one tile and one column")
    columns = min(columns, len(tiles))
    # All spacing and font sizes scale with the tile's side.
    gap, line = side // 14, side // 14
    head = 3 * line if heading else gap
    font = _font(round(line * 0.78))
    captions = [(_wrapped(tile.title, font, side, 1), _wrapped(tile.text, font, side, 3)) for tile in tiles]
    lines = max(text.count("\n") + bool(text) for _, text in captions)
    cell = side + round((2.4 + 1.05 * lines) * line)
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (gap + columns * (side + gap), head + rows * cell + gap // 2), _PAPER)
    draw = ImageDraw.Draw(sheet)
    if heading:
        large = _font(round(line * 1.1))
        draw.text((gap, head // 2), _wrapped(heading, large, sheet.width - 2 * gap, 1), _INK, large, anchor="lm")
    for number, (tile, (title, text)) in enumerate(zip(tiles, captions, strict=True)):
        left, top = gap + number % columns * (side + gap), head + number // columns * cell
        picture = Image.fromarray(_resized(tile.picture, side / max(tile.picture.shape[:2])))
        draw.rectangle((left, top, left + side - 1, top + side - 1), fill=_CASING)
        sheet.paste(picture, (left + (side - picture.width) // 2, top + (side - picture.height) // 2))
        draw.text((left, top + side + line * 0.4), title, _INK, font)
        draw.multiline_text((left, top + side + line * 1.55), text, _PALE_INK, font, spacing=line * 0.25)
    return np.asarray(sheet)


def heat_map(density: NDArray[np.floating], side: int) -> Picture:
    """Render a density [H, W] as a square of `side` pixels, from dark at 0 to bright at its maximum."""
    peak = float(density.max())
    levels = (density / peak if peak > 0 else density).astype(np.float32)
    smooth = np.asarray(Image.fromarray(levels).resize((side, side), Image.Resampling.BICUBIC)).clip(0, 1)
    stops = np.linspace(0, 1, len(_HEAT))
    channels = [np.interp(smooth, stops, values) for values in zip(*_HEAT, strict=True)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


class _Canvas:
    """A picture being drawn. Coordinates are given in original pixels and scaled to the picture."""

    def __init__(self, image: Picture, scale: float) -> None:
        self._pixels = image.astype(np.float32)
        self._scale = scale
        height, width = image.shape[:2]
        self._line = max(1.5, max(height, width) / 260)
        # Pixel i covers [i, i + 1), so its centre is at i + 0.5.
        self._y = np.arange(height, dtype=np.float32)[:, None] + 0.5
        self._x = np.arange(width, dtype=np.float32)[None, :] + 0.5

    def picture(self) -> Picture:
        return self._pixels.round().clip(0, 255).astype(np.uint8)

    def mask(self, mask: NDArray[np.bool_], colour: Colour, *, dashed: bool) -> None:
        if not mask.any():
            return
        distance = _mask_distance(mask, self._pixels.shape[:2])
        if not dashed:
            self._paint(_coverage(distance), colour, _FILL)
        self._stroke(distance, colour, (self._x + self._y) if dashed else None)

    def box(self, box: Box, colour: Colour, *, dashed: bool) -> None:
        # Lines run through the centres of the outermost pixels: between two pixels, a thin line would be pale on both.
        left, top = (round(edge * self._scale) + 0.5 for edge in box[:2])
        right, bottom = (round((edge + 1) * self._scale) - 0.5 for edge in box[2:])
        dx = np.abs(self._x - (left + right) / 2) - (right - left) / 2
        dy = np.abs(self._y - (top + bottom) / 2) - (bottom - top) / 2
        inside = np.minimum(np.maximum(dx, dy), 0)
        distance = np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + inside
        along = np.where(dx > dy, self._y - np.float32(top), self._x - np.float32(left))
        self._stroke(distance, colour, along if dashed else None)

    def points(self, points: PointPair, colour: Colour) -> None:
        # Both points lie within the target, so discs shrink with their distance to leave a small target visible.
        apart = math.dist(*points) * self._scale
        radius = self._line * min(2.1, max(1.1, 0.3 * apart / self._line))
        for number, (x, y) in enumerate(points):
            distance = np.hypot(
                self._x - np.float32((x + 0.5) * self._scale), self._y - np.float32((y + 0.5) * self._scale)
            )
            if number == 0:
                self._paint(_coverage(distance - radius - self._line * 0.7), _CASING, 0.85)
                self._paint(_coverage(distance - radius), colour, 1.0)
            else:
                self._stroke(distance - radius, colour, None)

    def _stroke(self, distance: _Field, colour: Colour, along: _Field | None) -> None:
        dash = 1.0 if along is None else _dashes(along, 5 * self._line)
        line = np.abs(distance) - self._line / 2
        self._paint(_coverage(line - self._line * 0.6), _CASING, 0.55)
        self._paint(_coverage(line) * dash, colour, 1.0)

    def _paint(self, coverage: _Field, colour: Colour, opacity: float) -> None:
        y, x = np.nonzero(coverage)
        alpha = coverage[y, x, None] * np.float32(opacity)
        self._pixels[y, x] += alpha * (np.array(colour, dtype=np.float32) - self._pixels[y, x])


def _coverage(distance: _Field) -> _Field:
    """The fraction of each pixel inside a shape, from its signed distance (negative inside)."""
    return np.clip(0.5 - distance, 0, 1).astype(np.float32)


def _dashes(along: _Field, period: float) -> _Field:
    phase = np.abs((along / period) % 1 - 0.5) * period
    dashes: _Field = np.clip(phase - period * 0.2 + 0.5, 0, 1).astype(np.float32)
    return dashes


def _mask_distance(mask: NDArray[np.bool_], shape: tuple[int, ...]) -> _Field:
    """Signed distance in pixels to the smoothed outline of a mask resized to `shape`, negative inside."""
    height, width = shape
    soft = Image.fromarray(mask.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    inside = np.asarray(soft) >= 0.5
    if not inside.any():
        # A mask of few pixels can vanish when it is shrunk; its strongest pixels keep it visible.
        inside = np.asarray(soft) >= np.asarray(soft).max()
    signed = distance_transform_edt(~inside) - distance_transform_edt(inside)
    # Distances are measured between pixel centres, but the outline lies halfway between an inner and an outer pixel.
    signed -= 0.5 * np.sign(signed)
    blur = max(1.0, 0.4 * max(width / mask.shape[1], height / mask.shape[0]))
    return np.asarray(gaussian_filter(signed, blur), dtype=np.float32)


def _resized(image: Picture, scale: float) -> Picture:
    if scale == 1:
        return image
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))


def _wrapped(text: str, font: Any, width: float, lines: int) -> str:
    """Wrap text to at most `lines` lines of `width` pixels, with an ellipsis if it does not fit."""
    done: list[str] = []
    words = text.split()
    while words and len(done) < lines:
        count = next((n for n in range(len(words), 1, -1) if font.getlength(" ".join(words[:n])) <= width), 1)
        done.append(" ".join(words[:count]))
        words = words[count:]
    if words and done:
        # The remaining words do not fit.
        done[-1] = done[-1].rstrip(" ,;") + "…"
    return "\n".join(_cut(line, font, width) for line in done)


def _cut(line: str, font: Any, width: float) -> str:
    """Truncate a line that is too wide, with an ellipsis. A single long word, such as a path, cannot be wrapped."""
    if font.getlength(line) <= width:
        return line
    kept = line.removesuffix("…")
    while kept and font.getlength(kept + "…") > width:
        kept = kept[:-1]
    return kept.rstrip(" ,;") + "…"


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(max(8, size))
