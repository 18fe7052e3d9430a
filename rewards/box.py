"""Terms that compare the predicted box with the reference box.

The published terms (Yan et al., 2025, arXiv:2508.08177; docs/rewards.md, "Terms") are smoothed and damped; the options
`smooth` and `damped` set the strength of each, from 0 (the raw value) to 1 (as published). A malformed box gives 0. The
box is scored on its own: malformed points or missing keys do not lower its reward.
"""

import math
from typing import Annotated

from pydantic import Field

from rewards.case import Case
from rewards.options import Pixels, Share
from rewards.smoothing import blend, damp, sexp, slog
from umrg.frames import Box, Point
from umrg.metrics import box_area, box_iou


def bbox_iou(case: Case, *, smooth: Share = 1.0, damped: Share = 1.0) -> float:
    """slog(IoU), damped. Raw value: the IoU."""
    box, reference = case.answer.box, case.reference
    if box is None:
        return 0.0
    iou = box_iou(box, reference.box)
    return _damped(blend(iou, slog(iou), smooth), case, damped)


def bbox_align(case: Case, *, smooth: Share = 1.0, damped: Share = 1.0) -> float:
    """sexp (c = 1) of the relative error e, damped: e is the mean distance of the four edges divided by the reference
    box's diagonal, at most 2. Raw value: 1 - e/2."""
    box, reference = case.answer.box, case.reference.box
    if box is None:
        return 0.0
    error = relative_error(edge_distance(box, reference), math.dist(reference[:2], reference[2:]))
    return _damped(blend(1.0 - error / 2.0, sexp(error, centre=1.0), smooth), case, damped)


def bbox_scale(case: Case, *, smooth: Share = 1.0, damped: Share = 1.0) -> float:
    """sexp (c = 0.5) of e = min(1, √((Δ ln area)² + (Δ ln aspect)²)), damped. Raw value: 1 - e."""
    box, reference = case.answer.box, case.reference.box
    if box is None:
        return 0.0
    width = _log_ratio(box[2] - box[0], reference[2] - reference[0])
    height = _log_ratio(box[3] - box[1], reference[3] - reference[1])
    error = min(1.0, math.hypot(width + height, width - height))
    return _damped(blend(1.0 - error, sexp(error, centre=0.5), smooth), case, damped)


def bbox_iou_above(case: Case, *, threshold: Annotated[float, Field(ge=0, lt=1)] = 0.5) -> float:
    """1 if the IoU is above the threshold, else 0."""
    box = case.answer.box
    return float(box is not None and box_iou(box, case.reference.box) > threshold)


def bbox_l1_below(case: Case, *, distance: Pixels = 10.0) -> float:
    """1 if the mean distance of the four edges is below the threshold, else 0."""
    box = case.answer.box
    return float(box is not None and edge_distance(box, case.reference.box) < distance * case.pixel)


def bbox_position_valid(case: Case) -> float:
    """1, halved for each reference point outside the predicted box."""
    box = case.answer.box
    if box is None:
        return 0.0
    first, second = case.reference.points
    return (1.0 if contains(box, first) else 0.5) * (1.0 if contains(box, second) else 0.5)


def bbox_area_valid(case: Case) -> float:
    """1 if the predicted area is more than half and less than twice the reference area, else 0.5."""
    box = case.answer.box
    if box is None:
        return 0.0
    area, reference = box_area(box), box_area(case.reference.box)
    # The strict bounds can never hold for a reference without area, such as a line of pixels.
    return 1.0 if 0.5 * reference < area < 2.0 * reference or area == reference else 0.5


def contains(box: Box, point: Point) -> bool:
    """Whether the point (XY) lies in the box (XYXY) or on its edge."""
    return box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3]


def edge_distance(a: Box, b: Box) -> float:
    """Mean absolute difference of the four edges of two boxes (XYXY)."""
    return (abs(a[0] - b[0]) + abs(a[1] - b[1]) + abs(a[2] - b[2]) + abs(a[3] - b[3])) / 4


def relative_error(error: float, scale: float) -> float:
    """min(2, error / scale). For a reference without extent, 0 if there is no error and 2 otherwise."""
    if error == 0.0:
        return 0.0
    return min(2.0, error / scale) if scale > 0.0 else 2.0


def _damped(reward: float, case: Case, strength: float) -> float:
    return damp(reward, bbox_position_valid(case), bbox_area_valid(case), strength)


def _log_ratio(side: float, reference: float) -> float:
    """ln(side / reference); infinite if only one of them is zero."""
    # Before the logarithms: two sides of zero length are equal.
    if side == reference:
        return 0.0
    return math.log(side) - math.log(reference) if side > 0.0 and reference > 0.0 else math.inf
