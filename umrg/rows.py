"""Parsing a row of the released schema into a sample.

Functions take `where`, the subject of their error messages, such as "row 3 of train.parquet".
"""

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from umrg.answers import as_point, finite_numbers
from umrg.columns import Row
from umrg.frames import Box, Point, PointPair, Size
from umrg.mistake import Mistake
from umrg.names import category_name, modality_name
from umrg.prompts import special_tokens
from umrg.sample import Sample

_NAMED = ("id", "supercategory", "category", "modality", "reasoning")
_ASKING = ("user", "human", "")
_TAG = re.compile(r"<\s*/?\s*(?:think|answer)\s*>", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class RowInfo:
    """The metadata of a row, without image bytes."""

    id: str
    """`extra_info.id`, unique in a dataset."""
    query: str
    """The question without instructions."""
    supercategory: str
    """Normalised name, "unknown" if missing, as are `category` and `modality`."""
    category: str
    modality: str
    phrasing: str | None
    """"seen", "held_out" or, without a mark, None."""
    image: str = ""
    """The path that the row gives for its image, "" if there is none."""
    file: Path
    """The parquet file that holds the row."""
    row: int
    """The row's number within the file, from 0."""


def read_info(row: Row, file: Path, number: int, where: str) -> RowInfo:
    """Read the metadata of a row. Raises ValueError if id or question is missing or `no_target` is not a boolean."""
    extra = row["extra_info"] or {}
    if not isinstance(extra.get("id"), str) or not extra["id"]:
        raise Mistake(f"{where} has no extra_info.id; give each row one of its own")
    if extra.get("no_target") not in (None, True, False):
        raise Mistake(f"{where} has the no_target {extra['no_target']!r}; write true or false")
    return RowInfo(
        id=extra["id"],
        # Many rows repeat the same question; interning keeps one copy in memory.
        query=sys.intern(_query(row, where)),
        supercategory=category_name(extra.get("supercategory")),
        category=category_name(extra.get("category")),
        modality=modality_name(extra.get("modality")),
        phrasing=extra.get("phrasing"),
        image=next((path for image in row.get("images") or () if isinstance(path := image.get("path"), str)), ""),
        file=file,
        row=number,
    )


def turns(row: Row) -> list[tuple[str, str]]:
    """Role and text of the non-empty messages of a row's prompt. A message without a role counts as the user's."""
    messages = [(str(message.get("role") or "").casefold(), message["content"]) for message in row["prompt"] or ()]
    return [("user" if role in _ASKING else role, text) for role, text in messages if isinstance(text, str) and text]


def _query(row: Row, where: str) -> str:
    said = turns(row)
    asked = [text for role, text in said if role == "user"]
    if said and not asked:
        roles = ", ".join(sorted({role for role, _ in said}))
        raise Mistake(f"{where} has no question, only turns of {roles}; its prompt needs a message of the user")
    if not asked:
        raise Mistake(f"{where} has no question; its prompt needs a message with content")
    # In a chat of several turns, a model answers the user's last message.
    return asked[-1]


def read_sample(row: Row, info: RowInfo, where: str, *, masked: bool = True) -> Sample:
    """Build a sample whose images are still encoded. masked: whether the row's masks were read.

    Raises ValueError if the row lacks an image, a mask, a box or points. Whether box and points lie within the image is
    not checked.
    """
    images = _encoded(row, "images", where)
    if len(images) != 1:
        raise Mistake(f"{where} has {len(images)} images with bytes; it must have one")
    masks = _encoded(row, "masks", where) if masked else []
    if masked and not masks:
        raise Mistake(f"{where} has an image without mask; add one to its `masks` or leave the row out")
    box, points = parse_ground_truth((row["reward_model"] or {}).get("ground_truth"), where)
    extra = row["extra_info"]
    reasoning = extra.get("reasoning")
    return Sample(
        id=info.id,
        query=info.query,
        image_bytes=images[0],
        mask_bytes=tuple(masks),
        box=box,
        points=points,
        supercategory=info.supercategory,
        category=info.category,
        modality=info.modality,
        reasoning=reasoning if isinstance(reasoning, str) and reasoning.strip() else None,
        extra={name: value for name, value in extra.items() if name not in _NAMED},
        source=str(info.file),
    )


def _encoded(row: Row, column: str, where: str) -> list[bytes]:
    """The encoded files of `images` or `masks`. Raises ValueError for a file that has a path but no bytes."""
    files = row[column] or ()
    for file in files:
        if file.get("path") and not file.get("bytes"):
            raise Mistake(
                f"{where} names {file['path']!r} in its {column} and does not hold it; write the content of the file "
                f"into {column}.bytes"
            )
    return [file["bytes"] for file in files if file.get("bytes")]


def reasoning_fault(reasoning: str | None) -> str | None:
    """Why a reasoning cannot be used as a training target, phrased to complete "row … has …"; None if it can.

    It is missing or blank, or it contains tags or control tokens, which would break the structure of the answer.
    """
    if reasoning is None or not reasoning.strip():
        what = "no" if reasoning is None else "a blank"
        return f"{what} extra_info.reasoning to learn from; set think=false or add it"
    if tokens := list(dict.fromkeys([*_TAG.findall(reasoning), *special_tokens(reasoning)])):
        listed = ", ".join(tokens[:5])
        return f"{listed} in its extra_info.reasoning; leave the words alone there, tags are written around them"
    return None


def parse_ground_truth(truth: object, where: str) -> tuple[Box, PointPair]:
    """Box and points of a row's `reward_model.ground_truth`, which is a mapping or JSON text.

    Raises ValueError if they are missing or malformed.
    """
    fields = _loaded(truth, where)
    if "ground_truth" in fields and "bbox_2d" not in fields:
        # A file with `reward_model` as one text column has the whole object here.
        fields = _loaded(fields["ground_truth"], where)
    box = finite_numbers(fields.get("bbox_2d"), 4)
    pair = fields.get("point_2d")
    points = [as_point(point) for point in pair] if isinstance(pair, list) else []
    if box is None or len(points) != 2 or points[0] is None or points[1] is None:
        raise Mistake(
            f"{where} has a ground_truth without a usable bbox_2d and point_2d; it must read "
            '{"bbox_2d": [x1, y1, x2, y2], "point_2d": [[x, y], [x, y]]}'
        )
    # Inverted boxes pass here, because `box_fault` describes the fault better.
    return (box[0], box[1], box[2], box[3]), (points[0], points[1])


def _loaded(truth: object, where: str) -> Mapping[str, object]:
    if truth is None or truth == "":
        raise Mistake(f"{where} has no ground_truth; it must hold bbox_2d and point_2d")
    try:
        loaded = json.loads(truth) if isinstance(truth, str) else truth
    except (ValueError, RecursionError) as error:
        raise Mistake(f"{where} has a ground_truth that is not JSON ({error})") from error
    return loaded if isinstance(loaded, Mapping) else {}


def box_fault(box: Box, size: Size) -> str | None:
    """Describe why a box (XYXY, original pixels) is invalid: inverted or outside the image. None if it is valid."""
    x1, y1, x2, y2 = box
    if x1 > x2 or y1 > y2:
        return f"the inverted box {coordinates(box)}; it must be x1, y1, x2, y2 with x1 <= x2 and y1 <= y2"
    # x2 = width passes although the last pixel is width - 1: some annotators write the coordinate of the image's edge.
    if x1 < 0 or y1 < 0 or x2 > size.width or y2 > size.height:
        return f"the box {coordinates(box)} outside its image of {size.width}x{size.height} px"
    return None


def point_fault(point: Point, size: Size) -> str | None:
    """Describe why a point (XY, original pixels) is invalid: it lies outside the image. None if it is valid."""
    x, y = point
    if 0 <= x <= size.width and 0 <= y <= size.height:
        return None
    return f"the point {coordinates(point)} outside its image of {size.width}x{size.height} px"


def coordinates(values: Box | Point) -> str:
    """Format a box or a point like `[3, 4.25]`, without an exponent."""
    return "[" + ", ".join(f"{value:.4f}".rstrip("0").rstrip(".") for value in values) + "]"
