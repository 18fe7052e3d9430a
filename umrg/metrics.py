"""Metrics that compare boxes, points and masks with a reference."""

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt

from umrg.frames import Box, PointPair
from umrg.keypoints import tight_box
from umrg.mistake import Mistake

_HALF = math.sqrt(0.5)
# Length of the marching-squares outline within a 2x2 neighbourhood of pixels a b / c d, indexed by 8·a + 4·b + 2·c + d:
# 0 if all four pixels agree, half a diagonal around a single one, 1 between two adjacent pairs, and two half diagonals
# for two pixels on a diagonal.
_OUTLINE = np.array([0, _HALF, _HALF, 1, _HALF, 1, 2 * _HALF, _HALF, _HALF, 2 * _HALF, 1, _HALF, 1, _HALF, _HALF, 0])


def box_area(box: Box) -> float:
    """Area of an XYXY box as (x2 - x1)(y2 - y1), the convention of the published reward and of torchvision."""
    return _area(box[2] - box[0], box[3] - box[1])


def box_iou(a: Box, b: Box) -> float:
    """Intersection over union of two XYXY boxes in one frame, in [0, 1]. Equal boxes of zero area give 1."""
    intersection = _area(min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1]))
    union = box_area(a) + box_area(b) - intersection
    return intersection / union if union > 0 else float(a == b)


def circle_overlap(a: PointPair, b: PointPair) -> tuple[float, float, float]:
    """Areas (a, b, intersection) of the two circles that have the point pairs as diameters."""
    (ax, ay, ar), (bx, by, br) = _circle(a), _circle(b)
    area_a, area_b = math.pi * ar * ar, math.pi * br * br
    distance = math.hypot(ax - bx, ay - by)
    if distance >= ar + br:
        return area_a, area_b, 0.0
    if distance <= abs(ar - br):
        return area_a, area_b, min(area_a, area_b)
    # Law of cosines, rearranged so that products of small radii cannot underflow and cause a division by zero.
    difference = (ar - br) / distance * (ar + br)
    cos_a, cos_b = (distance + difference) / (2 * ar), (distance - difference) / (2 * br)
    kite = (ar + br - distance) * (distance + ar - br) * (distance - ar + br) * (distance + ar + br)
    sectors = ar * ar * math.acos(_clamp(cos_a)) + br * br * math.acos(_clamp(cos_b))
    lens = sectors - 0.5 * math.sqrt(max(0.0, kite))
    return area_a, area_b, max(0.0, min(lens, area_a, area_b))


def pdice(a: PointPair, b: PointPair) -> float:
    """Dice coefficient of the circles spanned by two point pairs, 2I / (A + B), in [0, 1]."""
    area_a, area_b, intersection = circle_overlap(a, b)
    total = area_a + area_b
    return min(1.0, 2 * intersection / total) if total > 0 else float(set(a) == set(b))


def pdice_published(a: PointPair, b: PointPair) -> float:
    """The "pDice" of the published evaluation code, 2I / (A + B - I), in [0, 2], which is twice the circles' IoU."""
    area_a, area_b, intersection = circle_overlap(a, b)
    union = area_a + area_b - intersection
    return min(2.0, 2 * intersection / union) if union > 0 else 2.0 * float(set(a) == set(b))


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """How two masks overlap, in pixels."""

    both: int
    """Of their intersection."""
    predicted: int
    reference: int

    @classmethod
    def of(cls, prediction: NDArray[np.bool_], reference: NDArray[np.bool_]) -> Self:
        """Of two masks, bool [H, W]. Raises ValueError if they differ in size."""
        _check_sizes(prediction, reference)
        return cls(
            both=int(np.count_nonzero(prediction & reference)),
            predicted=int(np.count_nonzero(prediction)),
            reference=int(np.count_nonzero(reference)),
        )

    @property
    def dice(self) -> float:
        """Dice coefficient, in [0, 1]. Two empty masks give 1, as for a `no_target` row."""
        total = self.predicted + self.reference
        return 2 * self.both / total if total else 1.0

    @property
    def iou(self) -> float:
        """Intersection over union, in [0, 1]. Two empty masks give 1."""
        total = self.predicted + self.reference
        return self.both / (total - self.both) if total else 1.0


def mask_dice(prediction: NDArray[np.bool_], reference: NDArray[np.bool_]) -> float:
    """`Overlap.dice` of two masks, bool [H, W]."""
    return Overlap.of(prediction, reference).dice


def mask_iou(prediction: NDArray[np.bool_], reference: NDArray[np.bool_]) -> float:
    """`Overlap.iou` of two masks, bool [H, W]."""
    return Overlap.of(prediction, reference).iou


def surface_dice(prediction: NDArray[np.bool_], reference: NDArray[np.bool_], *, tolerance: float) -> float:
    """Normalised surface Dice of two masks, bool [H, W], in [0, 1] (Nikolov et al., 2021, arXiv:1809.04430).

    It is the fraction of both outlines' length that lies within `tolerance` pixels of the other outline. Outlines are
    those of marching squares, and pixels beyond the image border count as background. Two empty masks give 1, one empty
    mask gives 0.
    """
    _check_sizes(prediction, reference)
    both = prediction | reference
    if not both.any():
        return 1.0
    # The common box holds both outlines, so the distance transforms need not cover the whole image.
    x1, y1, x2, y2 = tight_box(both)
    first, second = (_outline(mask[y1 : y2 + 1, x1 : x2 + 1]) for mask in (prediction, reference))
    far = _length_far_from(second, first, tolerance) + _length_far_from(first, second, tolerance)
    return max(0.0, 1.0 - far / float(first.sum() + second.sum()))


def _outline(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Length of a mask's outline at each pixel corner, float [H + 1, W + 1] for a mask [H, W]."""
    cells = np.pad(mask, 1).astype(np.uint8)
    lengths: NDArray[np.float64] = _OUTLINE[
        8 * cells[:-1, :-1] + 4 * cells[:-1, 1:] + 2 * cells[1:, :-1] + cells[1:, 1:]
    ]
    return lengths


def _length_far_from(other: NDArray[np.float64], outline: NDArray[np.float64], tolerance: float) -> float:
    """Length of an outline that lies farther than `tolerance` pixels from the other outline."""
    if not other.any():
        return float(outline.sum())
    return float(outline[distance_transform_edt(other == 0) > tolerance].sum())


def _area(width: float, height: float) -> float:
    return width * height if width > 0 and height > 0 else 0.0


def _check_sizes(prediction: NDArray[np.bool_], reference: NDArray[np.bool_]) -> None:
    if prediction.shape != reference.shape:
        raise Mistake(f"masks of {prediction.shape} and {reference.shape} cannot be compared; resize one")


def _circle(points: PointPair) -> tuple[float, float, float]:
    (ax, ay), (bx, by) = points
    return (ax + bx) / 2, (ay + by) / 2, math.hypot(ax - bx, ay - by) / 2


def _clamp(cosine: float) -> float:
    return max(-1.0, min(1.0, cosine))
