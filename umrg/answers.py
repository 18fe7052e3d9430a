"""The format of completions: how an answer is written, and how it is parsed.

    <think>reasoning</think><answer>{"bbox": [x1, y1, x2, y2], "points_1": [x, y], "points_2": [x, y]}</answer>

Parsing never fails: any text gives an `Answer`, whose `form` says how much of it is well formed. There are two parsers:

- `parse_answer` takes the answer block after the thoughts. Thoughts begin at the first `<think>`, or at the start of
  the text if a `</think>` precedes it. They end at the last `</think>` that a complete answer block follows, so a draft
  answer within the thoughts does not count, whatever tags they quote. The first block after the thoughts is the answer,
  unless new thoughts are opened before it. If no block follows, a block before the thoughts counts. Thoughts that never
  end contain no answer.
- `parse_published` takes the first think block and the first answer block, wherever they are, as the published
  reward does.

A block extends from its opening tag to the next closing tag of the same name. Its content is parsed as JSON and, if
that fails, once more with single quotes replaced by double quotes.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum

from umrg.frames import Box, Frame, Frames, Point, PointPair

TAGS = ("<think>", "</think>", "<answer>", "</answer>")

_TAG = re.compile(r"(</?(?:think|answer)>)")
_STRICT_TAGS = (list(TAGS), list(TAGS[2:]))
_LARGEST = 1e9
"""Coordinates of this absolute value or more are malformed."""
_KEYS = ("bbox", "points_1", "points_2")


class Form(IntEnum):
    """How well formed the answer block is, in increasing order."""

    NO_BLOCK = 0
    NOT_AN_OBJECT = 1
    KEYS_MISSING = 2
    BOTH_MALFORMED = 3
    ONE_MALFORMED = 4
    CORRECT = 5


_FAILURES = {
    Form.NO_BLOCK: "no answer block",
    Form.NOT_AN_OBJECT: "answer is not JSON",
    Form.KEYS_MISSING: "keys missing",
    Form.BOTH_MALFORMED: "box and points malformed",
    Form.CORRECT: "no reasoning",
}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The content of a completion, in the coordinate frame of the reasoner.

    Answers of the same content are equal, whatever text they were parsed from.
    """

    think: str | None
    """Text of the thoughts, stripped; None without a think block."""
    form: Form
    """How well formed the answer block is."""
    box: Box | None
    """XYXY with x1 <= x2 and y1 <= y2, finite; None if it is malformed."""
    points: PointPair | None
    """Two XY points, finite; None unless both are well formed."""
    strict: bool
    """Whether the completion is one optional think block, then one answer block, and nothing else."""
    text: str = field(default="", repr=False, compare=False)
    """The completion as generated; empty if the answer was not parsed from one."""
    lenient: bool = field(default=False, compare=False)
    """Whether the answer was parsed from a foreign format (`umrg.foreign_answers`)."""

    @property
    def promptable(self) -> bool:
        """Whether box and points can prompt the expert."""
        return self.form is Form.CORRECT

    def well_formed(self, *, think: bool = True) -> bool:
        """Whether box and points are valid and, if the prompt asked for reasoning (`think`), there is some."""
        return self.promptable and (bool(self.think) or not think)

    def failure(self, *, think: bool = True, finished: bool = True) -> str | None:
        """Why the answer is not well formed, in a few words; None if it is. finished: whether the model ended the
        completion itself, before the token limit."""
        if self.well_formed(think=think):
            return None
        if not finished and self.form is Form.NO_BLOCK:
            return "cut off at the token limit"
        if self.form is Form.ONE_MALFORMED:
            return "box malformed" if self.box is None else "points malformed"
        return _FAILURES[self.form]

    def to_original(self, frames: Frames, source: Frame) -> "Answer":
        """The same answer with box and points in original pixels."""
        return replace(
            self,
            box=None if self.box is None else frames.box(self.box, source, Frame.ORIGINAL),
            points=None if self.points is None else frames.points(self.points, source, Frame.ORIGINAL),
        )


def parse_answer(completion: str) -> Answer:
    """Parse the answer that follows the thoughts. Numbers that are not finite and boxes whose edges are in the wrong
    order are malformed."""
    return _answer(completion, *split_completion(completion))


def split_completion(completion: str) -> tuple[str | None, str | None]:
    """Text of the thoughts and text of the answer block after them; None for either that is missing."""
    end = completion.rfind("</think>", 0, max(0, _last_block(completion)))
    if end >= 0:
        _, opening, think = completion[:end].partition("<think>")
        return think if opening else None, _first_answer(completion[end:])
    before, _, rest = completion.partition("<think>")
    think, closing, _ = rest.rpartition("</think>")
    return think if closing else None, None if "</think>" in before else _first_answer(completion)


