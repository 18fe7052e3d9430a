"""Conversion of columns written by common tools to the released schema.

    Arrow schema ──plain_columns──► names and types ──check_columns──► accepted, or a ValueError that says what is wrong
    row          ──plain_row──────► the same row with values in the form of the released schema

pandas, polars, Hugging Face `datasets` and plain Arrow write the same content in different types (views, large offsets,
fixed sizes, dictionaries, extensions) and shapes (a struct for a list of one, a dict of lists, dotted names). Every
form with an unambiguous meaning is accepted.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import types

from umrg.mistake import Mistake

Row = dict[str, Any]

_FILE = {"bytes": pa.binary(), "path": pa.string()}
_MESSAGE = {"role": pa.string(), "content": pa.string()}
_TEXTS = ("id", "supercategory", "category", "modality", "reasoning", "phrasing", "split")
_EXTRA = {**dict.fromkeys(_TEXTS, pa.string()), "no_target": pa.bool_()}

RELEASED_SCHEMA = pa.schema(
    [
        ("data_source", pa.string()),
        ("prompt", pa.list_(pa.struct(_MESSAGE.items()))),
        ("images", pa.list_(pa.struct(_FILE.items()))),
        ("masks", pa.list_(pa.struct(_FILE.items()))),
        ("ability", pa.string()),
        ("reward_model", pa.struct([("ground_truth", pa.string()), ("style", pa.string())])),
        ("extra_info", pa.struct({**_EXTRA, "index": pa.int64()}.items())),
    ]
)

_READ = ("prompt", "images", "masks", "reward_model", "extra_info")
_LISTS = ("prompt", "images", "masks")
_WANTED = {
    "images.bytes": "binary (the encoded file)",
    "masks.bytes": "binary (the encoded file)",
    "prompt.content": "text",
    "reward_model.ground_truth": "JSON text, or a struct of bbox_2d and point_2d",
    "extra_info.id": "text or a number",
    "extra_info.supercategory": "text",
    "extra_info.category": "text",
}
INFO_LEAVES = frozenset(
    {
        *("prompt", "prompt.role", "prompt.content", "prompt.content.type", "prompt.content.text", "images.path"),
        *(f"extra_info.{name}" for name in ("id", "supercategory", "category", "modality", "phrasing", "no_target")),
    }
)
"""Leaf columns that make up a `RowInfo`: ids, names, questions and image paths, but no image bytes."""
# An unset flag may be written as an empty text, so this counts as false.
_FLAGS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False, "": False}


def plain_type(kind: pa.DataType) -> pa.DataType:
    """Reduce a type to its plain equivalent: no views, large offsets, fixed sizes, dictionaries or extensions."""
    if isinstance(kind, pa.BaseExtensionType):
        return plain_type(kind.storage_type)
    if types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if types.is_large_string(kind) or types.is_string_view(kind):
        return pa.string()
    if types.is_large_binary(kind) or types.is_binary_view(kind) or types.is_fixed_size_binary(kind):
        return pa.binary()
    if _is_list(kind):
        return pa.list_(plain_type(kind.value_type))
    if types.is_struct(kind):
        return pa.struct([(field.name, plain_type(field.type)) for field in kind])
    return kind


def plain_columns(schema: pa.Schema) -> dict[str, pa.DataType]:
    """Names and plain types of a file's columns, with dotted columns such as `extra_info.id` merged into one struct."""
    return {name: _joined(kind) for name, kind in _nested({f.name: plain_type(f.type) for f in schema}).items()}


