"""Files that are damaged in places are read in all others."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from umrg.columns import RELEASED_SCHEMA
from umrg.dataset_writer import write_batches
from umrg.row_groups import Damage, RowFile, RowGroups, common_schema, copied, scan


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


@pytest.mark.parametrize("rows_per_group", [1, 7, 20, 100])
@pytest.mark.parametrize("wanted", [[], [0], [49], [3, 4, 20, 41], list(range(50))])
def test_some_rows_are_given_in_order(tmp_path: Path, rows_per_group: int, wanted: list[int]) -> None:
    path = written(tmp_path / "rows.parquet", [str(i).encode() for i in range(50)], rows_per_group)
    assert asked(scan(RowFile.open(path), rows=wanted)) == [(i, str(i)) for i in wanted]


def test_of_some_rows_only_their_own_row_groups_are_read(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.parquet", [b"row %02d " % i * 40 for i in range(50)], rows_per_group=10)
    content = path.read_bytes()
    start = content.index(b"row 20 row 20") - 20
    path.write_bytes(content[:start] + b"\xff" * 400 + content[start + 400 :])
    file, read = RowFile.open(path), list[int]()

    class Watched(RowFile):
        def batches(self, group: int, *arguments: Any) -> Iterator[pa.RecordBatch]:
            read.append(group)
            return file.batches(group, *arguments)

    watched = Watched(path=file.path, metadata=file.metadata, schema=file.schema)
    rows = list(scan(watched, rows=[3, 22, 49]))
    assert [(number, isinstance(row, Damage)) for number, row in rows] == [(3, False), (22, True), (49, False)]
    assert read == [0, 2, 4]


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


def test_a_footer_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.parquet", [b"a"] * 77, rows_per_group=77)
    content = path.read_bytes()
    # The rows of the file, as a zigzag number; those of its row group come later.
    at = content.index(b"\x9a\x01", content.index(b"number", len(content) // 2))
    path.write_bytes(content[:at] + b"\x9c\x01" + content[at + 2 :])
    with pytest.raises(ValueError, match="damaged footer"):
        RowFile.open(path)


@pytest.fixture
def pool() -> Iterator[pa.MemoryPool]:
    """What Arrow takes while a test runs, apart from what others took before."""
    former, own = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(own)
    yield own
    pa.set_memory_pool(former)


IMAGE = bytes(1 << 20)


def repeated(path: Path, rows: int) -> RowFile:
    """A row group that repeats one image of a MiB: a few bytes in the file, a MiB for each row that is read."""
    images = [[{"bytes": IMAGE, "path": "a.png"}]] * rows
    prompts = [[{"role": "user", "content": f"{i}"}] for i in range(rows)]
    pq.write_table(pa.table({"images": images, "prompt": prompts}), path, row_group_size=rows)
    assert pq.read_metadata(path).row_group(0).total_byte_size < 3 * len(IMAGE)
    return RowFile.open(path)


@pytest.mark.parametrize("budget", [1, 30 << 20, 1 << 30])
def test_rows_that_share_an_image_in_the_file_take_no_more_memory_than_they_may(
    pool: pa.MemoryPool, tmp_path: Path, budget: int
) -> None:
    file = repeated(tmp_path / "rows.parquet", rows=120)
    before = pool.max_memory()
    groups = RowGroups(budget)
    for row in (0, 1, 60, 119, 3):
        read = groups.row(file, row)
        assert (len(read["images"][0]["bytes"]), read["prompt"][0]["content"]) == (len(IMAGE), str(row))
    # Beside what is kept, the batch at hand and the one in the making.
    assert pool.max_memory() - before < min(budget, 120 * len(IMAGE)) + 40 * len(IMAGE)


def test_rows_that_share_an_image_in_the_file_are_checked_and_copied_a_few_at_a_time(
    pool: pa.MemoryPool, tmp_path: Path
) -> None:
    file = repeated(tmp_path / "rows.parquet", rows=200)
    before = pool.max_memory()
    assert asked(scan(file)) == [(i, str(i)) for i in range(200)]
    assert pool.max_memory() - before < 40 * len(IMAGE)
    write_batches(
        tmp_path / "copy.parquet", copied(file, range(200), common_schema([file])), schema=common_schema([file])
    )
    assert pool.max_memory() - before < 180 * len(IMAGE)
    assert pq.read_metadata(tmp_path / "copy.parquet").num_rows == 200


def test_rows_larger_than_usual_are_read_one_at_a_time(tmp_path: Path) -> None:
    large = pa.table({"images": [[{"bytes": bytes(40 << 20)}]] * 3})
    pq.write_table(large, tmp_path / "rows.parquet")
    assert [batch.num_rows for batch in RowFile.open(tmp_path / "rows.parquet").batches(0)] == [1, 1, 1]


def test_nothing_after_the_last_row_wanted_is_read(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.parquet", [b"row %02d " % i * 40000 for i in range(50)], rows_per_group=50)
    content = path.read_bytes()
    start = content.index(b"row 40 row 40") - 20
    path.write_bytes(content[:start] + b"\xff" * 400_000 + content[start + 400_000 :])
    file = RowFile.open(path)
    schema = common_schema([file])
    assert schema.field("prompt").type == RELEASED_SCHEMA.field("prompt").type
    assert sum(batch.num_rows for batch in copied(file, [0, 3, 17], schema)) == 3
    with pytest.raises(ValueError, match="cannot be copied: its row group, rows 0 to 49, is damaged"):
        list(copied(file, [0, 49], schema))
