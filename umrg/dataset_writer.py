"""Writing parquet files in the released schema."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from umrg.atomic import written_aside
from umrg.columns import RELEASED_SCHEMA, Row
from umrg.mistake import Mistake

# Row groups are small because reading a single row decodes its whole row group.
_GROUP_ROWS = 64
_GROUP_BYTES = 64 << 20


def write_rows(
    path: Path,
    rows: Iterable[Row],
    *,
    schema: pa.Schema = RELEASED_SCHEMA,
    rows_per_group: int = _GROUP_ROWS,
    progress: Callable[[int], object] = lambda written: None,
) -> int:
    """Write rows to a parquet file, one row group in memory at a time, and return their number.

    The file is written under a temporary name and renamed when complete. Columns and fields missing from a row become
    null; those missing from the schema raise Mistake. After each row group, `progress` is called with the number of
    rows written so far.
    """
    written = 0
    with written_aside(path) as aside, pq.ParquetWriter(aside, schema, compression="zstd") as writer:
        for group in _groups(rows, rows_per_group):
            _refuse_unknown_fields(group, schema)
            writer.write_table(pa.Table.from_pylist(group, schema=schema), row_group_size=rows_per_group)
            written += len(group)
            progress(written)
    return written


def write_batches(
    path: Path,
    batches: Iterable[pa.RecordBatch],
    *,
    schema: pa.Schema,
    progress: Callable[[int], object] = lambda written: None,
) -> int:
    """Write record batches of one schema to a parquet file and return the number of rows.

    A row group is closed once it has 64 rows or 64 MiB. Temporary file and `progress` work as in `write_rows`.
    """
    written = 0
    with written_aside(path) as aside, pq.ParquetWriter(aside, schema, compression="zstd") as writer:
        for group in _batched(batches):
            table = pa.Table.from_batches(group, schema=schema)
            writer.write_table(table, row_group_size=table.num_rows)
            written += table.num_rows
            progress(written)
    return written


def _batched(batches: Iterable[pa.RecordBatch]) -> Iterator[list[pa.RecordBatch]]:
    group: list[pa.RecordBatch] = []
    rows = size = 0
    for batch in batches:
        group.append(batch)
        rows, size = rows + batch.num_rows, size + batch.get_total_buffer_size()
        if rows >= _GROUP_ROWS or size >= _GROUP_BYTES:
            yield group
            group, rows, size = [], 0, 0
    if group:
        yield group


def _groups(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    remaining = iter(rows)
    while group := list(islice(remaining, size)):
        yield group


def _refuse_unknown_fields(rows: list[Row], schema: pa.Schema) -> None:
    columns = set(schema.names)
    fields = {field.name for field in schema.field("extra_info").type}
    for row in rows:
        unknown = sorted((row.keys() - columns) | ((row.get("extra_info") or {}).keys() - fields))
        if unknown:
            names = ", ".join(unknown)
            raise Mistake(f"a row has {names}, which the schema lacks; add it to the schema or leave it out")
