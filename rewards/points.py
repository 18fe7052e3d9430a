"""Terms that compare the two predicted key points with the reference points.

The published terms (Yan et al., 2025, arXiv:2508.08177; docs/rewards.md, "Terms") are smoothed and damped; the options
`smooth` and `damped` set the strength of each, from 0 (the raw value) to 1 (as published). Malformed points give 0; a
malformed box does not lower the published terms. The order of the two points never matters.
"""

import math

from rewards.box import contains, relative_error
from rewards.case import Case
from rewards.options import Pixels, Share
from rewards.smoothing import blend, damp, sexp, slog
from umrg.frames import Point, PointPair
from umrg.metrics import pdice_published

_SPREAD = 10.0
"""Least distance of the two points, in pixels of the thresholds, as published."""


def points_dice(case: Case, *, smooth: Share = 1.0, damped: Share = 1.0) -> float:
    """slog of the published d = 2I/(A + B - I) of the two circles, damped. Raw value: d. Because d goes up to 2 and the
    reward is clamped to 1, all pairs of circles with an IoU of at least one half get the full reward."""
    points = case.answer.points
    if points is None:
        return 0.0
    overlap = pdice_published(points, case.reference.points)
    return _damped(blend(overlap, slog(overlap), smooth), case, damped)


def points_align(case: Case, *, smooth: Share = 1.0, damped: Share = 1.0) -> float:
    """sexp (c = 1) of the relative error e, damped: e is the mean absolute difference of the four coordinates, in the
    better of the two orders, divided by the reference box's diagonal, at most 2. Raw value: 1 - e/2."""
    points, reference = case.answer.points, case.reference
    if points is None:
        return 0.0
    (first, second), (a, b) = points, reference.points
    straight = _city_block(first, a) + _city_block(second, b)
    crossed = _city_block(first, b) + _city_block(second, a)
    diagonal = math.dist(reference.box[:2], reference.box[2:])
    error = relative_error(min(straight, crossed) / 4, diagonal)
    return _damped(blend(1.0 - error / 2.0, sexp(error, centre=1.0), smooth), case, damped)


def points_angle(case: Case, *, smooth: Share = 1.0, damped: Share = 1.0) -> float:
    """slog of |cos| of the angle between the lines through the two pairs, damped. Raw value: |cos|, which is 0 if the
    two points of one pair coincide, and 1 if those of both do."""
    points = case.answer.points
    if points is None:
        return 0.0
    cosine = _abs_cosine(points, case.reference.points)
    return _damped(blend(cosine, slog(cosine), smooth), case, damped)


def points_near(case: Case, *, distance: Pixels = 100.0) -> float:
    """1 if both points lie in the predicted box and their mean distance from the reference points, in the better of the
    two orders, is below the threshold, else 0."""
    box, points = case.answer.box, case.answer.points
    if box is None or points is None:
        return 0.0
    (first, second), (a, b) = points, case.reference.points
    straight = math.dist(first, a) + math.dist(second, b)
    crossed = math.dist(first, b) + math.dist(second, a)
    near = min(straight, crossed) / 2 < distance * case.pixel
    return float(near and contains(box, first) and contains(box, second))


def points_position_valid(case: Case) -> float:
    """1, halved for each predicted point outside the reference box."""
    points, box = case.answer.points, case.reference.box
    if points is None:
        return 0.0
    return (1.0 if contains(box, points[0]) else 0.5) * (1.0 if contains(box, points[1]) else 0.5)


def points_spread_valid(case: Case) -> float:
    """1 if the two points are more than 10 px (`case.pixel`) apart, else 0.5."""
    points = case.answer.points
    if points is None:
        return 0.0
    return 1.0 if math.dist(*points) > _SPREAD * case.pixel else 0.5


def _damped(reward: float, case: Case, strength: float) -> float:
    return damp(reward, points_position_valid(case), points_spread_valid(case), strength)


def _city_block(a: Point, b: Point) -> float:
    return abs(a[0] - b[0]) + abs(a[1] - b[1])


def _abs_cosine(a: PointPair, b: PointPair) -> float:
    (ax, ay), (bx, by) = _direction(a), _direction(b)
    if (ax, ay) == (bx, by):
        return 1.0
    return min(1.0, abs(ax * bx + ay * by))


def _direction(points: PointPair) -> Point:
    """Unit vector from the first point to the second; (0, 0) if they coincide."""
    (ax, ay), (bx, by) = points
    length = math.hypot(bx - ax, by - ay)
    return ((bx - ax) / length, (by - ay) / length) if length > 0.0 else (0.0, 0.0)
