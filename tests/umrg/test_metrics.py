"""The metrics against counting cells, integrating chords, and other people's implementations."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from umrg.frames import Box, PointPair
from umrg.metrics import (
    box_area,
    box_iou,
    circle_overlap,
    mask_dice,
    mask_iou,
    pdice,
    pdice_published,
    surface_dice,
)

relaxed = settings(deadline=None, max_examples=300)

cell = st.integers(0, 20)
span = st.lists(cell, min_size=2, max_size=2).map(sorted)
boxes = st.builds(lambda x, y: (x[0], y[0], x[1], y[1]), span, span)
number = st.floats(-100, 100)
pairs = st.tuples(st.tuples(number, number), st.tuples(number, number))
masks = arrays(np.bool_, (5, 7))


def cells(box: Box) -> set[tuple[int, int]]:
    """The unit cells that a box of whole numbers covers."""
    x1, y1, x2, y2 = map(int, box)
    return {(x, y) for x in range(x1, x2) for y in range(y1, y2)}


@relaxed
@given(boxes, boxes)
def test_box_iou_counts_cells(a: Box, b: Box) -> None:
    covered, both = cells(a) | cells(b), cells(a) & cells(b)
    assert box_area(a) == len(cells(a))
    assert box_iou(a, b) == pytest.approx(len(both) / len(covered) if covered else float(a == b))
    assert box_iou(a, b) == box_iou(b, a)


def test_equal_boxes_without_area_are_equal() -> None:
    assert box_iou((3, 4, 3, 9), (3, 4, 3, 9)) == 1
    assert box_iou((3, 4, 3, 9), (5, 4, 5, 9)) == 0


def chord_overlap(a: PointPair, b: PointPair) -> float:
    """Area of the intersection of two circles, by adding up the overlap of their vertical chords."""
    (ax, ay), (bx, by) = a
    (cx, cy), (dx, dy) = b
    first = ((ax + bx) / 2, (ay + by) / 2, math.hypot(ax - bx, ay - by) / 2)
    second = ((cx + dx) / 2, (cy + dy) / 2, math.hypot(cx - dx, cy - dy) / 2)
    left = min(x - r for x, _, r in (first, second))
    right = max(x + r for x, _, r in (first, second))
    x, step = np.linspace(left, right, 20_001, retstep=True)
    halves = [np.sqrt(np.maximum(0, r * r - (x - cx) ** 2)) for cx, _, r in (first, second)]
    top = np.minimum(first[1] + halves[0], second[1] + halves[1])
    bottom = np.maximum(first[1] - halves[0], second[1] - halves[1])
    inside = (halves[0] > 0) & (halves[1] > 0)
    return float(np.sum(np.maximum(0, top - bottom)[inside]) * step)


@relaxed
@given(pairs, pairs)
def test_circles_overlap_as_their_chords_do(a: PointPair, b: PointPair) -> None:
    area_a, area_b, intersection = circle_overlap(a, b)
    assert area_a == pytest.approx(math.pi * math.dist(*a) ** 2 / 4)
    assert area_b == pytest.approx(math.pi * math.dist(*b) ** 2 / 4)
    assert intersection == pytest.approx(chord_overlap(a, b), rel=1e-3, abs=0.05)


@relaxed
@given(pairs, pairs)
def test_both_pdices_are_functions_of_the_circles_iou(a: PointPair, b: PointPair) -> None:
    area_a, area_b, intersection = circle_overlap(a, b)
    union = area_a + area_b - intersection
    iou = intersection / union if union > 0 else float(set(a) == set(b))
    assert pdice(a, b) == pytest.approx(2 * iou / (1 + iou))
    assert pdice_published(a, b) == pytest.approx(2 * iou)
    assert 0 <= pdice(a, b) <= 1 and 0 <= pdice_published(a, b) <= 2


@given(pairs)
def test_the_same_circle_overlaps_wholly(points: PointPair) -> None:
    swapped = (points[1], points[0])
    assert (pdice(points, swapped), pdice_published(points, swapped)) == (1, 2)
    assert (pdice(points, points), pdice_published(points, points)) == (1, 2)


@pytest.mark.parametrize("length", [1e-9, 1.0, 1e9])
def test_a_lens_is_the_same_share_of_circles_of_any_size(length: float) -> None:
    a = ((0.0, 0.0), (length, 0.0))
    b = ((0.5 * length, 0.0), (1.5 * length, 0.0))
    area, _, intersection = circle_overlap(a, b)
    # The lens of two unit circles whose centres are one radius apart.
    share = (2 * math.pi / 3 - math.sqrt(3) / 2) / math.pi
    assert intersection == pytest.approx(share * area, rel=1e-12, abs=0)


@pytest.mark.parametrize(("a", "b"), [(1e-200, 1e-200), (1e-160, 1e-100), (1e9, 1e-9), (1e9, 10)])
def test_circles_of_extreme_sizes_overlap_by_no_more_than_the_smaller(a: float, b: float) -> None:
    first, second = ((0.0, 0.0), (a, 0.0)), ((a - b / 2, 0.0), (a + b / 2, 0.0))
    area_a, area_b, intersection = circle_overlap(first, second)
    assert 0 <= intersection <= min(area_a, area_b)
    assert 0 <= pdice(first, second) <= 1


@given(masks, masks)
def test_masks_are_compared_pixel_by_pixel(a: np.ndarray, b: np.ndarray) -> None:
    first, second = ({tuple(i) for i in np.argwhere(m).tolist()} for m in (a, b))
    if first | second:
        assert mask_dice(a, b) == pytest.approx(2 * len(first & second) / (len(first) + len(second)))
        assert mask_iou(a, b) == pytest.approx(len(first & second) / len(first | second))
    else:
        assert mask_dice(a, b) == mask_iou(a, b) == 1


@pytest.mark.parametrize("metric", [mask_dice, mask_iou, lambda a, b: surface_dice(a, b, tolerance=1)])
def test_masks_of_two_sizes_are_refused(metric) -> None:
    with pytest.raises(ValueError, match="resize one"):
        metric(np.zeros((2, 3), dtype=np.bool_), np.zeros((3, 2), dtype=np.bool_))


def blobs(rng: np.random.Generator, *, count: int = 2) -> np.ndarray:
    """A mask of a few ellipses, some of which reach over the border, with ragged edges."""
    height, width = rng.integers(20, 90, size=2)
    y, x = np.mgrid[:height, :width]
    inside = np.zeros((height, width), dtype=np.bool_)
    for _ in range(count):
        cx, cy, rx, ry = rng.uniform((0, 0, 3, 3), (width, height, 30, 30))
        inside |= ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 < 1 + 0.2 * rng.standard_normal((height, width))
    return inside


def mask_pairs(count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Masks, and what is left of each after a shift and some noise."""
    rng = np.random.default_rng(5)
    first = [blobs(rng) for _ in range(count)]
    return [(a, np.roll(a, rng.integers(-4, 5, size=2), axis=(0, 1)) ^ (rng.random(a.shape) < 0.01)) for a in first]


