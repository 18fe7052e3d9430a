"""The answer's grammar: reading is total, and gives back what was written."""

import json
import math
import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from umrg.answers import Answer, Form, format_answer, parse_answer, parse_published
from umrg.frames import Box, Frame, Frames, PointPair, Size

relaxed = settings(deadline=None, max_examples=300)

GOOD = '{"bbox": [1, 2, 3, 4], "points_1": [5, 6], "points_2": [7, 8.5]}'
DRAFT = '<answer>{"bbox": [0, 0, 9, 9], "points_1": [1, 1], "points_2": [8, 8]}</answer>'

# Lone surrogates, huge integers, NaN and Infinity included.
any_text = st.text(st.characters())
any_json = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), any_text),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(any_text, inner, max_size=3)),
)
any_fields = st.dictionaries(st.sampled_from(["bbox", "points_1", "points_2"]), any_json).map(json.dumps)
pieces = st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", GOOD, " ", "\n", "'", "{", "]"])
near_answers = st.one_of(
    any_text,
    st.lists(st.one_of(pieces, any_text), max_size=12).map("".join),
    st.builds("<think>{}</think><answer>{}</answer>".format, any_text, any_fields),
)


def answered(body: str) -> Answer:
    return parse_answer(f"<think>so</think><answer>{body}</answer>")


@pytest.mark.parametrize("read", [parse_answer, parse_published])
@relaxed
@given(near_answers)
def test_any_text_gives_a_consistent_answer(read: Callable[[str], Answer], completion: str) -> None:
    answer = read(completion)
    if answer.box is not None:
        x1, y1, x2, y2 = answer.box
        assert x1 <= x2 and y1 <= y2 and all(map(math.isfinite, answer.box))
    if answer.points is not None:
        assert all(math.isfinite(v) for point in answer.points for v in point)
    if answer.form is Form.CORRECT:
        assert answer.box is not None and answer.points is not None
    if answer.form <= Form.NOT_AN_OBJECT:
        assert answer.box is None and answer.points is None


@pytest.mark.parametrize(
    "body",
    [
        "",
        "no json here",
        f"[{GOOD}]",
        "null",
        "[" * 100_000,
        '{"a":' * 100_000,
        "9" * 10_000,
        GOOD[:-1],
        '{"bbox": ' + "9" * 10_000 + "}",
        "\ud800",
    ],
)
def test_what_is_not_one_json_object_is_said_to_be_none(body: str) -> None:
    assert answered(body).form is Form.NOT_AN_OBJECT


@pytest.mark.parametrize(
    "box",
    [
        "[1, 2, 3]",
        "[1, 2, 3, 4, 5]",
        "[1, 2, NaN, 4]",
        "[1, 2, Infinity, 4]",
        "[-Infinity, 2, 3, 4]",
        "[1, 2, 1e999, 4]",
        "[1, 2, 3" + "0" * 400 + ", 4]",
        "[3, 2, 1, 4]",
        "[1, 4, 3, 2]",
        '["1", 2, 3, 4]',
        "[true, 2, 3, 4]",
        "[[1], 2, 3, 4]",
        '{"x": 1}',
        "null",
    ],
)
def test_a_box_is_four_finite_numbers_in_order(box: str) -> None:
    answer = answered(f'{{"bbox": {box}, "points_1": [5, 6], "points_2": [7, 8]}}')
    assert (answer.form, answer.box, answer.points) == (Form.ONE_MALFORMED, None, ((5, 6), (7, 8)))


def test_the_forms_from_nothing_to_correct() -> None:
    assert parse_answer(GOOD).form is Form.NO_BLOCK
    assert parse_answer(f"<answer>{GOOD}").form is Form.NO_BLOCK
    assert parse_answer(f"</answer>{GOOD}<answer>").form is Form.NO_BLOCK
    assert answered('{"bbox": [1, 2, 3, 4], "points_1": [5, 6]}').form is Form.KEYS_MISSING
    assert answered('{"bbox": 1, "points_1": [5, 6], "points_2": null}').form is Form.BOTH_MALFORMED
    assert answered(GOOD).form is Form.CORRECT


def test_a_key_that_is_missing_spares_the_rest() -> None:
    answer = answered('{"bbox": [1, 2, 3, 4], "points_1": [5, 6]}')
    assert (answer.box, answer.points) == ((1, 2, 3, 4), None)


