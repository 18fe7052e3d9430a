"""Coordinate frames, and the only place where a number changes frame.

Four frames exist. Each is an extent (width, height) laid over the whole image, so that changing frame is
a scaling of x and y, and nothing else:

- *original*: pixels of the image file. Datasets, masks, rewards and the served answer use it.
- *model*: pixels after the reasoner's processor has resized the image. Qwen2-VL and Qwen2.5-VL speak it.
- *relative*: 0-1000 along each axis. Qwen3-VL speaks it.
- *expert*: pixels of the image inside the segmenter's input, padding left out.

Boxes are XYXY with inclusive maximum, points are XY.
"""

import math
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

Point = tuple[float, float]
Box = tuple[float, float, float, float]
PointPair = tuple[Point, Point]


class Frame(StrEnum):
    """The frames an answer may be written in."""

    ORIGINAL = "original"
    MODEL = "model"
    RELATIVE = "relative"


@dataclass(frozen=True)
class Size:
    """An extent in pixels (or in thousandths, for the relative frame)."""

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
    """Scale coordinates [..., 2k], alternating x and y, from one frame's extent to another's."""
    pair = np.array([target.width / source.width, target.height / source.height])
    scale: NDArray[np.float64] = np.tile(pair, coordinates.shape[-1] // 2)
    return np.asarray(coordinates, dtype=np.float64) * scale


@dataclass(frozen=True, kw_only=True)
class Frames:
    """The frames of one image.

    original: extent of the image file. model: extent after the reasoner's processor.
    """

    original: Size
    model: Size

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
    """How a Qwen-VL processor chooses the model frame: sides are multiples of `factor` (patch x merge), the
    area lies within [min_pixels, max_pixels], and the aspect is kept as nearly as that allows.

    The rule is `smart_resize` of the Qwen2-VL image processor; the defaults are its own.
    """

    factor: int = 28
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280

    def model_size(self, original: Size) -> Size:
        """The model frame's extent for an image of this size.

        Raises ValueError for an aspect ratio over 200, which the processor refuses as well.
        """
        height, width = original.height, original.width
        if max(height, width) > 200 * min(height, width):
            raise ValueError(f"an image of {width}x{height} px has an aspect ratio over 200; crop it first")
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