def _joined(kind: Any) -> pa.DataType:
    return pa.struct([(name, _joined(inner)) for name, inner in kind.items()]) if isinstance(kind, dict) else kind


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Turn `{"extra_info.id": 7}` into `{"extra_info": {"id": 7}}`. Dotted names of unrelated columns are kept."""
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *outer, last = name.split(".") if _is_read(name) else [name]
        place = nested
        for part in outer:
            place = place.setdefault(part, {})
        place[last] = value
    return nested


def _is_read(name: str) -> bool:
    return name.partition(".")[0] in _READ


def read_columns(schema: pa.Schema) -> list[str]:
    """Names of the columns that a sample is built from."""
    return [name for name in schema.names if _is_read(name)]


def check_columns(schema: pa.Schema, path: Path) -> None:
    """Raise ValueError if required columns are missing or have a type whose meaning is ambiguous."""
    _refuse_repeated_names(schema.names, path)
    columns = plain_columns(schema)
    found = {name: _leaf(columns, name) for name in _WANTED}
    if missing := [name for name, (_, kind) in found.items() if kind is None]:
        raise Mistake(
            f"{path} lacks {', '.join(missing)}; a dataset has the columns {', '.join(_WANTED)} "
            "(a dot leads into a struct or a list of structs)"
        )
    for name, (there, kind) in found.items():
        if not _fits(name, there, kind):
            what = kind if there == name else columns[there]
            raise Mistake(f"{path} has {there} of type {what}; {name} must be {_WANTED[name]}")


def _refuse_repeated_names(names: list[str], path: Path) -> None:
    known = set[str]()
    for name in sorted(names):
        # `extra_info` beside `extra_info.id` is a conflict too: both define the same field.
        outer = {name.rsplit(".", count)[0] for count in range(1, name.count(".") + 1)} if _is_read(name) else set()
        for other in known & {name, *outer}:
            raise Mistake(f"{path} has the columns {other} and {name}; keep one of the two")
        known.add(name)


def _leaf(columns: Mapping[str, pa.DataType], name: str) -> tuple[str, pa.DataType | None]:
    """Find the column that provides a field of the released schema: its name in the file, and its type or None."""
    outer, field = name.split(".")
    kind = columns.get(outer)
    if kind is None:
        return name, None
    inner = _item_type(kind) if outer in _LISTS else kind
    return (name, _field_type(inner, field)) if types.is_struct(inner) else (outer, inner)


def _field_type(kind: pa.StructType, name: str) -> pa.DataType | None:
    return next((field.type for field in kind if field.name == name), None)


def _fits(name: str, there: str, kind: pa.DataType | None) -> bool:
    if kind is None or types.is_null(kind):
        return True
    if name.endswith(".bytes"):
        return bool(types.is_binary(kind))
    if name == "prompt.content":
        return _holds_words(kind)
    if name == "reward_model.ground_truth":
        return _is_text(kind) or (name == there and bool(types.is_struct(kind)))
    return name == there and not types.is_nested(kind)


def _holds_words(kind: pa.DataType) -> bool:
    """Whether a type holds texts or the parts of a chat message: `[{type: text, text: …}, {type: image, …}]`."""
    item = _item_type(kind)
    text = _field_type(item, "text") if types.is_struct(item) else item
    return text is not None and _is_text(text)


def _is_text(kind: pa.DataType) -> bool:
    return bool(types.is_string(kind) or types.is_binary(kind) or types.is_null(kind))


def _is_list(kind: pa.DataType) -> bool:
    return bool(
        types.is_list(kind)
        or types.is_large_list(kind)
        or types.is_fixed_size_list(kind)
        or types.is_list_view(kind)
        or types.is_large_list_view(kind)
    )


def _item_type(kind: pa.DataType) -> pa.DataType:
    """The item type of a list. The list may be written as a single item or as a struct of lists."""
    if types.is_list(kind):
        return kind.value_type
    if types.is_struct(kind) and any(types.is_list(field.type) for field in kind):
        inner = [(field.name, field.type.value_type) for field in kind if types.is_list(field.type)]
        rest = [(field.name, field.type) for field in kind if types.is_null(field.type)]
        return pa.struct([*inner, *rest]) if len(inner) + len(rest) == kind.num_fields else kind
    return kind


def leaf_columns(schema: pa.Schema) -> list[str]:
    """Names of a file's leaf columns in file order. List levels are skipped: `images: list<struct<bytes>>` has the leaf
    "images.bytes"."""
    return [leaf for field in schema for leaf in _leaves(field.name, field.type)]


def _leaves(name: str, kind: pa.DataType) -> Iterator[str]:
    if isinstance(kind, pa.BaseExtensionType):
        yield from _leaves(name, kind.storage_type)
    elif types.is_map(kind):
        yield from (*_leaves(f"{name}.key", kind.key_type), *_leaves(f"{name}.value", kind.item_type))
    elif _is_list(kind):
        yield from _leaves(name, kind.value_type)
    elif types.is_struct(kind):
        for field in kind:
            yield from _leaves(f"{name}.{field.name}", field.type)
    else:
        yield name


def unmasked_leaves(schema: pa.Schema) -> set[str]:
    """Names of the leaf columns that a sample is built from, except those of its masks."""
    return {leaf for leaf in leaf_columns(schema) if _is_read(leaf) and leaf.partition(".")[0] != "masks"}


def released_columns(schema: pa.Schema) -> pa.Schema:
    """The schema in which a file's rows are written. Known columns take their released types; their additional fields
    and all other columns keep their own types in plain form."""
    columns = plain_columns(schema)
    return pa.schema([(name, _released_type(name, kind)) for name, kind in columns.items()])


def _released_type(name: str, kind: pa.DataType) -> pa.DataType:
    if name not in _READ:
        return kind
    inner = _item_type(kind) if name in _LISTS else kind
    there = {field.name: field.type for field in inner} if types.is_struct(inner) else {}
    if name == "extra_info":
        return pa.struct({**there, **{name: kind for name, kind in _EXTRA.items() if name in there}}.items())
    if name == "reward_model":
        return pa.struct({**there, "ground_truth": pa.string()}.items())
    return pa.list_(pa.struct({**there, **(_MESSAGE if name == "prompt" else _FILE)}.items()))


def released_batch(rows: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """Convert rows of a file to a schema made by `released_columns`, which may have more columns than the file.

    Raises ValueError if a value does not fit the schema.
    """
    plain: list[Row] | None = None
    columns = []
    for field in schema:
        column = rows.column(field.name) if field.name in rows.schema.names else None
        if column is not None and _differs_in_type_only(field.name, column.type):
            columns.append(_cast(column, field))
        elif field.name in _READ:
            # Conversion to Python objects copies all image bytes, so it is done at most once and only if needed.
            if plain is None:
                plain = [plain_row(row) for row in rows.select(read_columns(rows.schema)).to_pylist()]
            columns.append(_array([row.get(field.name) for row in plain], field))
        else:
            columns.append(pa.nulls(rows.num_rows, field.type))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _differs_in_type_only(name: str, kind: pa.DataType) -> bool:
    plain = plain_type(kind)
    return bool(_released_type(name, plain) == plain)


def _array(values: list[Any], field: pa.Field) -> pa.Array:
    try:
        return pa.array(values, type=field.type)
    except (pa.ArrowException, OverflowError, TypeError) as error:
        raise Mistake(f"the column {field.name} has a value that is not {field.type} ({error})") from error


def _cast(column: pa.Array, field: pa.Field) -> pa.Array:
    # Arrow cannot cast every type to its plain form, and its casts of list views produce corrupt lists.
    if "list_view" not in str(column.type):
        with suppress(pa.ArrowException):
            return column.cast(field.type)
    return _array(column.to_pylist(), field)


def plain_row(row: Mapping[str, Any]) -> Row:
    """The columns of a row that a sample is built from, with values in the form of the released schema. Values that
    cannot be converted are left unchanged, and the reader rejects them."""
    return {name: _PLAIN[name](value) for name, value in _nested(row).items() if name in _READ}


def _items(value: Any) -> list[Any]:
    """The items of a list. The list may be written as a single item or as a dict of lists."""
    if isinstance(value, list):
        return [item for item in value if item is not None]
    lists = value if isinstance(value, dict) else {}
    if any(isinstance(each, list) for each in lists.values()) and all(
        each is None or isinstance(each, list) for each in lists.values()
    ):
        length = max(len(each or ()) for each in lists.values())
        padded = {name: [*(each or ()), *[None] * length][:length] for name, each in lists.items()}
        return [dict(zip(padded, item, strict=True)) for item in zip(*padded.values(), strict=True)]
    return [] if value is None else [value]


def _files(value: Any) -> list[Row]:
    return [item if isinstance(item, dict) else {"bytes": item, "path": None} for item in _items(value)]


def _messages(value: Any) -> list[Row]:
    items = _items(_loaded_messages(_text(value)) if isinstance(value, (str, bytes)) else value)
    messages = [item if isinstance(item, dict) else {"role": "user", "content": item} for item in items]
    return [{**message, "role": _text(message.get("role")), "content": _words(message)} for message in messages]


def _loaded_messages(text: Any) -> Any:
    """Parse a JSON list of messages. Any other text is the question itself and is returned unchanged."""
    try:
        loaded = json.loads(text) if isinstance(text, str) and text.lstrip().startswith("[") else None
    except (ValueError, RecursionError):
        return text
    messages = isinstance(loaded, list) and loaded and all(isinstance(m, dict) and "content" in m for m in loaded)
    return loaded if messages else text


def _words(message: Row) -> Any:
    """The text of a message, whose content may be a list of parts."""
    content = message.get("content")
    if not isinstance(content, (list, dict)):
        return _text(content)
    texts = [_text(part) if not isinstance(part, dict) else _part_text(part) for part in _items(content)]
    return "\n".join(text for text in texts if isinstance(text, str) and text)


def _part_text(part: Row) -> Any:
    return _text(part.get("text")) if part.get("type") in (None, "", "text") else None


def _reward_model(value: Any) -> Any:
    if isinstance(value, dict):
        return {**value, "ground_truth": _json_text(value.get("ground_truth"))}
    return None if value is None else {"ground_truth": _text(value)}


def _json_text(value: Any) -> Any:
    # parquet may hold numbers as Decimal, which json cannot encode by itself.
    return json.dumps(value, default=float) if isinstance(value, dict) else _text(value)


def _extra_info(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    texts = {name: _text(value[name]) for name in _TEXTS if name in value}
    return {**value, **texts, **({"no_target": _flag(value["no_target"])} if "no_target" in value else {})}


def _text(value: Any) -> Any:
    """A value as text. Whole floats lose their decimal point and NaN becomes None, because pandas stores an integer
    column with missing values as floats."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    if isinstance(value, (float, Decimal)):
        if value != value:  # NaN is the only value that differs from itself.
            return None
        return str(int(value)) if value % 1 == 0 else str(value)
    return str(value)


def _flag(value: Any) -> Any:
    text = _text(value)
    return _FLAGS.get(text.strip().casefold(), value) if isinstance(text, str) else text


_PLAIN = {
    "prompt": _messages,
    "images": _files,
    "masks": _files,
    "reward_model": _reward_model,
    "extra_info": _extra_info,
}
