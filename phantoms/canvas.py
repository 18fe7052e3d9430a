"""The canvas on which a phantom is painted; it keeps the exact mask of every structure that is given a name."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from phantoms.looks import Field, soften
from phantoms.shapes import Outline, Pose, ribbon

Mask = NDArray[np.bool_]
Tone = float | tuple[float, float, float] | NDArray[np.float32]

_SUPERSAMPLING = 2  # subpixels along each side of a pixel, for anti-aliasing
Window = tuple[slice, slice]


class Canvas:
    """An image, float32 [S, S] or [S, S, 3], and the masks, bool [S, S], of the named structures in it.

    Later paint occludes earlier paint, in the image and in the masks. With `hides=False` the masks of what lies beneath
    keep their pixels: a lesion remains part of its organ, and a rib does not cut the lung behind it.
    """

    def __init__(self, size: int, pose: Pose, base: Tone) -> None:
        tone = np.asarray(base, dtype=np.float32)
        self.size = size
        self.pose = pose
        self.image: Field = np.empty((size, size, *tone.shape), dtype=np.float32)
        self.image[:] = tone
        self.masks: dict[str, Mask] = {}

    def paint(
        self,
        outline: Outline,
        tone: Tone,
        *,
        name: str | None = None,
        opacity: float = 1.0,
        soft: float = 0.0,
        texture: Field | None = None,
        within: Mask | None = None,
        hides: bool = True,
    ) -> Mask:
        """Fill an outline given in anatomy units and return its pixels, bool [S, S].

        soft: standard deviation of the blur of the painted edge, in anatomy units; the mask keeps its sharp edge.
        texture: a field that is added to the tone. within: a mask that clips the paint. name: makes the pixels the
        mask of that structure. hides: whether they are removed from the masks of other structures.
        """
        mask = np.zeros((self.size, self.size), dtype=np.bool_)
        softness = soft * self.pose.unit
        # The margin makes room for the blur, which `soften` truncates at 2.5 standard deviations.
        found = rasterise(self.pose.to_pixels(outline), self.size, margin=int(np.ceil(2.5 * softness)))
        if found is not None:
            window, coverage = found
            mask[window] = coverage >= 0.5
            if softness > 0:
                coverage = soften(coverage, softness)
            if within is not None:
                mask &= within
                coverage = coverage * within[window]
            self._blend(window, coverage * np.float32(opacity), tone, texture)
        self.mark(mask, name=name, hides=hides)
        return mask

    def fill(self, mask: Mask, tone: Tone, *, name: str | None = None, hides: bool = True) -> None:
        """Give the pixels of a mask a tone."""
        self.image[mask] = tone
        self.mark(mask, name=name, hides=hides)

    def mark(self, mask: Mask, *, name: str | None = None, hides: bool = True) -> None:
        """Record a mask: join it with an earlier one of the same name and, with `hides`, remove its pixels from the
        masks of other names."""
        if hides:
            for other, earlier in self.masks.items():
                if other != name:
                    earlier &= ~mask
        if name is not None:
            self.masks[name] = self.masks[name] | mask if name in self.masks else mask.copy()

    def line(self, knots: Outline, tone: Tone, *, width: float, opacity: float = 1.0) -> None:
        """Draw a thin open line of `width` anatomy units; masks are not affected."""
        thickness = max(width * self.pose.unit, 1.0)
        found = rasterise(ribbon(self.pose.to_pixels(knots), thickness), self.size)
        if found is not None:
            window, coverage = found
            self._blend(window, coverage * np.float32(opacity), tone, None)

    def dots(
        self,
        centres: Outline,
        radii: Sequence[float],
        tone: Tone,
        *,
        opacity: float = 1.0,
        within: Mask | None = None,
    ) -> None:
        """Fill small discs (centres [N, 2] and radii in anatomy units); masks are not affected."""
        pixels, spans = self.pose.to_pixels(centres), np.asarray(radii) * self.pose.unit
        window = _window(pixels, self.size, margin=int(np.ceil(spans.max())))
        if window is None:
            return
        layer = _layer(window)
        pen = ImageDraw.Draw(layer)
        for (x, y), span in zip(_in_layer(pixels, window), (spans * _SUPERSAMPLING).tolist(), strict=True):
            pen.ellipse((x - span, y - span, x + span, y + span), 255)
        coverage = _coverage(layer) * np.float32(opacity)
        self._blend(window, coverage if within is None else coverage * within[window], tone, None)

    def crop(self, view: Mask, outside: Tone = 0.0) -> None:
        """Remove what lies outside the field of view from the image and from every mask."""
        self.image[~view] = outside
        for mask in self.masks.values():
            mask &= view

    def anatomy_grid(self) -> tuple[Field, Field]:
        """Anatomy x and y of every pixel, each [S, S]."""
        axis = np.arange(self.size, dtype=np.float64)
        pixels = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
        x, y = self.pose.to_anatomy(pixels).astype(np.float32).reshape(self.size, self.size, 2).transpose(2, 0, 1)
        return x, y

    def _blend(self, window: Window, coverage: Field, tone: Tone, texture: Field | None) -> None:
        part = self.image[window]
        level: Field = np.asarray(tone, dtype=np.float32) - part
        if texture is not None:
            level += _like(part, texture[window])
        part += _like(part, coverage) * level


def _like(image: Field, field: Field) -> Field:
    return field if image.ndim == 2 else field[..., None]


def rasterise(outline: Outline, size: int, margin: int = 0) -> tuple[Window, Field] | None:
    """The image window that holds a closed outline, and the outline's anti-aliased coverage in [0, 1] within that
    window; None if it lies outside the image.

    outline: [N, 2], in pixel XY. margin: pixels by which the window is widened on each side.
    """
    window = _window(outline, size, margin)
    if window is None:
        return None
    layer = _layer(window)
    ImageDraw.Draw(layer).polygon(_in_layer(outline, window), fill=255)
    return window, _coverage(layer)


def _window(points: Outline, size: int, margin: int) -> Window | None:
    left, top = np.maximum(np.floor(points.min(axis=0)).astype(int) - margin - 1, 0).tolist()
    right, bottom = np.minimum(np.ceil(points.max(axis=0)).astype(int) + margin + 2, size).tolist()
    return (slice(top, bottom), slice(left, right)) if right > left and bottom > top else None


def _layer(window: Window) -> Image.Image:
    rows, columns = window
    return Image.new("L", ((columns.stop - columns.start) * _SUPERSAMPLING, (rows.stop - rows.start) * _SUPERSAMPLING))


def _in_layer(points: Outline, window: Window) -> list[tuple[float, float]]:
    # Pixel centres have integer coordinates, both in the image and in the supersampled layer.
    x, y = ((points - (window[1].start, window[0].start) + 0.5) * _SUPERSAMPLING - 0.5).T
    return list(zip(x.tolist(), y.tolist(), strict=True))


def _coverage(layer: Image.Image) -> Field:
    return np.asarray(layer.reduce(_SUPERSAMPLING), dtype=np.float32) * np.float32(1 / 255)
