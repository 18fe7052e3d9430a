"""Coordinate frames, and the only place where coordinates are converted between them.

There are four frames. Each spans the whole image with its own extent (width, height), so a change of frame only scales
x and y:

- *original*: pixels of the upright image. Datasets, masks, rewards and served answers use it.
- *model*: pixels after the reasoner's processor has resized the image. Qwen2-VL and Qwen2.5-VL answer in it.
- *relative*: 0 to 1000 along each axis. Qwen3-VL answers in it.
- *expert*: pixels of the image within the segmenter's input, excluding padding.

Boxes are XYXY with inclusive maximum, and points are XY.
"""

import math
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from umrg.mistake import Mistake

Point = tuple[float, float]
Box = tuple[float, float, float, float]
PointPair = tuple[Point, Point]


class Frame(StrEnum):
    """The frames in which an answer may be written."""

    ORIGINAL = "original"
    MODEL = "model"
    RELATIVE = "relative"


@dataclass(frozen=True)
class Size:
    """An extent in pixels or, for the relative frame, in thousandths of the image's sides."""

    width: int
    height: int

    @property
    def long_side(self) -> int:
        return max(self.width, self.height)

    @property
    def diagonal(self) -> float:
        return math.hypot(self.width, self.height)


RELATIVE = Size(1000, 1000)


def rescale(coordinates: NDArray[np.floating], source: Size, target: Size) -> NDArray[np.float64]:
    """Scale coordinates [..., 2k], with x and y alternating, from the extent of one frame to that of another."""
    pair = np.array([target.width / source.width, target.height / source.height])
    scale: NDArray[np.float64] = np.tile(pair, coordinates.shape[-1] // 2)
    return np.asarray(coordinates, dtype=np.float64) * scale


@dataclass(frozen=True, kw_only=True)
class Frames:
    """The extents of one image's frames."""

    original: Size
    """Extent of the upright image."""
    model: Size
    """Extent after resizing by the reasoner's processor."""

    def size(self, frame: Frame) -> Size:
        return {Frame.ORIGINAL: self.original, Frame.MODEL: self.model, Frame.RELATIVE: RELATIVE}[frame]

    def box(self, box: Box, source: Frame, target: Frame) -> Box:
        """The same box (XYXY) in another frame."""
        sx, sy = self._scale(source, target)
        return box[0] * sx, box[1] * sy, box[2] * sx, box[3] * sy

    def points(self, points: PointPair, source: Frame, target: Frame) -> PointPair:
        """The same two points (XY) in another frame."""
        sx, sy = self._scale(source, target)
        (ax, ay), (bx, by) = points
        return (ax * sx, ay * sy), (bx * sx, by * sy)

    def _scale(self, source: Frame, target: Frame) -> tuple[float, float]:
        old, new = self.size(source), self.size(target)
        return new.width / old.width, new.height / old.height


@dataclass(frozen=True, kw_only=True)
class ResizeRule:
    """The rule by which a Qwen-VL processor resizes an image, which determines the model frame.

    It is `smart_resize` of the Qwen2-VL image processor, with the same defaults. The aspect ratio is preserved as
    closely as the constraints allow.
    """

    factor: int = 28
    """Both sides are multiples of this: patch size times merge size."""
    min_pixels: int = 56 * 56
    """Lower limit of the area."""
    max_pixels: int = 28 * 28 * 1280
    """Upper limit of the area, which is 1280 visual tokens by default."""

    def model_size(self, original: Size) -> Size:
        """The extent of the model frame for an image of a given size.

        Raises ValueError for an aspect ratio over 200, which the processor rejects as well.
        """
        height, width = original.height, original.width
        if max(height, width) > 200 * min(height, width):
            raise Mistake(f"an image of {width}x{height} px has an aspect ratio over 200; crop it first")
        new_height, new_width = (round(side / self.factor) * self.factor for side in (height, width))
        if new_height * new_width > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            new_height, new_width = (
                max(1, math.floor(side / shrink / self.factor)) * self.factor for side in (height, width)
            )
        elif new_height * new_width < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            new_height, new_width = (math.ceil(side * grow / self.factor) * self.factor for side in (height, width))
        return Size(new_width, new_height)
