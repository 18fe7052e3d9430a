"""One row of the released schema: which columns it has, and how it becomes a sample.

`where` names a row at the head of an error's sentence, such as "row 3 of train.parquet".
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from umrg.frames import Box, Point, PointPair, Size
from umrg.names import category_name, modality_name
from umrg.row_groups import Row, RowFile
from umrg.sample import Sample

_REQUIRED = (
    "images.bytes",
    "masks.bytes",
    "prompt.content",
    "reward_model.ground_truth",
    "extra_info.id",
    "extra_info.supercategory",
    "extra_info.category",
)
_BINARY = ("images.bytes", "masks.bytes")
_OPTIONAL = ("extra_info.modality", "extra_info.phrasing")
_NAMED = ("id", "supercategory", "category", "modality", "reasoning")


@dataclass(frozen=True, kw_only=True)
class RowInfo:
    """A row without its images.

    id: `extra_info.id`. query: the bare question. supercategory, category, modality: normalised names.
    phrasing: "seen" or "held_out" where the row says so. image: the image's own path, "" where the row has none.
    file, row: where the row is, counted within the file.
    """

    id: str
    query: str
    supercategory: str
    category: str
    modality: str
    phrasing: str | None
    image: str = ""
    file: Path
    row: int


def check_columns(file: RowFile) -> None:
    """Raise ValueError, naming them, where a file lacks columns that it needs or encoded images are not binary."""
    types = dict(_leaves(file.metadata.schema.to_arrow_schema()))
    missing = [name for name in _REQUIRED if name not in types]
    if missing:
        raise ValueError(
            f"{file.path} lacks {', '.join(missing)}; a dataset has the columns {', '.join(_REQUIRED)} "
            "(a dot leads into a struct or a list of structs)"
        )
    for name in _BINARY:
        if not (pa.types.is_binary(types[name]) or pa.types.is_large_binary(types[name])):
            raise ValueError(f"{file.path} has {name} of type {types[name]}; it must be binary (the encoded file)")


def light_columns(file: RowFile) -> list[str]:
    """The columns that a `RowInfo` is made of: none of the encoded images."""
    schema = file.metadata.schema
    types = dict(_leaves(schema.to_arrow_schema()))
    paths = [schema.column(i).path for i in range(len(schema))]
    return [
        "prompt",
        *(path for path in paths if path.startswith("images.") and path.endswith(".path")),
        *(name for name in (*_REQUIRED, *_OPTIONAL) if name.startswith("extra_info.") and name in types),
    ]


def _leaves(schema: pa.Schema) -> Iterator[tuple[str, pa.DataType]]:
    """Names of the leaf columns, lists passed through: `images: list<struct<bytes>>` gives "images.bytes"."""
    pending = [(field.name, field.type) for field in schema]
    for name, kind in pending:
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            pending.append((name, kind.value_type))
        elif pa.types.is_struct(kind):
            pending += [(f"{name}.{field.name}", field.type) for field in kind]
        else:
            yield name, kind


def read_info(row: Row, file: Path, number: int, where: str) -> RowInfo:
    """What a row says without its images. Raises ValueError for a row without id or question."""
    extra = row["extra_info"] or {}
    if extra.get("id") in (None, ""):
        raise ValueError(f"{where} has no extra_info.id; give each row one of its own")
    return RowInfo(
        id=str(extra["id"]),
        query=_query(row, where),
        supercategory=category_name(extra["supercategory"]),
        category=category_name(extra["category"]),
        modality=modality_name(extra.get("modality")),
        phrasing=extra.get("phrasing"),
        image=next((image.get("path") or "" for image in row.get("images") or () if image), ""),
        file=file,
        row=number,
    )


def _query(row: Row, where: str) -> str:
    messages = [message for message in row["prompt"] or () if message and message["content"]]
    user = [message for message in messages if message.get("role", "user") == "user"] or messages
    if not user:
        raise ValueError(f"{where} has no question; its prompt needs a message with content")
    return str(user[0]["content"])


def read_sample(row: Row, info: RowInfo, where: str) -> Sample:
    """The row as a sample, its images still encoded. Raises ValueError for a row without an image, a mask, or a box
    and points; where those lie is not looked at."""
    images = [image["bytes"] for image in row["images"] or () if image and image["bytes"]]
    if len(images) != 1:
        raise ValueError(f"{where} has {len(images)} images with bytes; it must have one")
    masks = tuple(mask["bytes"] for mask in row["masks"] or () if mask and mask["bytes"])
    if not masks:
        raise ValueError(f"{where} has an image without mask; add one to its `masks` or leave the row out")
    box, points = parse_ground_truth((row["reward_model"] or {}).get("ground_truth"), where)
    extra = row["extra_info"]
    return Sample(
        id=info.id,
        query=info.query,
        image_bytes=images[0],
        mask_bytes=masks,
        box=box,
        points=points,
        supercategory=info.supercategory,
        category=info.category,
        modality=info.modality,
        reasoning=extra.get("reasoning"),
        extra={name: value for name, value in extra.items() if name not in _NAMED},
        source=str(info.file),
    )


def parse_ground_truth(text: object, where: str) -> tuple[Box, PointPair]:
    """Box and points of a row's `reward_model.ground_truth`, JSON text or the object itself. Raises ValueError that
    names `where` they are missing."""
    try:
        truth = json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} has a ground_truth that is not JSON ({error})") from error
    fields = truth if isinstance(truth, dict) else {}
    box = _numbers(fields.get("bbox_2d"), 4)
    pair = fields.get("point_2d")
    points = [_numbers(point, 2) for point in pair] if isinstance(pair, list) else []
    if box is None or len(points) != 2 or points[0] is None or points[1] is None:
        raise ValueError(
            f"{where} has a ground_truth without a usable bbox_2d and point_2d; it must read "
            '{"bbox_2d": [x1, y1, x2, y2], "point_2d": [[x, y], [x, y]]}'
        )
    first: Point = (points[0][0], points[0][1])
    second: Point = (points[1][0], points[1][1])
    return (box[0], box[1], box[2], box[3]), (first, second)


def _numbers(value: object, count: int) -> list[float] | None:
    if not isinstance(value, list) or len(value) != count:
        return None
    # The bound fails for NaN and infinity, which Python's JSON lets through.
    if not all(type(v) in (int, float) and abs(v) < 1e9 for v in value):
        return None
    return [float(v) for v in value]


def box_fault(box: Box, size: Size) -> str | None:
    """What is wrong with a box XYXY in an image of this size, in original pixels: inverted, or outside the image."""
    x1, y1, x2, y2 = box
    text = "[" + ", ".join(f"{v:g}" for v in box) + "]"
    if x1 > x2 or y1 > y2:
        return f"the inverted box {text}; it must be x1, y1, x2, y2 with x1 <= x2 and y1 <= y2"
    # Up to the full width: some annotators write the edge's coordinate instead of the last pixel's.
    if x1 < 0 or y1 < 0 or x2 > size.width or y2 > size.height:
        return f"the box {text} outside its image of {size.width}x{size.height} px"
    return None


def point_fault(point: Point, size: Size) -> str | None:
    """What is wrong with a point XY in an image of this size, in original pixels: it lies outside."""
    x, y = point
    if 0 <= x <= size.width and 0 <= y <= size.height:
        return None
    return f"the point [{x:g}, {y:g}] outside its image of {size.width}x{size.height} px"
