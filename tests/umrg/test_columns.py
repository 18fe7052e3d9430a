"""Rows mean the same whichever tool wrote them, and what does not say plainly what it means is refused in words."""

import base64
import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from umrg import phantoms
from umrg.checks import CheckedRow, Seen, check_row
from umrg.columns import plain_row, plain_type
from umrg.dataset import Dataset, open_files, write_rows
from umrg.row_groups import common_schema, copied, scan
from umrg.rows import turns
from umrg.sample import Sample

# A busy machine is slow without being wrong.
steady = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])

Row = dict[str, Any]
Change = Callable[[Row], object]

BINARIES = (pa.binary(), pa.large_binary(), pa.binary_view())
TEXTS = (pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string()))
LISTS = (pa.list_, pa.large_list, pa.list_view, pa.large_list_view)


def made() -> list[Row]:
    """Three rows as the released schema has them, with whole numbers for ids."""
    rows: list[Row] = []
    for i, row in enumerate(phantoms.rows(3, seed=5, size=112, modalities=["CT"])):
        extra = {name: row["extra_info"][name] for name in ("supercategory", "category", "modality", "reasoning")}  # type: ignore[index]
        rows.append({**row, "extra_info": {"id": str(i + 7), "no_target": i == 2, **extra}})
    return rows


ROWS = made()


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    path = tmp_path_factory.mktemp("data") / "released.parquet"
    write_rows(path, ROWS)
    return samples(path)


def samples(path: Path) -> list[Sample]:
    """What a file says, told apart from where it stands."""
    return [replace(sample, source="", extra={"no_target": sample.no_target}) for sample in Dataset.open(path)]


def changed(**columns: Callable[[Any], Any]) -> list[Row]:
    """The rows, some columns as functions make them of the released ones."""
    return [{name: columns.get(name, lambda value: value)(value) for name, value in row.items()} for row in deepcopy(ROWS)]


def checked(path: Path) -> list[CheckedRow]:
    seen = Seen()
    return [check_row(row, file.path, number, seen) for file in open_files(path) for number, row in scan(file)]


SHAPES: dict[str, dict[str, Callable[[Any], Any]]] = {
    "images": {
        "list": lambda files: files,
        "struct": lambda files: files[0],
        "dict of lists": lambda files: {name: [file[name] for file in files] for name in ("bytes", "path")},
        "bytes": lambda files: files[0]["bytes"],
        "list of bytes": lambda files: [file["bytes"] for file in files],
        "list with a gap": lambda files: [*files, None],
    },
    "prompt": {
        "list": lambda turns: turns,
        "struct": lambda turns: turns[0],
        "dict of lists": lambda turns: {name: [turn[name] for turn in turns] for name in ("role", "content")},
        "text": lambda turns: turns[0]["content"],
        "list of texts": lambda turns: [turn["content"] for turn in turns],
        "JSON text": json.dumps,
        "without a role": lambda turns: [{"content": turn["content"]} for turn in turns],
        "parts": lambda turns: [{"role": "user", "content": parts(turns[0]["content"])}],
        "parts as a dict of lists": lambda turns: {
            "role": "user",
            "content": {"type": ["image", "text"], "text": [None, turns[0]["content"]]},
        },
    },
    "reward_model": {
        "struct": lambda model: model,
        "object": lambda model: {**model, "ground_truth": json.loads(model["ground_truth"])},
        "text": lambda model: model["ground_truth"],
        "JSON text": json.dumps,
    },
    "extra_info": {
        "struct": lambda extra: extra,
        "whole numbers": lambda extra: {**extra, "id": int(extra["id"])},
        "floats": lambda extra: {**extra, "id": float(extra["id"])},
        "decimals": lambda extra: {**extra, "id": Decimal(extra["id"]).quantize(Decimal("0.01"))},
        "bytes": lambda extra: {**extra, "id": extra["id"].encode()},
        "flag as text": lambda extra: {**extra, "no_target": " True" if extra["no_target"] else "FALSE"},
        "flag as a number": lambda extra: {**extra, "no_target": float(extra["no_target"])},
        "flag or nothing": lambda extra: {**extra, "no_target": extra["no_target"] or None},
    },
}
SHAPES["masks"] = SHAPES["images"]


