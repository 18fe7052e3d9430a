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

import phantoms
from umrg.checks import CheckedRow, DuplicateIndex, check_row
from umrg.columns import RELEASED_SCHEMA, plain_row, plain_type
from umrg.dataset import Dataset, open_files, write_rows
from umrg.dataset_writer import write_batches
from umrg.images import encode_png
from umrg.row_groups import common_schema, copied, scan
from umrg.rows import turns
from umrg.sample import Sample

# A busy machine is slow without being wrong.
steady = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])

Row = dict[str, Any]

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
    return [row | {name: make(row[name]) for name, make in columns.items()} for row in deepcopy(ROWS)]


def checked(path: Path) -> list[CheckedRow]:
    duplicates = DuplicateIndex()
    return [check_row(row, file.path, number, duplicates) for file in open_files(path) for number, row in scan(file)]


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
@settings(steady, max_examples=60)
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


def written(path: Path, rows: list[Row], **types: pa.DataType) -> Path:
    """The rows in a file, some columns in types of their own."""
    table = pa.Table.from_pylist(rows)
    for name, kind in types.items():
        table = table.set_column(table.schema.names.index(name), name, table.column(name).cast(kind))
    pq.write_table(table, path)
    return path


def test_lists_of_a_fixed_size_mean_the_same(released: list[Sample], tmp_path: Path) -> None:
    lists = ("images", "masks", "prompt")
    table = pa.Table.from_pylist(ROWS)
    fixed = [(f.name, pa.list_(f.type.value_type, 1) if f.name in lists else f.type) for f in table.schema]
    assert samples(write_as(tmp_path / "rows.parquet", table, pa.schema(fixed))) == released


def test_what_pandas_writes_means_the_same(released: list[Sample], tmp_path: Path) -> None:
    frame = pd.DataFrame(ROWS)
    frame["data_source"] = frame["data_source"].astype("category")
    frame.to_parquet(tmp_path / "frame.parquet")
    # Its columns are called `extra_info.id` and `reward_model.ground_truth`, and the missing id makes floats of all.
    flat = pd.json_normalize(changed(extra_info=lambda extra: {**extra, "id": int(extra["id"])}))
    flat.to_parquet(tmp_path / "flat.parquet")
    flat.loc[len(flat)] = flat.loc[0]
    flat["extra_info.id"] = [7, 8, 9, np.nan]
    flat.to_parquet(tmp_path / "gap.parquet")
    assert samples(tmp_path / "frame.parquet") == samples(tmp_path / "flat.parquet") == released
    rows = checked(tmp_path / "gap.parquet")
    assert [row.info and row.info.id for row in rows] == ["7", "8", "9", None]
    assert "has no extra_info.id" in rows[3].findings[0].message


def test_what_datasets_writes_means_the_same_and_datasets_reads_what_we_write(
    released: list[Sample], tmp_path: Path
) -> None:
    whole = datasets.Dataset.from_list(ROWS)
    whole.cast_column("images", datasets.Sequence(datasets.Image(decode=False))).to_parquet(tmp_path / "images.parquet")
    # An older `Sequence` of a dict is a dict of lists.
    lists = datasets.Dataset.from_list(
        changed(images=SHAPES["images"]["dict of lists"], masks=SHAPES["masks"]["dict of lists"])
    )
    lists.to_parquet(tmp_path / "lists.parquet")
    one = datasets.Dataset.from_list(changed(images=SHAPES["images"]["struct"]))
    one.cast_column("images", datasets.Image(decode=False)).to_parquet(tmp_path / "one.parquet")
    for name in ("images", "lists", "one"):
        assert samples(tmp_path / f"{name}.parquet") == released
    files = open_files(tmp_path / "one.parquet")
    write_batches(
        tmp_path / "ours.parquet", copied(files[0], [0, 2], common_schema(files)), schema=common_schema(files)
    )
    read = datasets.Dataset.from_parquet(str(tmp_path / "ours.parquet"), cache_dir=str(tmp_path / "cache"))
    assert [row["images"] for row in read] == [ROWS[0]["images"], ROWS[2]["images"]]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("7.0", "7.0"),
        (7.0, "7"),
        (2**63 - 1, str(2**63 - 1)),
        (7.5, "7.5"),
        (Decimal("12.00"), "12"),
        (b"a-7", "a-7"),
        (float("nan"), None),
        (None, None),
    ],
)
def test_ids_are_texts_whatever_type_they_have(value: object, text: str | None) -> None:
    assert plain_row({"extra_info": {"id": value}}) == {"extra_info": {"id": text}}


@pytest.mark.parametrize(
    ("values", "flag"),
    [
        (("False", "false", " no ", "NO", "0", "", 0, 0.0, False), False),
        (("True", "TRUE", "yes", "1", 1, 1.0, True), True),
        ((None, float("nan")), None),
    ],
)
def test_flags_are_read_in_any_spelling(values: tuple[object, ...], flag: bool | None) -> None:
    for value in values:
        assert plain_row({"extra_info": {"no_target": value}}) == {"extra_info": {"no_target": flag}}


@pytest.mark.parametrize("value", ["maybe", "nan", "2", "-1", 2, 0.5])
def test_a_flag_that_is_neither_true_nor_false_is_refused(tmp_path: Path, value: object) -> None:
    path = written(tmp_path / "rows.parquet", changed(extra_info=lambda extra: {**extra, "no_target": value}))
    said = rf"has the no_target {value!r}; write true or false"
    with pytest.raises(ValueError, match=rf"row 0 of .*rows\.parquet {said}"):
        Dataset.open(path)
    assert all(said in row.findings[0].message for row in checked(path))


