"""Datasets in the released schema: parquet files read lazily, image by image.

Opening reads ids, names and queries of all rows, without touching a byte of an image; `dataset[i]` then reads
the row group that holds the row, and checks the row.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import pyarrow as pa

from umrg.dataset_writer import write_rows
from umrg.frames import Box, Point, PointPair
from umrg.names import category_matches, category_name, modality_matches, modality_name
from umrg.row_groups import Row, RowFile, RowGroups
from umrg.sample import Sample
from umrg.shuffling import Cursor, batches

__all__ = ["Cursor", "Dataset", "RowInfo", "batches", "check_names", "write_rows"]

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
_MEMORY = 256 << 20


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


class Dataset:
    """Rows of one or more parquet files. Build it with `Dataset.open`; it can be pickled."""

    def __init__(self, files: Sequence[RowFile], infos: Sequence[RowInfo], memory: int) -> None:
        self._files = {file.path: file for file in files}
        self._infos = list(infos)
        self._groups = RowGroups(memory)

    @classmethod
    def open(
        cls,
        paths: Path | str | Sequence[Path | str],
        *,
        supercategory: str | Sequence[str] | None = None,
        category: str | Sequence[str] | None = None,
        modality: str | Sequence[str] | None = None,
        memory: int = _MEMORY,
    ) -> "Dataset":
        """Open files, and keep the rows that pass every filter.

        A filter is one name or several, in any spelling; a modality's family ("MRI") matches all sequences.
        memory: bytes of row groups that are kept; a row group larger than that is streamed.
        Raises ValueError for a file that is missing, not parquet or without the columns needed, for an id
        that occurs twice, and where no row passes.
        """
        files = [RowFile.open(path) for path in _paths(paths)]
        infos = [info for file in files for info in _read_infos(file)]
        _refuse_duplicates(infos)
        filters = (
            ("supercategory", supercategory, category_matches),
            ("category", category, category_matches),
            ("modality", modality, modality_matches),
        )
        kept = infos
        for field, wanted, matches in filters:
            names = _names(wanted)
            check_names(infos, field, names, matches)
            kept = [i for i in kept if not names or any(matches(getattr(i, field), name) for name in names)]
        if not kept:
            raise ValueError(f"no row of {_listed(file.path for file in files)} passes all filters")
        return cls(files, kept, memory)

    def __len__(self) -> int:
        return len(self._infos)

    def __getitem__(self, index: int) -> Sample:
        """The sample of a row. Raises ValueError for a row that is not sound: no question, image, mask, box
        or points, a box or a point outside the image, or an image whose header cannot be read."""
        return _sample(self.row(index), self.info(index))

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def samples(self, rows: Sequence[int]) -> list[Sample]:
        """The samples of these rows, in this order; each row group is read once."""
        order = sorted(set(rows), key=lambda i: (str(self.info(i).file), self.info(i).row))
        read = {i: self[i] for i in order}
        return [read[i] for i in rows]

    def info(self, index: int) -> RowInfo:
        return self._infos[index]

    @property
    def infos(self) -> Sequence[RowInfo]:
        return self._infos

    def rows_by_image(self) -> list[list[int]]:
        """Rows that name the same image file, together; a row without one stands alone."""
        groups: dict[tuple[Path, str | int], list[int]] = {}
        for index, info in enumerate(self._infos):
            groups.setdefault((info.file, info.image or index), []).append(index)
        return list(groups.values())

    def row(self, index: int) -> Row:
        """The row as it is in its file, unchecked."""
        info = self.info(index)
        return self._groups.row(self._files[info.file], info.row)

    @property
    def schema(self) -> pa.Schema:
        """An arrow schema that holds the rows of all files. Raises ValueError where they contradict."""
        schemas = [file.metadata.schema.to_arrow_schema().remove_metadata() for file in self._files.values()]
        try:
            return pa.unify_schemas(schemas, promote_options="permissive")
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise ValueError(f"the columns of {_listed(self._files)} are of different types ({error})") from error


def check_names(
    infos: Sequence[RowInfo], field: str, wanted: Sequence[str], matches: Callable[[str, str], bool]
) -> None:
    """Raise ValueError, with the nearest name there is, for a wanted name that no row carries."""
    known = sorted({getattr(info, field) for info in infos})
    for name in wanted:
        if not any(matches(other, name) for other in known):
            near = get_close_matches(name.casefold(), [other.casefold() for other in known], n=1)
            hint = next((f"did you mean {n!r}? " for n in known if n.casefold() in near), "")
            raise ValueError(f"no row has the {field} {name!r}; {hint}there is: {_listed(known)}")


def _paths(paths: Path | str | Sequence[Path | str]) -> list[Path]:
    several = [paths] if isinstance(paths, (Path, str)) else paths
    if not several:
        raise ValueError("no dataset file was given; name at least one parquet file")
    # A file that is named twice would be taken for two that hold the same ids.
    return list(dict.fromkeys(Path(path) for path in several))


def _names(wanted: str | Sequence[str] | None) -> list[str]:
    return [wanted] if isinstance(wanted, str) else list(wanted or ())


def _listed(things: Any) -> str:
    texts = [str(thing) for thing in things]
    return ", ".join(texts[:20]) + (f" and {len(texts) - 20} more" if len(texts) > 20 else "")


def _refuse_duplicates(infos: Sequence[RowInfo]) -> None:
    first: dict[str, RowInfo] = {}
    for info in infos:
        other = first.setdefault(info.id, info)
        if other is not info:
            raise ValueError(
                f"the id {info.id!r} occurs twice: in row {other.row} of {other.file} and row {info.row} of "
                f"{info.file}; ids must be unique"
            )


def _read_infos(file: RowFile) -> Iterator[RowInfo]:
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
    light = [
        "prompt",
        *(path for path in _parquet_paths(file) if path.startswith("images.") and path.endswith(".path")),
        *(name for name in (*_REQUIRED, *_OPTIONAL) if name.startswith("extra_info.") and name in types),
    ]
    for number, row in enumerate(file.reader().read(columns=light).to_pylist()):
        yield _info(row, file.path, number)


def _parquet_paths(file: RowFile) -> list[str]:
    schema = file.metadata.schema
    return [schema.column(i).path for i in range(len(schema))]


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


def _info(row: Row, file: Path, number: int) -> RowInfo:
    extra = row["extra_info"] or {}
    if extra.get("id") in (None, ""):
        raise ValueError(f"row {number} of {file} has no extra_info.id; give each row one of its own")
    return RowInfo(
        id=str(extra["id"]),
        query=_query(row, f"row {number} of {file}"),
        supercategory=category_name(extra["supercategory"]),
        category=category_name(extra["category"]),
        modality=modality_name(extra.get("modality")),
        phrasing=extra.get("phrasing"),
        image=next((image["path"] or "" for image in row.get("images") or () if image), ""),
        file=file,
        row=number,
    )


def _query(row: Row, where: str) -> str:
    messages = [message for message in row["prompt"] or () if message and message["content"]]
    user = [message for message in messages if message.get("role", "user") == "user"] or messages
    if not user:
        raise ValueError(f"{where} has no question; its prompt needs a message with content")
    return str(user[0]["content"])


def _sample(row: Row, info: RowInfo) -> Sample:
    where = f"row {info.row} ({info.id!r}) of {info.file}"
    images = [image["bytes"] for image in row["images"] or () if image and image["bytes"]]
    if len(images) != 1:
        raise ValueError(f"{where} has {len(images)} images with bytes; it must have one")
    masks = tuple(mask["bytes"] for mask in row["masks"] or () if mask and mask["bytes"])
    if not masks:
        raise ValueError(f"{where} has an image without mask; add one to its `masks` or leave the row out")
    box, points = parse_ground_truth((row["reward_model"] or {}).get("ground_truth"), where)
    extra = row["extra_info"]
    sample = Sample(
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
    _check_inside(sample, where)
    return sample


def parse_ground_truth(text: object, where: str) -> tuple[Box, PointPair]:
    """Box and points of a row's `reward_model.ground_truth`. Raises ValueError that names `where` they are missing."""
    try:
        truth = json.loads(text) if isinstance(text, str) else None
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


def _check_inside(sample: Sample, where: str) -> None:
    x1, y1, x2, y2 = sample.box
    width, height = sample.size.width, sample.size.height
    box = "[" + ", ".join(f"{v:g}" for v in sample.box) + "]"
    if x1 > x2 or y1 > y2:
        raise ValueError(f"{where} has the inverted box {box}; it must be x1, y1, x2, y2 with x1 <= x2 and y1 <= y2")
    # Up to the full width: some annotators write the edge's coordinate instead of the last pixel's.
    if x1 < 0 or y1 < 0 or x2 > width or y2 > height:
        raise ValueError(f"{where} has the box {box} outside its image of {width}x{height} px")
    for x, y in sample.points:
        if not (0 <= x <= width and 0 <= y <= height):
            raise ValueError(f"{where} has the point [{x:g}, {y:g}] outside its image of {width}x{height} px")