def parse_published(completion: str) -> Answer:
    """Parse the first think block and the first answer block, as the published reward does. Malformed values are
    those of `parse_answer`."""
    return _answer(completion, _block(completion, "think"), _block(completion, "answer"))


def format_answer(*, box: Box, points: PointPair, think: str | None) -> str:
    """Write a completion with integer coordinates, as in supervised targets; without a think block if `think` is
    None."""
    (ax, ay), (bx, by) = points
    fields = {"bbox": box, "points_1": (ax, ay), "points_2": (bx, by)}
    body = ", ".join(f'"{key}": [{",".join(str(round(v)) for v in values)}]' for key, values in fields.items())
    reasoning = "" if think is None else f"<think>{think}</think>"
    return f"{reasoning}<answer>{{{body}}}</answer>"


def _answer(completion: str, think: str | None, block: str | None) -> Answer:
    fields = None if block is None else _json_object(block)
    box = None if fields is None else as_box(fields.get("bbox"))
    pair = None if fields is None else _points(fields)
    return Answer(
        think=None if think is None else think.strip(),
        form=_form(block is not None, fields, box, pair),
        box=box,
        points=pair,
        strict=_strict(completion),
        text=completion,
    )


def _first_answer(text: str) -> str | None:
    """The first answer block; None if thoughts begin before it."""
    return None if "<think>" in text.partition("<answer>")[0] else _block(text, "answer")


def _last_block(completion: str) -> int:
    """Position of the last `<answer>` that a closing tag follows; -1 if there is none."""
    return completion.rfind("<answer>", 0, max(0, completion.rfind("</answer>")))


def _block(completion: str, name: str) -> str | None:
    """Text of the first block of that name. Takes linear time, unlike a regular expression: a collapsed policy may
    repeat the opening tag up to the token limit."""
    _, opening, rest = completion.partition(f"<{name}>")
    text, closing, _ = rest.partition(f"</{name}>")
    return text if opening and closing else None


def _strict(completion: str) -> bool:
    """Whether the completion has exactly the expected tags, and only white space around the blocks."""
    # Text and tags alternate in `pieces`: every fourth piece is text before, between or after the blocks.
    pieces = _TAG.split(completion)
    return pieces[1::2] in _STRICT_TAGS and not any(text.strip() for text in pieces[::4])


def _form(block: bool, fields: dict[str, object] | None, box: Box | None, points: PointPair | None) -> Form:
    if not block:
        return Form.NO_BLOCK
    if fields is None:
        return Form.NOT_AN_OBJECT
    if any(key not in fields for key in _KEYS):
        return Form.KEYS_MISSING
    malformed = (box is None) + (points is None)
    return (Form.CORRECT, Form.ONE_MALFORMED, Form.BOTH_MALFORMED)[malformed]


def _json_object(text: str) -> dict[str, object] | None:
    text = text.strip()
    value = _json(text)
    if value is None and "'" in text:
        value = _json(text.replace("'", '"'))
    return value if isinstance(value, dict) else None


def _json(text: str) -> object:
    """The JSON value; None if the text is not valid JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def as_box(value: object) -> Box | None:
    """A box from a JSON list of four finite numbers with x1 <= x2 and y1 <= y2; None for anything else."""
    numbers = finite_numbers(value, 4)
    if numbers is None or numbers[0] > numbers[2] or numbers[1] > numbers[3]:
        return None
    return numbers[0], numbers[1], numbers[2], numbers[3]


def as_point(value: object) -> Point | None:
    """A point from a JSON list of two finite numbers; None for anything else."""
    numbers = finite_numbers(value, 2)
    return None if numbers is None else (numbers[0], numbers[1])


def _points(fields: Mapping[str, object]) -> PointPair | None:
    first, second = as_point(fields.get("points_1")), as_point(fields.get("points_2"))
    return None if first is None or second is None else (first, second)


def finite_numbers(value: object, count: int) -> list[float] | None:
    """A JSON list of `count` finite numbers as floats; None for anything else."""
    if not isinstance(value, list) or len(value) != count:
        return None
    # The bound keeps products of coordinates finite. It also rejects NaN and infinity, which Python's JSON accepts.
    # `type` instead of `isinstance`, because booleans are instances of int.
    if not all(type(v) in (int, float) and abs(v) < _LARGEST for v in value):
        return None
    return [float(v) for v in value]