def test_a_false_flag_in_words_does_not_hide_an_empty_mask(tmp_path: Path) -> None:
    empty = [{"bytes": encode_png(np.zeros((112, 112), dtype=np.bool_)), "path": None}]
    rows = changed(extra_info=SHAPES["extra_info"]["flag as text"], masks=lambda _: empty)
    found = checked(written(tmp_path / "rows.parquet", rows))
    assert [row.usable for row in found] == [False, False, True]
    assert [finding.check.name for finding in found[0].findings] == ["empty_mask"]


def test_the_last_turn_of_the_user_is_the_question(tmp_path: Path) -> None:
    said = [
        ("system", "Be brief."),
        ("User", "Which view?"),
        ("assistant", "Axial."),
        ("", "<image>"),
        ("user", "Where?"),
    ]
    row = plain_row({"prompt": [{"role": role, "content": parts(text)} for role, text in said]})
    assert [role for role, _ in turns(row)] == ["system", "user", "assistant", "user", "user"]
    path = written(tmp_path / "rows.parquet", changed(prompt=lambda _: row["prompt"]))
    assert {sample.query for sample in Dataset.open(path)} == {"Where?"}
    assert all("unseen_turns" in [finding.check.name for finding in row.findings] for row in checked(path))


REFUSED: list[tuple[dict[str, Callable[[Any], Any]], str]] = [
    ({"images": lambda files: files[0]["path"]}, "has images of type string; images.bytes must be binary"),
    (
        {"images": lambda files: [list(files[0]["bytes"][:9])]},
        "has images of type list<item: list<item: int64>>; ",
    ),
    (
        {"masks": lambda files: [{"bytes": "iVBOR", "path": ""}]},
        "has masks.bytes of type string; masks.bytes must",
    ),
    ({"masks": lambda files: [{"path": "a.png"}]}, "lacks masks.bytes; a dataset has the columns images.bytes, "),
    (
        {"prompt": lambda turns: [{"role": "user", "content": 7}]},
        "has prompt.content of type int64; prompt.content",
    ),
    ({"prompt": lambda turns: 7}, "has prompt of type int64; prompt.content must be text"),
    ({"prompt": lambda turns: [{"role": "user"}]}, "lacks prompt.content; "),
    ({"reward_model": lambda model: {"style": "rule"}}, "lacks reward_model.ground_truth; "),
    (
        {"reward_model": lambda model: {"ground_truth": [1, 2]}},
        "reward_model.ground_truth must be JSON text, or",
    ),
    ({"extra_info": json.dumps}, "has extra_info of type string; extra_info.id must be text or a number"),
    (
        {"extra_info": lambda extra: {**extra, "id": [7]}},
        "has extra_info.id of type list<item: int64>; extra_in",
    ),
]


@pytest.mark.parametrize(("columns", "message"), REFUSED)
def test_columns_that_do_not_say_plainly_what_they_mean_are_refused_in_a_line(
    tmp_path: Path, columns: dict[str, Callable[[Any], Any]], message: str
) -> None:
    path = written(tmp_path / "rows.parquet", changed(**columns))
    with pytest.raises(ValueError) as refusal:
        Dataset.open(path)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_one_name_for_two_things_is_refused(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table.append_column("extra_info.id", pa.array("abc")), tmp_path / "both.parquet")
    with pytest.raises(ValueError, match=r"has the columns extra_info and extra_info\.id; keep one"):
        Dataset.open(tmp_path / "both.parquet")
    pq.write_table(table.append_column("ability", pa.array("abc")), tmp_path / "twice.parquet")
    with pytest.raises(ValueError, match="has the columns ability and ability; keep one"):
        Dataset.open(tmp_path / "twice.parquet")


def test_columns_that_hold_nothing_are_faults_of_their_rows(tmp_path: Path) -> None:
    rows = changed(images=lambda _: None, extra_info=lambda extra: {**extra, "reasoning": None})
    found = checked(written(tmp_path / "rows.parquet", rows))
    assert [row.findings[0].message for row in found] == ["the row has 0 images with bytes; it must have one"] * 3


def test_a_file_without_rows_is_called_that(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS)[:0], tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=r"rows\.parquet has no rows"):
        Dataset.open(tmp_path / "rows.parquet")
    (tmp_path / "nothing.parquet").touch()
    with pytest.raises(ValueError, match=r"nothing\.parquet is empty; give the path of a parquet file"):
        Dataset.open(tmp_path / "nothing.parquet")


def test_files_of_several_kinds_are_one_dataset(released: list[Sample], tmp_path: Path) -> None:
    """Columns that are not read here are copied, too, and so are other fields of those that are."""
    struct = changed(images=SHAPES["images"]["struct"], data_source=lambda _: "a")[:1]
    lists = changed(
        images=SHAPES["images"]["dict of lists"],
        reward_model=SHAPES["reward_model"]["object"],
        extra_info=lambda extra: {**extra, "id": int(extra["id"]), "site": "B"},
    )[1:]
    written(tmp_path / "a.parquet", struct, data_source=pa.dictionary(pa.int8(), pa.string()))
    written(tmp_path / "b.parquet", [{**row, "score": 0.5} for row in lists], data_source=pa.large_string())
    both = Dataset.open([tmp_path / "a.parquet", tmp_path / "b.parquet"])
    write_batches(tmp_path / "all.parquet", both.copied(range(3)), schema=both.schema)
    assert samples(tmp_path / "all.parquet") == released
    copy = pq.read_table(tmp_path / "all.parquet")
    assert copy.column("data_source").to_pylist() == ["a", *[row["data_source"] for row in ROWS[1:]]]
    assert copy.column("score").to_pylist() == [None, 0.5, 0.5]
    assert [extra["site"] for extra in copy.column("extra_info").to_pylist()] == [None, "B", "B"]
    assert copy.schema.field("images").type == RELEASED_SCHEMA.field("images").type
