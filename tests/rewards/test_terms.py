"""What holds for the reward terms whatever the answer."""

import json
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rewards.box import bbox_align, bbox_area_valid, bbox_iou, bbox_iou_above, bbox_l1_below, bbox_scale
from rewards.case import Case, Drawn, Reference, Term
from rewards.format import format_strict
from rewards.mask import boundary, mask_dice, mask_iou
from rewards.points import points_align, points_angle, points_dice, points_spread_valid
from rewards.presets import MASK_TERMS, TERMS
from rewards.scoring import Scorer
from rewards.smoothing import blend, damp, sexp, slog
from rewards.text import answer_length, repetition
from umrg.answers import Answer, Form, format_answer, parse_answer
from umrg.frames import Box, Point, PointPair, Size

thorough = settings(deadline=None, max_examples=2000)

EVERYTHING = Scorer(dict.fromkeys(TERMS, 1.0))
GEOMETRY = Scorer({name: 1.0 for name in TERMS if name.startswith(("bbox", "points"))})


def answer(box: Box | None, points: PointPair | None) -> Answer:
    return Answer(think="because", form=Form.CORRECT, box=box, points=points, strict=True)


def of_box(term: Term, box: Box, reference: Reference, **options: float) -> float:
    return term(Case(answer=answer(box, None), reference=reference), **options)


def of_points(term: Term, points: PointPair, reference: Reference, **options: float) -> float:
    return term(Case(answer=answer(None, points), reference=reference), **options)


def shifted(box: Box, dx: float, dy: float) -> Box:
    return box[0] + dx, box[1] + dy, box[2] + dx, box[3] + dy


# 2,000 examples a test: few draws each, and none thrown away.
whole = st.integers(0, 840)
spots = st.tuples(whole, whole).map(lambda p: (float(p[0]), float(p[1])))
pairs: st.SearchStrategy[PointPair] = st.tuples(spots, spots)
corner, side = st.integers(0, 700), st.integers(1, 140)
boxes: st.SearchStrategy[Box] = st.tuples(corner, corner, side, side).map(
    lambda b: (float(b[0]), float(b[1]), float(b[0] + b[2]), float(b[1] + b[3]))
)
hundredths = st.integers(0, 100).map(lambda n: n / 100)


def reference(numbers: tuple[int, ...]) -> Reference:
    """A box of 14 px or more that holds two points more than 10 px apart, as datasets have them."""
    x, y, width, height, ax, ay, bx, by = numbers
    box = (float(x), float(y), float(x + 26 + width), float(y + 14 + height))
    # One point in the left third of the box or so, the other at least 11 px further to the right.
    half = 6 + width // 2
    first = (float(x + ax % half), float(y + ay % (15 + height)))
    second = (float(x + half + 11 + bx % (half - 3)), float(y + by % (15 + height)))
    return Reference(box=box, points=(first, second), size=Size(840, 840))


