"""Foreign answers: what a lenient reading takes, and that it says so."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.umrg.test_answers import DRAFT, GOOD, near_answers
from umrg.answers import Form, parse_answer
from umrg.foreign_answers import parse_lenient
from umrg.frames import Box, Frame, PointPair

BOX = (10.0, 20.0, 50.0, 80.0)
POINTS = ((20.0, 30.0), (40.0, 60.0))
CENTRE = ((30.0, 50.0), (30.0, 50.0))
OURS = '{"bbox": [10, 20, 50, 80], "points_1": [20, 30], "points_2": [40, 60]}'
NATIVE = '[{"bbox_2d": [10, 20, 50, 80], "point_2d": [[20, 30], [40, 60]], "label": "Cantlie\'s line"}]'


def read(completion: str, frame: Frame = Frame.MODEL) -> tuple[Box | None, PointPair | None, bool]:
    answer = parse_lenient(completion, frame=frame)
    return answer.box, answer.points, answer.lenient


@pytest.mark.parametrize("body", [OURS, NATIVE, NATIVE[1:-1], NATIVE.replace("point_2d", "points")])
@pytest.mark.parametrize(
    "wrapping",
    [
        "{}",
        "```json\n{}\n```",
        "<think>so</think>\n```json\n{}\n```",
        "<think>so</think>{}",
        "<think>so</think><answer>{}",
        "<answer>```\n{}\n```</answer>",
        "<answer>The box is {}.</answer>",
        "Of {{liver, spleen}} the first [1]:\n```\n{}\n``` is meant.",
        "{}\n```",
    ],
)
def test_fences_prose_missing_tags_and_the_native_list(wrapping: str, body: str) -> None:
    assert read(wrapping.format(body)) == (BOX, POINTS, True)


@pytest.mark.parametrize(
    ("objects", "points"),
    [
        ([{"bbox_2d": [10, 20, 50, 80]}], CENTRE),
        ([{"bbox_2d": [10, 20, 50, 80], "point_2d": [20, 30]}], (POINTS[0], POINTS[0])),
        ([{"bbox_2d": [10, 20, 50, 80], "point_2d": [[20, 30]]}], (POINTS[0], POINTS[0])),
        ([{"bbox_2d": [10, 20, 50, 80], "point_2d": [[20, 30], [40, 60], [1, 1]]}], POINTS),
        ([{"bbox_2d": [10, 20, 50, 80]}, {"point_2d": [20, 30]}, {"point_2d": [40, 60]}], POINTS),
        ([{"point_2d": [20, 30]}, {"bbox_2d": [10, 20, 50, 80]}, {"point_2d": [40, 60]}], POINTS),
        ([{"bbox_2d": [10, 20, 50, 80]}, {"bbox_2d": [0, 0, 9, 9], "point_2d": [[1, 1], [2, 2]]}], CENTRE),
        ([{"bbox": [10, 20, 50, 80], "points_1": [20, 30]}], (POINTS[0], POINTS[0])),
        ([{"bbox_2d": [10, 20, 50, 80], "point_2d": "the middle"}], CENTRE),
    ],
)
def test_the_first_box_counts_with_its_points_or_its_centre(objects: list[object], points: PointPair) -> None:
    assert read(json.dumps(objects)) == (BOX, points, True)
    assert read(repr(objects)) == (BOX, points, True)


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "the liver",
        "[1, 2, 3, 4]",
        '[{"point_2d": [[20, 30], [40, 60]]}]',
        '[{"bbox_2d": [50, 20, 10, 80], "point_2d": [20, 30]}, {"bbox_2d": [10, 20, 50, 80]}]',
        '{"bbox_2d": [10, 20, NaN, 80]}',
        NATIVE[:-1],
        f"<think>perhaps ```json\n{NATIVE}\n```, no",
        f"<think>perhaps {NATIVE}</think>",
        f"<think>perhaps {NATIVE}</think> The liver. <think>{NATIVE}",
        "[" * 100_000 + "{",
        '{"bbox_2d":' * 100_000,
    ],
)
def test_what_gives_no_box_stays_what_it_is(completion: str) -> None:
    assert parse_lenient(completion, frame=Frame.MODEL) == parse_answer(completion)
    assert not parse_lenient(completion, frame=Frame.MODEL).lenient


def test_a_draft_within_the_thoughts_does_not_count() -> None:
    assert read(f"<think>perhaps {DRAFT} or [{GOOD}]</think>```json\n{NATIVE}\n```") == (BOX, POINTS, True)


@pytest.mark.parametrize("text", [f"<answer>{OURS}</answer>", f"<think>so</think><answer>{OURS}</answer>"])
@pytest.mark.parametrize("frame", Frame)
def test_what_is_well_formed_is_not_read_leniently(text: str, frame: Frame) -> None:
    assert read(text, frame) == (BOX, POINTS, False)


FRACTIONS = '{"bbox": [0.1, 0.2, 0.5, 1], "points_1": [0.2, 0.25], "points_2": [0.5, 0.5]}'


def test_fractions_are_relative_coordinates_where_these_were_asked_for() -> None:
    for text in (f"<answer>{FRACTIONS}</answer>", FRACTIONS):
        box, points, lenient = read(text, Frame.RELATIVE)
        assert box == pytest.approx((100, 200, 500, 1000)) and lenient
        assert points == ((200, 250), (500, 500))
    assert read(f"<answer>{FRACTIONS}</answer>", Frame.MODEL) == ((0.1, 0.2, 0.5, 1), ((0.2, 0.25), (0.5, 0.5)), False)
    whole = OURS.replace("[10, 20, 50, 80]", "[0, 0, 1, 1]").replace("[20, 30]", "[0, 1]").replace("[40, 60]", "[1, 0]")
    assert read(f"<answer>{whole}</answer>", Frame.RELATIVE) == ((0, 0, 1, 1), ((0, 1), (1, 0)), False)


native = st.recursive(
    st.one_of(st.none(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.integers(0, 99), max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from(["bbox", "bbox_2d", "point_2d", "points_1", "points_2", "points"]), inner),
    ),
).map(json.dumps)


@settings(deadline=None, max_examples=500)
@given(st.one_of(near_answers, native, st.builds("<think>a</think>```json\n{}\n```".format, native)))
def test_any_text_gives_an_answer_that_is_strict_or_says_that_it_is_not(completion: str) -> None:
    strict, found = parse_answer(completion), parse_lenient(completion, frame=Frame.MODEL)
    if found.lenient:
        assert strict.form < Form.CORRECT and found.form is Form.CORRECT
        assert found.box is not None and found.points is not None
    else:
        assert found == strict


@pytest.mark.parametrize("piece", ["[", "{", "[{", "[ ", "```", "</think>", "'", '{"bbox_2d": [1, 2, 3, 4]},'])
def test_reading_takes_linear_time(piece: str) -> None:
    for text in (piece * 50_000, f"[{piece * 50_000}"):
        start = time.process_time()
        parse_lenient(text, frame=Frame.RELATIVE)
        assert time.process_time() - start < 2
