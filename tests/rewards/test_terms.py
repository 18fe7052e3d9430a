"""What holds for the reward terms whatever the answer."""

import json
import math
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rewards.box import bbox_align, bbox_area_valid, bbox_iou, bbox_scale
from rewards.case import Case, Reference
from rewards.points import points_angle, points_dice, points_spread_valid
from rewards.scoring import Reward, Scorer
from rewards.smoothing import damp, sexp, slog
from umrg.answers import Answer, Form, format_answer, parse_answer
from umrg.frames import Box, Point, PointPair, Size

relaxed = settings(deadline=None, max_examples=300)
HARD = Scorer.of_preset("hard")
SCALED = Scorer(HARD.weights, scale_pixels=True)


def answer(box: Box | None, points: PointPair | None) -> Answer:
    return Answer(think="because", form=Form.CORRECT, box=box, points=points, strict=True)


def shifted(box: Box, dx: float, dy: float) -> Box:
    return box[0] + dx, box[1] + dy, box[2] + dx, box[3] + dy


def moved(point: Point, dx: float, dy: float) -> Point:
    return point[0] + dx, point[1] + dy


def score(scorer: Scorer, box: Box, points: PointPair, reference: Reference) -> Reward:
    return scorer.score(answer(box, points), reference)


whole = st.integers(0, 840).map(float)
pairs: st.SearchStrategy[PointPair] = st.tuples(st.tuples(whole, whole), st.tuples(whole, whole))


@st.composite
def boxes(draw: st.DrawFn, least: int = 1) -> Box:
    x, y = draw(st.integers(0, 700)), draw(st.integers(0, 700))
    return (
        float(x),
        float(y),
        float(x + draw(st.integers(least, 140))),
        float(y + draw(st.integers(least, 140))),
    )


@st.composite
def references(draw: st.DrawFn) -> Reference:
    """A box that holds two points more than 10 px apart, as datasets have them."""
    box = draw(boxes(least=12))
    x, y = st.integers(int(box[0]), int(box[2])), st.integers(int(box[1]), int(box[3]))
    (ax, ay), (bx, by) = draw(st.tuples(x, y)), draw(st.tuples(x, y))
    assume(math.dist((ax, ay), (bx, by)) > 10)
    points = ((float(ax), float(ay)), (float(bx), float(by)))
    return Reference(box=box, points=points, size=Size(840, 840))


@st.composite
def degenerate_references(draw: st.DrawFn) -> Reference:
    """A target of one pixel's width or height, and points that may be one."""
    x, y = float(draw(st.integers(0, 3))), float(draw(st.integers(0, 3)))
    box = (x, y, x + draw(st.integers(0, 1)), y + draw(st.integers(0, 1)))
    return Reference(box=box, points=((x, y), (box[2], y)), size=Size(4, 4))


numbers = st.one_of(st.integers(), st.integers(0, 5), st.floats(), st.floats(0, 840), st.none(), st.text())
fields = st.dictionaries(
    st.sampled_from(["bbox", "points_1", "points_2", "note"]),
    st.one_of(st.lists(numbers, min_size=2, max_size=2), st.lists(numbers, min_size=4, max_size=4), numbers),
)
completions = st.one_of(
    st.text(),
    st.builds("<think>{}</think><answer>{}</answer>".format, st.text(), fields.map(json.dumps)),
    st.builds("<answer>{}</answer>".format, fields.map(str)),
)


@relaxed
@given(completions, st.one_of(references(), degenerate_references()))
def test_any_text_gets_a_finite_reward_in_range(completion: str, reference: Reference) -> None:
    for scorer in (HARD, SCALED):
        reward = scorer.score(parse_answer(completion), reference)
        assert all(0.0 <= value <= 1.0 for value in reward.parts.values())
        assert 0.0 <= reward.total <= scorer.maximum