def test_box_iou_is_torchvisions() -> None:
    from torchvision.ops import box_iou as torchvisions

    rng = np.random.default_rng(3)
    corners = np.sort(rng.uniform(0, 100, size=(2, 200, 2, 2)), axis=2)
    first, second = corners.reshape(2, 200, 4)
    theirs = torchvisions(torch.from_numpy(first), torch.from_numpy(second)).diagonal()
    ours = [box_iou(tuple(a), tuple(b)) for a, b in zip(first.tolist(), second.tolist(), strict=True)]
    assert ours == pytest.approx(theirs.tolist(), abs=1e-12)


def test_mask_dice_and_iou_are_monais() -> None:
    from monai.metrics import compute_dice, compute_iou

    for a, b in mask_pairs(40):
        first, second = (torch.from_numpy(mask)[None, None].double() for mask in (a, b))
        assert mask_dice(a, b) == pytest.approx(float(compute_dice(first, second)), abs=1e-6)
        assert mask_iou(a, b) == pytest.approx(float(compute_iou(first, second)), abs=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("tolerance", [0, 1, 1.5, 2, 5])
def test_surface_dice_is_that_of_the_package_surface_distance(tolerance: float) -> None:
    from surface_distance import compute_surface_dice_at_tolerance, compute_surface_distances

    for a, b in mask_pairs(40):
        distances = compute_surface_distances(b, a, (1, 1))
        theirs = compute_surface_dice_at_tolerance(distances, tolerance)
        assert surface_dice(a, b, tolerance=tolerance) == pytest.approx(theirs, abs=1e-9)


@relaxed
@given(masks, masks, st.floats(0, 3), st.floats(0, 3))
def test_surface_dice_is_symmetric_and_grows_with_the_tolerance(a: np.ndarray, b: np.ndarray, s: float, t: float):
    small, large = sorted((s, t))
    # Sums of lengths round.
    assert 0 <= surface_dice(a, b, tolerance=small) <= surface_dice(a, b, tolerance=large) + 1e-12 <= 1 + 2e-12
    assert surface_dice(a, b, tolerance=s) == pytest.approx(surface_dice(b, a, tolerance=s))
    assert surface_dice(a, a, tolerance=s) == 1


def test_surface_dice_of_empty_masks() -> None:
    empty, one = np.zeros((5, 7), dtype=np.bool_), np.eye(5, 7, dtype=np.bool_)
    assert surface_dice(empty, empty, tolerance=2) == 1
    assert surface_dice(empty, one, tolerance=99) == surface_dice(one, empty, tolerance=99) == 0
