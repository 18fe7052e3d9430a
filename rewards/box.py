"""The box against the reference box: published terms (DESIGN section 4), smoothed and damped.

A malformed box gives 0. The box counts by itself: malformed points or missing keys take nothing from it.
"""

import math

from rewards.case import Case
from rewards.smoothing import damp, sexp, slog
from umrg.frames import Box, Point
from umrg.metrics import box_area, box_iou


def bbox_iou(case: Case) -> float:
    """slog of the boxes' IoU, damped."""
    box, reference = case.answer.box, case.reference
    if box is None:
        return 0.0
    return damp(slog(box_iou(box, reference.box)), bbox_position_valid(case), bbox_area_valid(case))


def bbox_align(case: Case) -> float:
    """sexp (c = 1) of the mean distance of the four edges over the reference box's diagonal, damped."""
    box, reference = case.answer.box, case.reference.box
    if box is None:
        return 0.0
    edges = sum(abs(a - b) for a, b in zip(box, reference, strict=True)) / 4
    error = relative_error(edges, math.dist(reference[:2], reference[2:]))
    return damp(sexp(error, centre=1.0), bbox_position_valid(case), bbox_area_valid(case))


def bbox_scale(case: Case) -> float:
    """sexp (c = 0.5) of min(1, √(Δln area² + Δln aspect²)), damped."""
    box, reference = case.answer.box, case.reference.box
    if box is None:
        return 0.0
    width = _log_ratio(box[2] - box[0], reference[2] - reference[0])
    height = _log_ratio(box[3] - box[1], reference[3] - reference[1])
    error = min(1.0, math.hypot(width + height, width - height))
    return damp(sexp(error, centre=0.5), bbox_position_valid(case), bbox_area_valid(case))


def bbox_position_valid(case: Case) -> float:
    """Product of 0.5 for each reference point outside the predicted box."""
    box = case.answer.box
    if box is None:
        return 0.0
    first, second = case.reference.points
    return (1.0 if contains(box, first) else 0.5) * (1.0 if contains(box, second) else 0.5)


def bbox_area_valid(case: Case) -> float:
    """1 if the predicted area is more than half and less than twice the reference's, else 0.5."""
    box = case.answer.box
    if box is None:
        return 0.0
    area, reference = box_area(box), box_area(case.reference.box)
    # Equality matters for a reference without area, such as a line of pixels.
    return 1.0 if 0.5 * reference < area < 2.0 * reference or area == reference else 0.5


def contains(box: Box, point: Point) -> bool:
    """The point (XY) lies in the box (XYXY) or on its edge."""
    return box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3]


def relative_error(error: float, scale: float) -> float:
    """min(2, error / scale); of a reference without extent, 0 for no error and 2 for any."""
    if error == 0.0:
        return 0.0
    return min(2.0, error / scale) if scale > 0.0 else 2.0


def _log_ratio(side: float, reference: float) -> float:
    """ln(side / reference); infinite where only one of them is zero."""
    if side == reference:
        return 0.0
    return math.log(side) - math.log(reference) if side > 0.0 and reference > 0.0 else math.inf
