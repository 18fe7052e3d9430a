"""Columns of any content give rows, findings or one line that says what is wrong; nothing else. Of damaged files the
same is asked by `tests/fuzz.py`."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import phantoms
from umrg.checks import CheckedRow, DuplicateIndex, check_row
from umrg.dataset import Dataset, open_files
from umrg.row_groups import common_schema, copied, scan

# A busy machine is slow without being wrong.
steady = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])

ROWS: list[dict[str, Any]] = list(phantoms.rows(3, seed=5, size=112, modalities=["CT"]))
COLUMNS = ["extra_info", "images", "masks", "prompt", "reward_model"]


def checked(path: Path) -> list[CheckedRow]:
    duplicates = DuplicateIndex()
    return [check_row(row, file.path, number, duplicates) for file in open_files(path) for number, row in scan(file)]


KINDS = [pa.int64(), pa.float64(), pa.string(), pa.binary(), pa.bool_(), pa.null(), pa.date32(), pa.timestamp("s")]
KINDS += [pa.decimal128(9, 2), pa.timestamp("ns", "UTC"), pa.float16(), pa.binary(4), pa.duration("s")]
NAMES = [
    "bytes",
    "path",
    "role",
    "content",
    "text",
    "type",
    "ground_truth",
    "bbox_2d",
    "id",
    "category",
    "supercategory",
]
VALUES = [0, 1, -1.5, float("nan"), 2**40, "", "x", "[{}]", "{}", b"\xff\x00", True, {}, [], None, [{"content": "?"}]]


def junk_kinds() -> st.SearchStrategy[pa.DataType]:
    return st.recursive(
        st.sampled_from(KINDS),
        lambda inner: st.one_of(
            st.builds(pa.list_, inner),
            st.builds(pa.map_, st.just(pa.string()), inner),
            st.dictionaries(st.sampled_from(NAMES), inner, min_size=1, max_size=5).map(lambda d: pa.struct(d.items())),
        ),
        max_leaves=8,
    )


def junk_of(draw: st.DrawFn, kind: pa.DataType) -> Any:
    """A value of a type; None for those whose values do not matter here."""
    if draw(st.integers(0, 9)) == 0:
        return None
    if pa.types.is_struct(kind):
        return {field.name: junk_of(draw, field.type) for field in kind}
    if pa.types.is_list(kind):
        return [junk_of(draw, kind.value_type) for _ in range(draw(st.integers(0, 3)))]
    try:
        return pa.scalar(draw(st.sampled_from(VALUES)), type=kind).as_py()
    except (pa.ArrowException, OverflowError, TypeError, ValueError):
        return None


@st.composite
def junk_tables(draw: st.DrawFn) -> pa.Table:
    """The rows, one to all of their columns replaced by something of any type."""
    table = pa.Table.from_pylist(ROWS)
    for name in draw(st.sets(st.sampled_from(COLUMNS), min_size=1)):
        kind = draw(junk_kinds())
        array = pa.array([junk_of(draw, kind) for _ in ROWS], type=kind)
        table = table.set_column(table.schema.names.index(name), name, array)
    return table


@given(table=junk_tables())
@settings(steady, max_examples=150)
def test_any_columns_whatever_give_rows_findings_or_one_line(tmp_path: Path, table: pa.Table) -> None:
    pq.write_table(table, tmp_path / "rows.parquet")
    try:
        assert len(checked(tmp_path / "rows.parquet")) == 3
    except ValueError as error:
        assert "rows.parquet" in str(error) and "\n" not in str(error)
        return
    (file,) = open_files(tmp_path / "rows.parquet")
    for read in (lambda: list(Dataset.open(file.path)), lambda: list(copied(file, [0, 2], common_schema([file])))):
        try:
            read()
        except ValueError as error:
            assert "\n" not in str(error)