def parts(text: str) -> list[dict[str, str | None]]:
    return [{"type": "image", "text": None}, {"type": "text", "text": text}]


@pytest.mark.parametrize(
    ("column", "shape"), [(column, shape) for column, shapes in SHAPES.items() for shape in shapes]
)
def test_a_column_of_another_shape_means_the_same(
    released: list[Sample], tmp_path: Path, column: str, shape: str
) -> None:
    rows = changed(**{column: SHAPES[column][shape]})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert samples(tmp_path / "rows.parquet") == released
    assert all(row.usable for row in checked(tmp_path / "rows.parquet"))


@st.composite
def respelled(draw: st.DrawFn, kind: pa.DataType) -> pa.DataType:
    """A type that holds the same as a plain one does."""
    if pa.types.is_string(kind):
        return draw(st.sampled_from(TEXTS))
    if pa.types.is_binary(kind):
        return draw(st.sampled_from(BINARIES))
    if pa.types.is_list(kind):
        return draw(st.sampled_from(LISTS))(draw(respelled(kind.value_type)))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, draw(respelled(field.type))) for field in kind])
    return kind


def flattened(row: Row, columns: set[str]) -> Row:
    """Some structs of a row as columns with dotted names, as pandas.json_normalize writes them."""
    flat: Row = {}
    for name, value in row.items():
        inner = value if name in columns and isinstance(value, dict) else None
        flat.update({f"{name}.{field}": each for field, each in inner.items()} if inner else {name: value})
    return flat


@st.composite
def tables(draw: st.DrawFn) -> tuple[pa.Table, pa.Schema]:
    """The rows in any shape, plain, and a schema that spells their types otherwise."""
    shapes = {column: draw(st.sampled_from(sorted(shapes))) for column, shapes in SHAPES.items()}
    rows = changed(**{column: SHAPES[column][shape] for column, shape in shapes.items()})
    dotted = draw(st.sets(st.sampled_from(sorted(SHAPES))))
    table = pa.Table.from_pylist([flattened(row, dotted) for row in rows])
    schema = pa.schema([(field.name, draw(respelled(field.type))) for field in table.schema])
    return table.select(draw(st.permutations(table.schema.names))), schema


def write_as(path: Path, table: pa.Table, schema: pa.Schema) -> Path:
    """The table in a file whose arrow schema is another: what Arrow cannot write it can read all the same."""
    schema = pa.schema([schema.field(name) for name in table.schema.names])
    with pq.ParquetWriter(path, table.schema, store_schema=False) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({b"ARROW:schema": base64.b64encode(schema.serialize().to_pybytes())})
    return path


@given(table=tables())
@settings(steady, max_examples=150)
def test_rows_mean_the_same_in_any_types_and_shapes(
    released: list[Sample], tmp_path: Path, table: tuple[pa.Table, pa.Schema]
) -> None:
    path = write_as(tmp_path / "rows.parquet", *table)
    assert samples(path) == released
    assert all(row.usable for row in checked(path))
    (file,) = open_files(path)
    pq.write_table(pa.Table.from_batches(copied(file, range(3), common_schema([file]))), tmp_path / "copy.parquet")
    assert samples(tmp_path / "copy.parquet") == released


@given(kind=st.sampled_from([field.type for field in pa.Table.from_pylist(ROWS).schema]).flatmap(respelled))
@steady
def test_the_plain_type_is_the_same_however_it_is_spelt(kind: pa.DataType) -> None:
    assert plain_type(kind) in [field.type for field in pa.Table.from_pylist(ROWS).schema]