def test_single_quotes_pass_for_double_ones() -> None:
    assert answered(GOOD.replace('"', "'")) == answered(GOOD)


@pytest.mark.parametrize(
    "text",
    [
        "Cantlie's line",
        "'",
        "''",
        'it\'s \\"quoted\\"',
        "the patient’s and the surgeon's",
        "{'bbox': 0}",
        "don't, can't",
    ],
)
def test_valid_json_is_read_as_it_stands(text: str) -> None:
    for noted in (f'{GOOD[:-1]}, "note": "{text}"}}', f'{{"{text}": 1, {GOOD[1:]}'):
        assert answered(noted) == answered(GOOD)


@relaxed
@given(st.dictionaries(any_text, any_json, max_size=4))
def test_further_fields_of_valid_json_change_nothing(fields: dict[str, object]) -> None:
    written = json.dumps({**fields, **json.loads(GOOD)}).replace(">", "")
    assert answered(written) == answered(GOOD)


def test_single_quotes_are_swapped_only_where_json_failed() -> None:
    assert answered(GOOD.replace('"', "'")[:-1] + """, 'note': "Cantlie's"}""").form is Form.NOT_AN_OBJECT
    assert answered(GOOD.replace("[1, 2, 3, 4]", '"\'"')).box is None


def test_published_the_first_blocks_count_wherever_they_stand() -> None:
    later = GOOD.replace("1", "9")
    answer = parse_published(f"<think>a</think><think>b</think><answer>{GOOD}</answer><answer>{later}</answer>")
    assert (answer.think, answer.box, answer.strict) == ("a", (1, 2, 3, 4), False)
    draft = parse_published(f"<think>first: {DRAFT}, no</think><answer>{GOOD}</answer>")
    assert draft.box == (0, 0, 9, 9)
    assert parse_published(f"<think>never ends {DRAFT}").box == (0, 0, 9, 9)


@pytest.mark.parametrize(
    ("completion", "think"),
    [
        (f"<think>first: {DRAFT}, no.</think><answer>{GOOD}</answer>", f"first: {DRAFT}, no."),
        (f"<think>{DRAFT}{DRAFT}</think> so <answer>{GOOD}</answer>", DRAFT * 2),
        (f"<think>I write <think></think>, {DRAFT}, or</think><answer>{GOOD}</answer>", None),
        (f"{DRAFT} was wrong</think><answer>{GOOD}</answer>", None),
        (f"{DRAFT}<think>no</think><answer>{GOOD}</answer>", "no"),
        (f"<think>a</think>{DRAFT}<think>no, b</think><answer>{GOOD}</answer>", None),
        (f"<think>a</think><answer>{GOOD}</answer>{DRAFT}", "a"),
        (f"<think>a</think><answer>{GOOD}</answer></think>", "a"),
        (f"<think>a</think><answer>{GOOD}</answer><think>{DRAFT}", "a"),
        (f"<answer>{GOOD}</answer><think>is it?</think>", "is it?"),
        (f'<think>a</think><answer>{GOOD[:-1]}, "note": "no <think>, no </think>"}}</answer>', "a"),
        (f'<answer>{GOOD[:-1]}, "note": "<think>"}}</answer>', None),
        (f"<answer>{GOOD}</answer><think>is it {DRAFT}", None),
    ],
)
def test_the_answer_after_the_thoughts_counts(completion: str, think: str | None) -> None:
    answer = parse_answer(completion)
    assert (answer.box, answer.form) == ((1, 2, 3, 4), Form.CORRECT)
    if think is not None:
        assert answer.think == think


@pytest.mark.parametrize(
    "completion",
    [
        f"<think>first: {DRAFT}, no",
        f"<think>first: {DRAFT}, no</think>",
        f"<think>{DRAFT}{DRAFT}</think><answer>",
        f"{DRAFT} was wrong</think>",
        f"</think><think>{DRAFT}",
        f"<think>\n\n</think>\n\n<think>first: {DRAFT}, no",
        f"<think>a</think> and <think>b {DRAFT} <think>c {DRAFT}",
    ],
)
def test_a_draft_alone_is_no_answer(completion: str) -> None:
    assert parse_answer(completion).form is Form.NO_BLOCK


drafts = st.lists(st.one_of(pieces, st.just(DRAFT), any_text), max_size=8).map("".join)


