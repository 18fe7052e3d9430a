"""Random access to rows of parquet files whose row groups may be larger than memory should hold."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Row = dict[str, Any]
_STREAMED_ROWS = 8


@dataclass(frozen=True, kw_only=True)
class RowFile:
    """A parquet file's path and footer."""

    path: Path
    metadata: pq.FileMetaData = field(repr=False)

    @classmethod
    def open(cls, path: Path) -> "RowFile":
        """Read the footer. Raises ValueError for a missing file, a folder, or a file that is not parquet."""
        try:
            return cls(path=path, metadata=pq.read_metadata(path))
        except FileNotFoundError as error:
            raise ValueError(f"{path} does not exist; give the path of a parquet file") from error
        except (pa.ArrowInvalid, OSError) as error:
            what = "a folder" if path.is_dir() else "not a readable parquet file"
            raise ValueError(f"{path} is {what}; give the path of a parquet file") from error

    def reader(self) -> pq.ParquetFile:
        return pq.ParquetFile(self.path, metadata=self.metadata, pre_buffer=False, buffer_size=1 << 20)

    def locate(self, row: int) -> tuple[int, int]:
        """(row group, row within it) of a row of the file."""
        first = 0
        for group in range(self.metadata.num_row_groups):
            rows = self.metadata.row_group(group).num_rows
            if row < first + rows:
                return group, row - first
            first += rows
        raise IndexError(row)


def common_schema(files: Sequence[RowFile]) -> pa.Schema:
    """An arrow schema that holds the rows of all files. Raises ValueError where they contradict."""
    schemas = [file.metadata.schema.to_arrow_schema().remove_metadata() for file in files]
    try:
        return pa.unify_schemas(schemas, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        names = ", ".join(str(file.path) for file in files[:20])
        raise ValueError(f"the columns of {names} are of different types ({error})") from error


@dataclass(frozen=True, kw_only=True)
class Damage:
    """Why a row cannot be read from its file."""

    reason: str


def scan(file: RowFile) -> Iterator[tuple[int, Row | Damage]]:
    """Every row of a file with its number, in order, a few in memory at a time.

    Where a row group's bytes are damaged, its rows from there on are given as `Damage`, and so is a row whose text
    is not UTF-8; the others are read.
    """
    first = 0
    for group in range(file.metadata.num_row_groups):
        done, end = first, first + file.metadata.row_group(group).num_rows
        try:
            for batch in file.reader().iter_batches(_STREAMED_ROWS, row_groups=[group]):
                for offset in range(batch.num_rows):
                    yield done, _row_or_damage(batch, offset)
                    done += 1
        except (pa.ArrowException, OSError) as error:
            damage = Damage(reason=f"its row group, rows {first} to {end - 1}, is damaged ({_short(error)})")
            yield from ((number, damage) for number in range(done, end))
        first = end


def _row_or_damage(rows: pa.RecordBatch, offset: int) -> Row | Damage:
    try:
        return _python_row(rows, offset)
    except UnicodeDecodeError as error:
        return Damage(reason=f"a text in it is not UTF-8 ({error.reason} at byte {error.start})")


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


class RowGroups:
    """Reads single rows. The row groups used last are kept while together they fit in `budget` bytes; one
    that is larger by itself is streamed a few rows at a time, which is quick in rising order of rows only."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._kept: OrderedDict[tuple[Path, int], pa.Table] = OrderedDict()
        self._stream: _Stream | None = None

    def __getstate__(self) -> int:
        return self._budget

    def __setstate__(self, budget: int) -> None:
        RowGroups.__init__(self, budget)

    def row(self, file: RowFile, row: int) -> Row:
        """One row with all its columns; `row` counts from the file's start."""
        group, offset = file.locate(row)
        if file.metadata.row_group(group).total_byte_size > self._budget:
            return self._streamed(file, group, offset)
        return _python_row(self._table(file, group), offset)

    def _table(self, file: RowFile, group: int) -> pa.Table:
        key = (file.path, group)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        table = file.reader().read_row_group(group)
        self._kept[key] = table
        while len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept.values()) > self._budget:
            self._kept.popitem(last=False)
        return table

    def _streamed(self, file: RowFile, group: int, offset: int) -> Row:
        if self._stream is None or not self._stream.can_reach(file.path, group, offset):
            self._stream = _Stream(file, group)
        return self._stream.row(offset)


class _Stream:
    """A pass over one row group that holds only the few rows it is at."""

    def __init__(self, file: RowFile, group: int) -> None:
        self._key = (file.path, group)
        self._batches: Iterator[pa.RecordBatch] = file.reader().iter_batches(_STREAMED_ROWS, row_groups=[group])
        self._first = 0
        self._batch = next(self._batches)

    def can_reach(self, path: Path, group: int, offset: int) -> bool:
        return self._key == (path, group) and offset >= self._first

    def row(self, offset: int) -> Row:
        while offset >= self._first + self._batch.num_rows:
            self._first += self._batch.num_rows
            self._batch = next(self._batches)
        return _python_row(self._batch, offset - self._first)


def _python_row(rows: pa.Table | pa.RecordBatch, offset: int) -> Row:
    (row,) = rows.slice(offset, 1).to_pylist()
    return dict(row)
