"""Files that are damaged in places are read in all others."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from umrg.row_groups import Damage, RowFile, common_schema, scan


def written(path: Path, texts: list[bytes], rows_per_group: int) -> Path:
    """Questions as they are, UTF-8 or not."""
    kinds = pa.Array.from_buffers(pa.string(), len(texts), pa.array(texts, pa.binary()).buffers())
    pq.write_table(
        pa.table({"prompt": kinds, "number": range(len(texts))}),
        path,
        row_group_size=rows_per_group,
        compression="none",
        use_dictionary=False,
        write_statistics=False,
    )
    return path


def asked(rows: Iterable[tuple[int, Any]]) -> list[tuple[int, Any]]:
    return [(number, row if isinstance(row, Damage) else row["prompt"][0]["content"]) for number, row in rows]


@pytest.mark.parametrize("rows_per_group", [1, 7, 20, 100])
def test_every_row_is_given_in_order(tmp_path: Path, rows_per_group: int) -> None:
    path = written(tmp_path / "rows.parquet", [str(i).encode() for i in range(50)], rows_per_group)
    assert asked(scan(RowFile.open(path))) == [(i, str(i)) for i in range(50)]


def test_a_damaged_row_group_costs_its_own_rows_only(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.parquet", [b"row %02d " % i * 40 for i in range(50)], rows_per_group=10)
    content = path.read_bytes()
    start = content.index(b"row 20 row 20") - 20
    path.write_bytes(content[:start] + b"\xff" * 400 + content[start + 400 :])
    rows = list(scan(RowFile.open(path)))
    assert [number for number, _ in rows] == list(range(50))
    damaged = [number for number, row in rows if isinstance(row, Damage)]
    assert damaged == list(range(20, 30))
    assert isinstance(rows[25][1], Damage) and "rows 20 to 29, is damaged" in rows[25][1].reason


def test_a_text_that_is_not_utf8_costs_its_own_row_only(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.parquet", [b"a", b"b\xff", b"c"], rows_per_group=3)
    (_, first), (_, second), (_, third) = asked(scan(RowFile.open(path)))
    assert (first, third) == ("a", "c")
    assert second == Damage(reason="a text in it is not UTF-8 (invalid start byte at byte 1)")


def test_files_whose_columns_contradict_have_no_common_schema(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"a": [[1]], "b": ["x"]}), tmp_path / "b.parquet")
    files = [RowFile.open(tmp_path / name) for name in ("a.parquet", "b.parquet")]
    assert common_schema(files[1:]).names == ["a", "b"]
    with pytest.raises(ValueError, match=r"a\.parquet.*b\.parquet are of different types"):
        common_schema(files)