@relaxed
@given(drafts)
def test_whatever_is_thought_the_answer_is_what_follows(draft: str) -> None:
    answer = parse_answer(f"<think>{draft}</think><answer>{GOOD}</answer>")
    assert (answer.think, answer.box) == (draft.strip(), (1, 2, 3, 4))


@relaxed
@given(drafts.map(lambda draft: draft.replace("</think>", "")))
def test_thoughts_that_never_end_hold_no_answer(draft: str) -> None:
    assert parse_answer(f"<think>{draft}").form is Form.NO_BLOCK


@pytest.mark.parametrize(
    ("think", "text", "with_thinking"),
    [("", None, False), ("<think> \n</think>", "", False), ("<think> a </think>", "a", True)],
)
def test_an_answer_is_well_formed_with_some_reasoning_where_that_was_asked(
    think: str, text: str | None, with_thinking: bool
) -> None:
    answer = parse_answer(f"{think}<answer>{GOOD}</answer>")
    assert answer.think == text
    assert answer.well_formed(think=True) is with_thinking
    assert answer.well_formed(think=False)
    assert not parse_answer(f"{think}<answer></answer>").well_formed(think=False)


@pytest.mark.parametrize(
    ("completion", "strict"),
    [
        (f"<think>a</think><answer>{GOOD}</answer>", True),
        (f" <think>a\nb</think>\n<answer>{GOOD}</answer>\n", True),
        (f"<answer>{GOOD}</answer>", True),
        ("<answer></answer>", True),
        (f"Sure. <answer>{GOOD}</answer>", False),
        (f"<answer>{GOOD}</answer>.", False),
        (f"<think>a</think> so <answer>{GOOD}</answer>", False),
        (f"<answer>{GOOD}</answer><think>a</think>", False),
        (f"<think>a<think>b</think><answer>{GOOD}</answer>", False),
        (f"<think>a</think></think><answer>{GOOD}</answer>", False),
        (f"<think><answer>{GOOD}</answer></think>", False),
        ("<think>a</think>", False),
        ("", False),
    ],
)
def test_strict_is_one_think_block_if_any_then_one_answer_block_and_nothing_else(completion: str, strict: bool) -> None:
    assert parse_answer(completion).strict is strict


coordinates = st.integers(0, 10_000).map(float)


@relaxed
@given(
    st.lists(coordinates, min_size=2, max_size=2).map(sorted),
    st.lists(coordinates, min_size=2, max_size=2).map(sorted),
    st.tuples(st.tuples(coordinates, coordinates), st.tuples(coordinates, coordinates)),
    st.one_of(st.none(), st.text(st.characters(exclude_characters="<>"))),
)
def test_what_is_written_is_read_back(x: list[float], y: list[float], points: PointPair, think: str | None) -> None:
    box: Box = (x[0], y[0], x[1], y[1])
    answer = parse_answer(format_answer(box=box, points=points, think=think))
    reasoning = None if think is None else think.strip()
    assert answer == Answer(think=reasoning, form=Form.CORRECT, box=box, points=points, strict=True)


def test_numbers_are_written_whole() -> None:
    text = format_answer(box=(0.6, 1.4, 9.5, 11), points=((1.2, 2), (3, 4)), think=None)
    answer = parse_answer(text)
    assert (answer.box, answer.points) == ((1, 1, 10, 11), ((1, 2), (3, 4)))


def test_an_answer_goes_to_original_pixels() -> None:
    frames = Frames(original=Size(840, 420), model=Size(420, 420))
    answer = answered(GOOD).to_original(frames, Frame.MODEL)
    assert (answer.box, answer.points) == ((2, 2, 6, 4), ((10, 6), (14, 8.5)))
    assert parse_answer("nothing").to_original(frames, Frame.MODEL) == parse_answer("nothing")


@pytest.mark.parametrize(
    "piece",
    ["<think>", "<answer>", "<think></think><answer>", "</think><answer>", "</answer></think>", DRAFT, "'", " "],
)
@pytest.mark.parametrize("read", [parse_answer, parse_published])
def test_repeated_tags_are_read_in_linear_time(read: Callable[[str], Answer], piece: str) -> None:
    start = time.process_time()
    read(piece * 20_000)
    # A reader that looks for every closing tag from every opening one takes minutes.
    assert time.process_time() - start < 2
