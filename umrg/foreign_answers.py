"""Lenient parsing of answers in the formats of other models. It is for evaluation only: a reward that accepted these
formats would not teach the required one.

The project's own format (`umrg.answers`) is tried first. Then the text after the thoughts is searched for

- JSON in a code fence, within prose, or without answer tags: the first object or list of objects counts;
- Qwen's native format, `[{"bbox_2d": [x1, y1, x2, y2], "point_2d": [x, y], "label": "…"}, …]`, with one object or
  several; the box may also be called `bbox`, and the points `points_1` and `points_2`, `points`, or be a list in
  `point_2d`;
- in relative coordinates, fractions of the image's sides (0 to 1) in place of 0 to 1000.

The first box counts, with the points of its own object and of objects without a box; further boxes are other regions.
The first two points count. A single point is used twice, and without any point the box's centre is. That gains nothing
by itself, because a pair of equal points has a pDice of 0. Without a box, an answer stays malformed.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from umrg.answers import Answer, Form, as_box, as_point, parse_answer, split_completion
from umrg.frames import RELATIVE, Box, Frame, Point, PointPair

_Fields = Mapping[str, object]
_JSON = re.compile(r"\[\s*\{|\{")
_BOXES = ("bbox", "bbox_2d")
_POINTS = ("points_1", "points_2", "point_2d", "points")


def parse_lenient(completion: str, *, frame: Frame) -> Answer:
    """Parse a completion as `parse_answer` does and, if that finds no valid box and points, in foreign formats; the
    answer is then marked as `lenient`. frame: the coordinates that the prompt asked for. Like `parse_answer`, it never
    fails and takes linear time."""
    answer = parse_answer(completion)
    if answer.box is not None and answer.points is not None:
        box, points, lenient = answer.box, answer.points, False
    elif (found := _found(_objects(_body(completion)))) is not None:
        (box, points), lenient = found, True
    else:
        return answer
    if frame is Frame.RELATIVE and _fractions([*box, *points[0], *points[1]]):
        box, points, lenient = *_thousandths(box, points), True
    return replace(answer, form=Form.CORRECT, box=box, points=points, lenient=lenient)


def _body(completion: str) -> str:
    """The text to search for an answer: the answer block or, without one, the text after the last thoughts."""
    _, block = split_completion(completion)
    return block if block is not None else completion.rpartition("</think>")[2].partition("<think>")[0]


def _objects(text: str) -> list[_Fields]:
    """The first JSON object, or list of objects, in the text's first code fence or, if there is none, in the text."""
    start = _JSON.search(text, max(0, text.find("```"))) or _JSON.search(text)
    if start is None:
        return []
    text = text[start.start() :]
    for written in (text, text.replace("'", '"')):
        try:
            value, _ = json.JSONDecoder().raw_decode(written)
        except (ValueError, RecursionError):
            continue
        return [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, dict)]
    return []


def _found(objects: Sequence[_Fields]) -> tuple[Box, PointPair] | None:
    """The first box and its points; None if the box is malformed or missing."""
    boxes = [[as_box(fields[name]) for name in _BOXES if name in fields] for fields in objects]
    first = next((i for i, found in enumerate(boxes) if found), None)
    if first is None or (box := boxes[first][0]) is None:
        return None
    others = [fields for fields, found in zip(objects, boxes, strict=True) if not found]
    points = [point for fields in (objects[first], *others) for point in _points(fields)]
    points = points or [((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)]
    return box, (points[0], points[min(1, len(points) - 1)])


def _points(fields: _Fields) -> Iterator[Point]:
    for value in (fields.get(name) for name in _POINTS):
        several = value if as_point(value) is None and isinstance(value, list) else [value]
        yield from (point for each in several if (point := as_point(each)) is not None)


def _fractions(numbers: Sequence[float]) -> bool:
    """Whether numbers in the relative frame must be fractions: taken as 0 to 1000, they would describe a region of one
    thousandth of the image's sides."""
    return all(0 <= v <= 1 for v in numbers) and any(0 < v < 1 for v in numbers)


def _thousandths(box: Box, points: PointPair) -> tuple[Box, PointPair]:
    w, h = RELATIVE.width, RELATIVE.height
    (ax, ay), (bx, by) = points
    return (box[0] * w, box[1] * h, box[2] * w, box[3] * h), ((ax * w, ay * h), (bx * w, by * h))