place = st.integers(0, 600)
references = st.tuples(place, place, place, place, place, place, place, place).map(
    lambda n: reference((n[0], n[1], n[2] // 4, n[3] // 4, *n[4:]))
)


def degenerate_reference(numbers: tuple[int, ...]) -> Reference:
    """A target of one pixel's width or height, and points that may be one."""
    x, y, width, height = map(float, numbers)
    return Reference(box=(x, y, x + width, y + height), points=((x, y), (x + width, y)), size=Size(4, 4))


few = st.integers(0, 3)
flag = st.integers(0, 1)
degenerate_references = st.tuples(few, few, flag, flag).map(degenerate_reference)

numbers = st.one_of(st.integers(), st.integers(0, 5), st.floats(), st.floats(0, 840), st.none(), st.text(max_size=3))
fields = st.dictionaries(
    st.sampled_from(["bbox", "points_1", "points_2", "note"]),
    st.one_of(st.lists(numbers, min_size=2, max_size=2), st.lists(numbers, min_size=4, max_size=4), numbers),
)
completions = st.one_of(
    st.text(),
    st.builds("<think>{}</think><answer>{}</answer>".format, st.text(), fields.map(json.dumps)),
    st.builds("<answer>{}</answer>".format, fields.map(str)),
    st.builds(lambda box, points: format_answer(box=box, points=points, think=None), boxes, pairs),
)
tiny_masks = arrays(np.bool_, (5, 7))


@thorough
@given(completions, st.one_of(references, degenerate_references), tiny_masks, tiny_masks)
def test_any_text_gets_a_finite_reward_in_range(
    completion: str, reference: Reference, mask: np.ndarray, target: np.ndarray
) -> None:
    reference = replace(reference, mask=target)
    reward = EVERYTHING.score(parse_answer(completion), reference, Drawn.of(mask, reference))
    assert set(reward.parts) == set(TERMS)
    assert all(0.0 <= value <= 1.0 for value in reward.parts.values())
    assert 0.0 <= reward.total <= EVERYTHING.maximum


@thorough
@given(references, st.booleans(), tiny_masks)
def test_the_reference_itself_gets_the_maximum_of_every_term(
    reference: Reference, swap: bool, mask: np.ndarray
) -> None:
    points = reference.points[::-1] if swap else reference.points
    completion = format_answer(box=reference.box, points=(points[0], points[1]), think="because")
    reference = replace(reference, mask=mask)
    reward = EVERYTHING.score(parse_answer(completion), reference, Drawn.of(mask, reference))
    assert set(reward.parts.values()) == {1.0}


def test_a_target_without_area_can_be_hit() -> None:
    for width, height in [(0, 0), (0, 1), (1, 0)]:
        reference = degenerate_reference((2, 3, width, height))
        assert all(of_box(term, reference.box, reference) == 1 for term in (bbox_iou, bbox_align, bbox_scale))


@thorough
@given(references, boxes, pairs)
def test_the_order_of_the_points_does_not_matter(reference: Reference, box: Box, points: PointPair) -> None:
    straight, swapped = (GEOMETRY.score(answer(box, pair), reference) for pair in (points, (points[1], points[0])))
    assert straight.parts == pytest.approx(swapped.parts, abs=1e-9)


def moved_alike(
    move: Callable[[Point], Point], box: Box, points: PointPair, reference: Reference, *, size: Size
) -> tuple[Answer, Reference]:
    """Answer and reference after the same move of the plane."""

    def box_moved(b: Box) -> Box:
        (ax, ay), (bx, by) = move((b[0], b[1])), move((b[2], b[3]))
        return min(ax, bx), min(ay, by), max(ax, bx), max(ay, by)

    def pair_moved(pair: PointPair) -> PointPair:
        return move(pair[0]), move(pair[1])

    there = Reference(box=box_moved(reference.box), points=pair_moved(reference.points), size=size)
    return answer(box_moved(box), pair_moved(points)), there


@thorough
@given(references, boxes, pairs, st.integers(-500, 500), st.integers(-500, 500), st.booleans(), st.booleans())
def test_shifting_mirroring_and_transposing_everything_changes_nothing(
    reference: Reference, box: Box, points: PointPair, dx: int, dy: int, mirrored: bool, transposed: bool
) -> None:
    def move(point: Point) -> Point:
        x, y = point[::-1] if transposed else point
        return (-x if mirrored else x) + dx, y + dy

    here = GEOMETRY.score(answer(box, points), reference)
    there = GEOMETRY.score(*moved_alike(move, box, points, reference, size=reference.size))
    assert there.parts == pytest.approx(here.parts, abs=1.01e-4)


@thorough
@given(references, boxes, pairs, st.sampled_from([0.25, 0.5, 2.0, 4.0]))
def test_a_scaled_image_gives_the_same_reward(reference: Reference, box: Box, points: PointPair, k: float) -> None:
    """Thresholds in pixels grow with the image, as they do unless a published preset is asked for."""
    size = Size(int(840 * k), int(840 * k))
    here = GEOMETRY.score(answer(box, points), reference)
    there = GEOMETRY.score(*moved_alike(lambda p: (p[0] * k, p[1] * k), box, points, reference, size=size))
    assert there.parts == pytest.approx(here.parts, abs=1.01e-4)


def on_the_way(box: Box, target: Box, share: float) -> Box:
    """Every edge moved towards the target's by that share of the way."""
    x1, y1, x2, y2 = ((1 - share) * a + share * b for a, b in zip(box, target, strict=True))
    return x1, y1, x2, y2


@thorough
@given(references, boxes, hundredths, hundredths, hundredths)
def test_a_box_whose_edges_all_come_nearer_never_scores_worse(
    reference: Reference, box: Box, a: float, b: float, smooth: float
) -> None:
    far, near = (on_the_way(box, reference.box, share) for share in sorted((a, b)))
    for term in (bbox_iou, bbox_align, bbox_scale):
        better, worse = (of_box(term, each, reference, smooth=smooth, damped=0) for each in (near, far))
        assert better >= worse - 1e-4  # a rounding at the fourth place
    for threshold in (bbox_iou_above, bbox_l1_below):
        assert of_box(threshold, near, reference) >= of_box(threshold, far, reference)


@thorough
@given(references, boxes, hundredths, hundredths)
def test_damping_costs_such_a_box_only_where_its_area_leaves_the_valid_range(
    reference: Reference, box: Box, a: float, b: float
) -> None:
    """On its way from wide and low to narrow and high, a box may be too large for a while; 0.075 is all that costs."""
    far, near = (on_the_way(box, reference.box, share) for share in sorted((a, b)))
    leaves = of_box(bbox_area_valid, near, reference) < of_box(bbox_area_valid, far, reference)
    for term in (bbox_iou, bbox_align, bbox_scale):
        loss = of_box(term, far, reference) - of_box(term, near, reference)
        assert loss <= (0.075 if leaves else 0) + 1e-4


def test_a_better_box_that_damping_scores_worse() -> None:
    reference = Reference(box=(0, 0, 100, 100), points=((50, 50), (50, 61)), size=Size(840, 840))
    # 490x39 px, 1.9 times the reference's area; a tenth of the way to it 451x45 px, 2.03 times.
    wide: Box = (-195, 31, 295, 70)
    better = on_the_way(wide, reference.box, 0.1)
    for term in (bbox_iou, bbox_align):
        assert of_box(term, better, reference, damped=0) > of_box(term, wide, reference, damped=0)
        assert of_box(term, better, reference) < of_box(term, wide, reference)


@thorough
@given(references, st.integers(-300, 300), st.integers(-300, 300), hundredths)
def test_a_box_shifted_less_never_scores_worse(reference: Reference, dx: int, dy: int, share: float) -> None:
    far, near = shifted(reference.box, dx, dy), shifted(reference.box, dx * share, dy * share)
    for term in (bbox_iou, bbox_align):
        # Rounding of the shifted area at the limits of validity aside, nearer is never worse.
        assert of_box(term, near, reference) >= of_box(term, far, reference) - 1e-4


@thorough
@given(references, st.integers(0, 200), st.integers(0, 200))
def test_a_tighter_box_around_the_target_never_scores_worse(reference: Reference, a: int, b: int) -> None:
    x1, y1, x2, y2 = reference.box
    tight, loose = ((x1 - d, y1 - d, x2 + d, y2 + d) for d in sorted((a, b)))
    for term in (bbox_iou, bbox_align, bbox_scale):
        assert of_box(term, tight, reference) >= of_box(term, loose, reference)


@thorough
@given(references, pairs, hundredths, hundredths)
def test_points_that_come_nearer_never_align_worse(reference: Reference, points: PointPair, a: float, b: float) -> None:
    """In the order of the two in which they are nearer; this does not hold for the circles, whose size changes."""
    (px, py), (qx, qy) = reference.points

    def moved(share: float) -> PointPair:
        straight = sum(abs(u - v) for u, v in zip((*points[0], *points[1]), (px, py, qx, qy), strict=True))
        crossed = sum(abs(u - v) for u, v in zip((*points[0], *points[1]), (qx, qy, px, py), strict=True))
        ends = (px, py, qx, qy) if straight <= crossed else (qx, qy, px, py)
        ax, ay, bx, by = on_the_way((*points[0], *points[1]), ends, share)
        return (ax, ay), (bx, by)

    far, near = (of_points(points_align, moved(share), reference, damped=0) for share in sorted((a, b)))
    assert near >= far - 1e-4


@thorough
@given(tiny_masks, tiny_masks, st.integers(0, 34))
def test_a_mask_with_one_pixel_put_right_never_scores_worse(mask: np.ndarray, target: np.ndarray, pixel: int) -> None:
    """Of Dice and IoU; a pixel put right may make an outline more ragged."""
    better = mask.copy()
    better.flat[pixel] = target.flat[pixel]
    reference = replace(degenerate_reference((0, 0, 1, 1)), mask=target)
    well_formed = answer(reference.box, reference.points)
    for term in (mask_dice, mask_iou):
        after, before = (
            term(Case(answer=well_formed, reference=reference, drawn=Drawn.of(each, reference)))
            for each in (better, mask)
        )
        assert after >= before


@thorough
@given(tiny_masks, tiny_masks)
def test_masks_are_compared_symmetrically(a: np.ndarray, b: np.ndarray) -> None:
    references = [replace(degenerate_reference((0, 0, 1, 1)), mask=mask) for mask in (a, b)]
    well_formed = answer(references[0].box, references[0].points)
    for term in MASK_TERMS.values():
        there, back = (
            term(Case(answer=well_formed, reference=reference, drawn=Drawn.of(mask, reference)))
            for mask, reference in zip((b, a), references, strict=True)
        )
        assert there == pytest.approx(back)


@thorough
@given(st.text(), st.text(), st.integers(1, 60), st.integers(1, 60), st.integers(1, 5))
def test_longer_text_is_never_worth_more_and_a_loop_ever_less(
    text: str, more: str, limit: int, fade: int, n: int
) -> None:
    def case(written: str) -> Case:
        return Case(answer=parse_answer(written), reference=degenerate_reference((0, 0, 1, 1)))

    assert answer_length(case(text + more), limit=limit, fade=fade) <= answer_length(case(text), limit=limit, fade=fade)
    loop = [repetition(case(f"{text} " * times), n=n) for times in (8, 16)]
    assert loop[1] <= loop[0] <= 1


def test_a_malformed_box_takes_nothing_from_the_points() -> None:
    reference = Reference(box=(0, 0, 100, 100), points=((20, 20), (80, 80)), size=Size(840, 840))
    parts = Scorer.of_preset("hard").score(answer(None, reference.points), reference).parts
    assert [parts[name] for name in ("bbox_iou", "bbox_align", "bbox_scale")] == [0, 0, 0]
    assert [parts[name] for name in ("points_dice", "points_align", "points_angle")] == [1, 1, 1]


def test_circles_of_half_an_iou_get_the_full_points_reward() -> None:
    reference = Reference(box=(0, 0, 100, 100), points=((0, 50), (100, 50)), size=Size(840, 840))
    inner = math.sqrt(0.5) * 50
    points = ((50 - inner, 50.0), (50 + inner, 50.0))
    assert points_dice(Case(answer=answer(None, points), reference=reference)) == 1
    smaller = ((55 - inner, 50.0), (45 + inner, 50.0))
    assert points_dice(Case(answer=answer(None, smaller), reference=reference)) < 1


def test_crossed_lines_have_the_least_angle_reward() -> None:
    reference = Reference(box=(0, 0, 100, 100), points=((0, 50), (100, 50)), size=Size(840, 840))
    crossed = points_angle(Case(answer=answer(None, ((50, 0), (50, 100))), reference=reference))
    one_point = points_angle(Case(answer=answer(None, ((50, 50), (50, 50))), reference=reference))
    assert (crossed, one_point) == (0.1, 0.0925)


def test_the_spread_of_points_is_measured_in_pixels_of_the_released_frame() -> None:
    reference = Reference(box=(0, 0, 100, 100), points=((0, 0), (50, 50)), size=Size(420, 315))
    case = Case(answer=answer(None, ((10, 10), (18, 10))), reference=reference)
    assert points_spread_valid(case) == 0.5
    assert points_spread_valid(replace(case, pixel=420 / 840)) == 1
    spread = {"points_spread_valid": 1.0}
    assert Scorer(spread, published=False).score(case.answer, reference).total == 1
    assert Scorer(spread, published=True).score(case.answer, reference).total == 0.5


@pytest.mark.parametrize(("side", "valid"), [(70, 0.5), (72, 1.0), (141, 1.0), (142, 0.5)])
def test_areas_from_half_to_twice_the_reference_are_valid(side: float, valid: float) -> None:
    reference = Reference(box=(0, 0, 100, 100), points=((1, 1), (2, 2)), size=Size(840, 840))
    # 70² and 142² lie just outside (5000, 20000), 72² and 141² just inside.
    assert bbox_area_valid(Case(answer=answer((0, 0, side, side), None), reference=reference)) == valid


def test_smoothing_runs_between_its_published_ends() -> None:
    assert (slog(0), slog(1)) == pytest.approx((0.1, 1))
    assert [sexp(v, centre=c) for c in (0.5, 1.0) for v in (0, 2)] == pytest.approx([1, 0.1, 1, 0.1])
    assert sexp(1, centre=1.0) == pytest.approx(0.55)  # the middle of a symmetric curve
    assert slog(1 / 3) == pytest.approx(0.55)  # ln 2 is half of ln 4


def test_damping_takes_at_most_three_tenths() -> None:
    assert [damp(1, v, v) for v in (0, 0.5, 1)] == [0.7, 0.85, 1]
    assert damp(1.3, 1, 1) == 1
    assert damp(1 / 3, 1, 1) == 0.3333


def test_blending_is_exact_at_both_ends() -> None:
    assert [blend(0.1, 0.7, strength) for strength in (0, 1)] == [0.1, 0.7]
    assert damp(0.5, 0, 0, strength=0) == 0.5


def text_case(text: str, *, think: bool = True) -> Case:
    return Case(answer=parse_answer(text), reference=degenerate_reference((0, 0, 1, 1)), think=think)


def test_length_is_full_up_to_its_limit_and_falls_linearly() -> None:
    values = [answer_length(text_case("x" * length), limit=10, fade=4) for length in (0, 10, 11, 12, 14, 99)]
    assert values == [1, 1, 0.75, 0.5, 0, 0]


def test_repetition_counts_distinct_word_triples() -> None:
    assert repetition(text_case("the left kidney filters blood")) == 1
    assert repetition(text_case("so it is so it is so it is so")) == 3 / 8  # eight triples, of three kinds
    assert repetition(text_case("no no")) == repetition(text_case("")) == 1
    assert repetition(text_case("no no yes no"), n=1) == 0.5


@pytest.mark.parametrize("think", [True, False])
def test_strict_form_is_just_the_blocks_that_were_asked_for(think: bool) -> None:
    blocks = "<think>a</think><answer></answer>" if think else "<answer></answer>"
    assert format_strict(text_case(f" {blocks}\n", think=think)) == 1
    assert format_strict(text_case(blocks, think=not think)) == 0
    assert format_strict(text_case(f"{blocks} So.", think=think)) == 0


def test_the_boundary_tolerance_grows_with_the_image() -> None:
    target, mask = np.zeros((2, 80, 80), dtype=np.bool_)
    target[20:60, 20:60], mask[20:60, 22:62] = True, True
    reference = Reference(box=(20, 20, 59, 59), points=((30, 30), (50, 50)), size=Size(80, 80), mask=target)
    case = Case(answer=answer(reference.box, reference.points), reference=reference, drawn=Drawn.of(mask, reference))
    assert boundary(case, tolerance=2) == 1  # shifted by 2 px
    assert boundary(case, tolerance=1.9) < 1
    assert boundary(replace(case, pixel=0.5), tolerance=2) < 1
