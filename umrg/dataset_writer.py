"""Writing rows in the released schema."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from umrg.atomic import written_aside
from umrg.row_groups import Row

_FILE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_TEXTS = ("id", "supercategory", "category", "modality", "reasoning", "phrasing", "split")

RELEASED_SCHEMA = pa.schema(
    [
        ("data_source", pa.string()),
        ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("images", pa.list_(_FILE)),
        ("masks", pa.list_(_FILE)),
        ("ability", pa.string()),
        ("reward_model", pa.struct([("ground_truth", pa.string()), ("style", pa.string())])),
        (
            "extra_info",
            pa.struct([*((name, pa.string()) for name in _TEXTS), ("index", pa.int64()), ("no_target", pa.bool_())]),
        ),
    ]
)


def write_rows(
    path: Path,
    rows: Iterable[Row],
    *,
    schema: pa.Schema = RELEASED_SCHEMA,
    rows_per_group: int = 64,
    progress: Callable[[int], object] = lambda written: None,
) -> int:
    """Write rows to a parquet file, one row group in memory at a time; returns how many.

    The file is written aside and renamed when complete. Columns and fields that a row lacks become null; ones
    that the schema lacks raise ValueError. `progress` is told the number of rows written so far, after each
    row group.
    """
    written = 0
    with written_aside(path) as aside, pq.ParquetWriter(aside, schema, compression="zstd") as writer:
        for group in _groups(rows, rows_per_group):
            _refuse_unknown_fields(group, schema)
            writer.write_table(pa.Table.from_pylist(group, schema=schema), row_group_size=rows_per_group)
            written += len(group)
            progress(written)
    return written


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
            raise ValueError(f"a row has {names}, which the schema lacks; add it to the schema or leave it out")
