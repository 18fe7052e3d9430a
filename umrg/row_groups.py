"""Reading parquet rows sequentially, at random or for copying, even if a row group does not fit into memory."""

import os.path
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from umrg.columns import Row, leaf_columns, plain_row, read_columns, released_batch, released_columns
from umrg.foreign_files import what_it_is_but_text
from umrg.mistake import Mistake

_STREAMED_ROWS = 8
_STREAMED_BYTES = 32 << 20
# Columns without image bytes are small, so more rows fit into one batch.
LIGHT_ROWS = 1024
_UNREADABLE = (pa.ArrowException, OSError)
_NO_ROWS = pa.record_batch({})


@dataclass(frozen=True, kw_only=True)
class RowFile:
    """A parquet file with its footer and Arrow schema."""

    path: Path
    metadata: pq.FileMetaData = field(repr=False)
    schema: pa.Schema = field(repr=False)

    @classmethod
    def open(cls, path: Path) -> "RowFile":
        """Read the footer. Raises ValueError if the path is missing, a folder or not a parquet file."""
        try:
            metadata = pq.read_metadata(path)
            schema = pq.ParquetFile(path, metadata=metadata).schema_arrow
        except FileNotFoundError as error:
            raise Mistake(f"{path} does not exist; give the path of a parquet file") from error
        except (*_UNREADABLE, UnicodeDecodeError) as error:
            raise Mistake(f"{path} is {_kind_of(path)}; give the path of a parquet file") from error
        if not _counts_agree(metadata):
            raise Mistake(f"{path} has a damaged footer: its numbers of rows contradict; write the file again")
        return cls(path=path, metadata=metadata, schema=schema)

    @property
    def rows(self) -> int:
        return int(self.metadata.num_rows)

    def paths(self, leaves: Collection[str]) -> list[str]:
        """Parquet's own paths of the leaf columns with these names. Its paths include list levels."""
        schema = self.metadata.schema
        named = zip(leaf_columns(self.schema), range(len(schema)), strict=True)
        return [schema.column(i).path for leaf, i in named if leaf in leaves]

    def batches(
        self, group: int, columns: Sequence[str] | None = None, most: int = _STREAMED_ROWS
    ) -> Iterator[pa.RecordBatch]:
        """The rows of a row group in batches of up to `most` rows or, if the first row is large, of about 32 MiB."""
        # The first row is read to learn the decoded size: the footer understates it, because dictionary encoding
        # stores a repeated image once.
        file = pq.ParquetFile(self.path, metadata=self.metadata, pre_buffer=False, buffer_size=1 << 20)
        first = next(file.iter_batches(1, row_groups=[group], columns=columns), None)
        size = max(1, first.get_total_buffer_size()) if first else 1
        rows = min(most, max(1, _STREAMED_BYTES // size))
        batches: Iterator[pa.RecordBatch] = file.iter_batches(rows, row_groups=[group], columns=columns)
        return batches

    def groups(self) -> Iterator[range]:
        """The range of row numbers of each row group."""
        first = 0
        for group in range(self.metadata.num_row_groups):
            yield range(first, first := first + self.metadata.row_group(group).num_rows)

    def locate(self, row: int) -> tuple[int, int]:
        """The row group that holds a row, and the row's offset within it."""
        for group, rows in enumerate(self.groups()):
            if row in rows:
                return group, row - rows.start
        raise IndexError(row)


def _kind_of(path: Path) -> str:
    if os.path.isdir(path):
        return "a folder"
    if os.path.isfile(path) and os.path.getsize(path) == 0:
        return "empty"
    return what_it_is_but_text(path) or "not a readable parquet file"


def _counts_agree(metadata: pq.FileMetaData) -> bool:
    # Only row counts are compared: accessing the metadata of a damaged column chunk crashes pyarrow's process.
    counts = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    return min(counts, default=0) >= 0 and sum(counts) == metadata.num_rows


def common_schema(files: Sequence[RowFile]) -> pa.Schema:
    """The schema in which rows of all files can be written. Raises ValueError if their column types conflict."""
    schemas = [released_columns(file.schema) for file in files]
    try:
        return pa.unify_schemas(schemas, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        names = ", ".join(str(file.path) for file in files[:20])
        raise Mistake(f"the columns of {names} are of different types ({error})") from error


@dataclass(frozen=True, kw_only=True)
class Damage:
    """A row that cannot be read from its file."""

    reason: str
    """The cause, phrased to complete the sentence "the row cannot be read: …"."""


def scan(
    file: RowFile,
    leaves: Collection[str] | None = None,
    *,
    most: int = _STREAMED_ROWS,
    rows: Sequence[int] | None = None,
) -> Iterator[tuple[int, Row | Damage]]:
    """Yield the rows of a file with their numbers, in order, holding only a few rows in memory.

    leaves: The leaf columns to read, all by default. most: Rows in memory, fewer if they are large. rows: Ascending
    numbers of the rows to yield, all by default; row groups without any are not read.
    If a row group's bytes are damaged, its rows from the damage on are yielded as `Damage`, and so is a row whose text
    is not UTF-8. All other rows are read.
    """
    columns = None if leaves is None else file.paths(leaves)
    for group, inside in enumerate(file.groups()):
        wanted = inside if rows is None else _within(rows, inside)
        if not wanted:
            continue
        done, damage, chosen = inside.start, _damaged(inside, "it ends early"), set(wanted)
        try:
            for batch in file.batches(group, columns, most):
                for row in _rows(batch):
                    if done in chosen:
                        yield done, row
                    done += 1
                if done > wanted[-1]:
                    break
        except _UNREADABLE as error:
            damage = _damaged(inside, error)
        yield from ((number, damage) for number in wanted if number >= done)


def _within(rows: Sequence[int], inside: range) -> Sequence[int]:
    """Those of some ascending row numbers that lie in a row group."""
    return rows[bisect_left(rows, inside.start) : bisect_left(rows, inside.stop)]


def _rows(batch: pa.RecordBatch) -> list[Row | Damage]:
    read = batch.select(read_columns(batch.schema))
    try:
        return [plain_row(row) for row in read.to_pylist()]
    except (ValueError, OverflowError):
        # One bad value fails the conversion of the whole batch; row by row, only its own row is lost.
        return [_row_or_damage(read.slice(offset, 1)) for offset in range(read.num_rows)]


def _row_or_damage(row: pa.RecordBatch) -> Row | Damage:
    """Convert a batch of one row, or of no row if the row group ended early."""
    if not row.num_rows:
        return Damage(reason="its row group ends before it")
    try:
        return plain_row(row.to_pylist()[0])
    except UnicodeDecodeError as error:
        return Damage(reason=f"a text in it is not UTF-8 ({error.reason} at byte {error.start})")
    except (ValueError, OverflowError) as error:
        return Damage(reason=f"a value in it has no plain form ({_short(error)})")


def _damaged(rows: range, error: object) -> Damage:
    return Damage(reason=f"its row group, rows {rows.start} to {rows.stop - 1}, is damaged ({_short(error)})")


def _short(error: object) -> str:
    return " ".join(str(error).split())[:200]


def copied(file: RowFile, rows: Sequence[int], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Yield the given rows, in ascending order, with all columns in a schema made by `common_schema`.

    Only a few rows are in memory at a time. Raises ValueError if a row is damaged.
    """
    for group, inside in enumerate(file.groups()):
        wanted = [row - inside.start for row in _within(rows, inside)]
        try:
            yield from _copied(file, group, wanted, schema) if wanted else ()
        except _UNREADABLE as error:
            raise Mistake(f"{file.path} cannot be copied: {_damaged(inside, error).reason}") from error


def _copied(file: RowFile, group: int, wanted: Sequence[int], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    first = 0
    for batch in file.batches(group):
        end = first + batch.num_rows
        here = [row - first for row in wanted[bisect_left(wanted, first) : bisect_left(wanted, end)]]
        if len(here) == batch.num_rows:
            yield released_batch(batch, schema)
        else:
            yield from (released_batch(batch.slice(row, 1), schema) for row in here)
        first = end
        if first > wanted[-1]:
            # Reading on could fail, because rows after the last wanted one may be damaged.
            return


class RowGroups:
    """Random access to rows through an LRU cache of decoded row groups that holds at most `budget` bytes.

    A row group larger than the budget is streamed a few rows at a time, which is fast only in ascending row order.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._kept: OrderedDict[tuple[Path, int], _Kept] = OrderedDict()
        self._large: set[tuple[Path, int]] = set()
        self._stream: _Stream | None = None

    # Only the budget is pickled: open streams cannot be, and the cache would be large.
    def __getstate__(self) -> int:
        return self._budget

    def __setstate__(self, budget: int) -> None:
        RowGroups.__init__(self, budget)

    def row(self, file: RowFile, row: int) -> Row:
        """The columns of one row that a sample is built from; `row` counts from the start of the file.

        Raises ValueError if the row is damaged.
        """
        group, offset = file.locate(row)
        try:
            found = _row_or_damage(self._batch(file, group, offset))
        except _UNREADABLE as error:
            found = Damage(reason=f"its row group is damaged ({_short(error)})")
        if isinstance(found, Damage):
            raise Mistake(f"row {row} of {file.path} cannot be read: {found.reason}; write the file again")
        return found

    def _batch(self, file: RowFile, group: int, offset: int) -> pa.RecordBatch:
        key = (file.path, group)
        if key not in self._kept and key not in self._large:
            self._keep(file, group)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key].row(offset)
        if self._stream is None or not self._stream.can_reach(key, offset):
            self._stream = _Stream(file, group)
        return self._stream.row(offset)

    def _keep(self, file: RowFile, group: int) -> None:
        """Cache a row group, evicting the least recently used ones, or mark it as too large for the budget."""
        kept = _Kept()
        for batch in file.batches(group, read_columns(file.schema)):
            kept.add(batch)
            if kept.size > self._budget:
                self._large.add((file.path, group))
                return
            while sum(other.size for other in self._kept.values()) + kept.size > self._budget:
                self._kept.popitem(last=False)
        self._kept[file.path, group] = kept


class _Kept:
    """A decoded row group in memory."""

    def __init__(self) -> None:
        self.size = 0
        """Size in bytes."""
        self._starts: list[int] = []
        self._batches: list[pa.RecordBatch] = []
        self._rows = 0

    def add(self, batch: pa.RecordBatch) -> None:
        self._starts.append(self._rows)
        self._batches.append(batch)
        self._rows += batch.num_rows
        self.size += batch.get_total_buffer_size()

    def row(self, offset: int) -> pa.RecordBatch:
        if offset >= self._rows:
            return _NO_ROWS
        # The last batch that starts at or before the offset holds the row.
        at = bisect_right(self._starts, offset) - 1
        return self._batches[at].slice(offset - self._starts[at], 1)


class _Stream:
    """A forward pass over one row group that holds only the current batch."""

    def __init__(self, file: RowFile, group: int) -> None:
        self._key = (file.path, group)
        self._batches = file.batches(group, read_columns(file.schema))
        self._first = 0
        self._batch = next(self._batches, _NO_ROWS)

    def can_reach(self, key: tuple[Path, int], offset: int) -> bool:
        return self._key == key and offset >= self._first

    def row(self, offset: int) -> pa.RecordBatch:
        while self._batch.num_rows and offset >= self._first + self._batch.num_rows:
            self._first += self._batch.num_rows
            self._batch = next(self._batches, _NO_ROWS)
        return self._batch.slice(min(offset - self._first, self._batch.num_rows), 1)