@relaxed
@given(references(), st.booleans())
def test_the_reference_itself_gets_the_maximum(reference: Reference, swap: bool) -> None:
    points = reference.points[::-1] if swap else reference.points
    completion = format_answer(box=reference.box, points=(points[0], points[1]), think="because")
    assert HARD.score(parse_answer(completion), reference).total == HARD.maximum == 8


@given(degenerate_references())
def test_a_target_without_area_can_be_hit(reference: Reference) -> None:
    case = Case(answer=answer(reference.box, reference.points), reference=reference)
    assert bbox_iou(case) == bbox_align(case) == bbox_scale(case) == 1


@relaxed
@given(references(), boxes(), pairs)
def test_the_order_of_the_points_does_not_matter(reference: Reference, box: Box, points: PointPair) -> None:
    straight, swapped = (score(HARD, box, pair, reference) for pair in (points, (points[1], points[0])))
    assert straight.parts == pytest.approx(swapped.parts, abs=1e-9)


@relaxed
@given(references(), boxes(), pairs, st.integers(-500, 500), st.integers(-500, 500))
def test_a_translation_of_everything_changes_nothing(
    reference: Reference, box: Box, points: PointPair, dx: int, dy: int
) -> None:
    a, b = ((moved(p, dx, dy), moved(q, dx, dy)) for p, q in (points, reference.points))
    there = replace(reference, box=shifted(reference.box, dx, dy), points=b)
    here = score(HARD, box, points, reference)
    assert score(HARD, shifted(box, dx, dy), a, there).parts == pytest.approx(here.parts, abs=1.01e-4)


@relaxed
@given(references(), boxes(), pairs, st.sampled_from([0.25, 0.5, 2.0, 4.0]))
def test_a_scaled_image_gives_the_same_reward_where_thresholds_scale(
    reference: Reference, box: Box, points: PointPair, k: float
) -> None:
    def scaled_box(b: Box) -> Box:
        return b[0] * k, b[1] * k, b[2] * k, b[3] * k

    def scaled_pair(pair: PointPair) -> PointPair:
        (ax, ay), (bx, by) = pair
        return (ax * k, ay * k), (bx * k, by * k)

    size = Size(int(840 * k), int(840 * k))
    there = Reference(box=scaled_box(reference.box), points=scaled_pair(reference.points), size=size)
    here = score(SCALED, box, points, reference)
    assert score(SCALED, scaled_box(box), scaled_pair(points), there).parts == pytest.approx(here.parts, abs=1.01e-4)


@relaxed
@given(references(), st.integers(-300, 300), st.integers(-300, 300), st.floats(0, 1))
def test_a_box_shifted_less_never_scores_worse(reference: Reference, dx: int, dy: int, share: float) -> None:
    far, near = shifted(reference.box, dx, dy), shifted(reference.box, dx * share, dy * share)
    for term in (bbox_iou, bbox_align):
        better, worse = (term(Case(answer=answer(b, None), reference=reference)) for b in (near, far))
        # Rounding of the shifted area at the limits of validity aside, nearer is never worse.
        assert better >= worse - 1e-4


@relaxed
@given(references(), st.integers(0, 200), st.integers(0, 200))
def test_a_tighter_box_around_the_target_never_scores_worse(reference: Reference, a: int, b: int) -> None:
    x1, y1, x2, y2 = reference.box
    tight, loose = ((x1 - d, y1 - d, x2 + d, y2 + d) for d in sorted((a, b)))
    for term in (bbox_iou, bbox_align):
        better, worse = (term(Case(answer=answer(box, None), reference=reference)) for box in (tight, loose))
        assert better >= worse


def test_a_malformed_box_takes_nothing_from_the_points() -> None:
    reference = Reference(box=(0, 0, 100, 100), points=((20, 20), (80, 80)), size=Size(840, 840))
    parts = HARD.score(answer(None, reference.points), reference).parts
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
    assert Scorer(spread, scale_pixels=True).score(case.answer, reference).total == 1
    assert Scorer(spread, scale_pixels=False).score(case.answer, reference).total == 0.5


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
