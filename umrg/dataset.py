"""Datasets in the released schema: parquet files whose images are read lazily.

Opening a dataset reads ids, names and queries of all rows, but no image bytes. `dataset[i]` then reads the row group
that holds the row, and validates the row. `umrg.columns` lists the accepted columns.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from difflib import get_close_matches
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa

from umrg.columns import INFO_LEAVES, Row, check_columns, unmasked_leaves
from umrg.dataset_writer import write_rows
from umrg.mistake import Mistake
from umrg.names import category_matches, modality_matches
from umrg.row_groups import LIGHT_ROWS, Damage, RowFile, RowGroups, common_schema, copied, scan
from umrg.rows import (
    RowInfo,
    box_fault,
    parse_ground_truth,
    point_fault,
    read_info,
    read_sample,
)
from umrg.sample import Sample
from umrg.shuffling import Cursor, batches

__all__ = ["Cursor", "Dataset", "RowInfo", "batches", "check_names", "parse_ground_truth", "write_rows"]

# Bytes of decoded row groups in memory: 256 MiB.
_MEMORY = 256 << 20


class Dataset:
    """The rows of one or more parquet files. Create it with `Dataset.open`. It can be pickled."""

    def __init__(self, files: Sequence[RowFile], infos: Sequence[RowInfo], memory: int) -> None:
        self._files = {file.path: file for file in files}
        self._infos = list(infos)
        self._memory, self._groups = memory, RowGroups(memory)

    @classmethod
    def open(
        cls,
        paths: Path | str | Sequence[Path | str],
        *,
        supercategory: str | Sequence[str] | None = None,
        category: str | Sequence[str] | None = None,
        modality: str | Sequence[str] | None = None,
        memory: int = _MEMORY,
    ) -> "Dataset":
        """Open files and select the rows that pass every filter.

        A filter is one or several names in any spelling. A modality family ("MRI") matches all of its sequences.
        memory: Bytes of decoded row groups to cache. A row group larger than that is streamed.
        Raises ValueError if a file is missing, not parquet or lacks required columns, if an id occurs twice, if a
        filter names something that no row has, or if no row is left.
        """
        files = open_files(paths)
        infos = [info for file in files for info in _read_infos(file)]
        _refuse_duplicates(infos)
        filters = (
            ("supercategory", supercategory, category_matches),
            ("category", category, category_matches),
            ("modality", modality, modality_matches),
        )
        kept = infos
        for field, wanted, matches in filters:
            names = _names(wanted)
            check_names(infos, field, names, matches)
            kept = [i for i in kept if not names or any(matches(getattr(i, field), name) for name in names)]
        if not kept:
            raise Mistake(f"no row of {_listed(file.path for file in files)} passes all filters")
        return cls(files, kept, memory)

    def __len__(self) -> int:
        return len(self._infos)

    def __getitem__(self, index: int) -> Sample:
        """The sample of a row.

        Raises ValueError if the row is invalid: image, mask, box or points are missing, the box or a point lies outside
        the image, or the image's header cannot be read.
        """
        return _sound_sample(self.row(index), self.info(index))

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def unmasked(self) -> Iterator[Sample]:
        """All samples in order, without masks, in one pass over the files with a few rows in memory. The order must be
        that of the files. Raises ValueError as `__getitem__` does, but for masks."""
        for path, infos in groupby(self._infos, key=lambda info: info.file):
            by_number = {info.row: info for info in infos}
            numbers = list(by_number)
            assert numbers == sorted(numbers), "the rows are in another order than their file"
            file = self._files[path]
            for number, row in _read(scan(file, unmasked_leaves(file.schema), rows=numbers), path):
                yield _sound_sample(row, by_number[number], masked=False)

    def samples(self, rows: Sequence[int]) -> list[Sample]:
        """The samples of the given rows, in the given order."""
        # Reading in file order reads each row group only once.
        order = sorted(set(rows), key=lambda i: (str(self.info(i).file), self.info(i).row))
        read = {i: self[i] for i in order}
        return [read[i] for i in rows]

    def only(self, rows: Sequence[int]) -> "Dataset":
        """The dataset of these rows, in their order."""
        return Dataset(list(self._files.values()), [self._infos[i] for i in rows], self._memory)

    def info(self, index: int) -> RowInfo:
        return self._infos[index]

    @property
    def infos(self) -> Sequence[RowInfo]:
        return self._infos

    def reasonings(self) -> Iterator[tuple[RowInfo, str | None]]:
        """Each row's metadata and reasoning, without reading images."""
        infos = {(info.file, info.row): info for info in self._infos}
        for file in self._files.values():
            for number, row in _light_rows(file, {"extra_info.id", "extra_info.reasoning"}):
                if info := infos.get((file.path, number)):
                    yield info, row["extra_info"].get("reasoning")

    def rows_by_image(self) -> list[list[int]]:
        """Row numbers by image path, one list per image of a file. A row without an image path has its own list."""
        groups: dict[tuple[Path, str | int], list[int]] = {}
        for index, info in enumerate(self._infos):
            groups.setdefault((info.file, info.image or index), []).append(index)
        return list(groups.values())

    def row(self, index: int) -> Row:
        """The row's columns that a sample is built from, not validated. Raises ValueError if the file is damaged."""
        info = self.info(index)
        return self._groups.row(self._files[info.file], info.row)

    @property
    def schema(self) -> pa.Schema:
        """The schema in which rows of all files can be written. Raises ValueError if their column types conflict."""
        return common_schema(list(self._files.values()))

    def copied(self, rows: Sequence[int]) -> Iterator[pa.RecordBatch]:
        """Yield the given rows, in ascending order, with all columns in the dataset's schema."""
        schema = self.schema
        for path, infos in groupby(map(self.info, rows), key=lambda info: info.file):
            yield from copied(self._files[path], [info.row for info in infos], schema)


def check_names(
    infos: Sequence[RowInfo], field: str, wanted: Sequence[str], matches: Callable[[str, str], bool]
) -> None:
    """Raise ValueError, suggesting the closest known name, if no row has a wanted name."""
    known = sorted({getattr(info, field) for info in infos})
    for name in wanted:
        if not any(matches(other, name) for other in known):
            near = get_close_matches(name.casefold(), [other.casefold() for other in known], n=1)
            hint = next((f"did you mean {n!r}? " for n in known if n.casefold() in near), "")
            raise Mistake(f"no row has the {field} {name!r}; {hint}there is: {_listed(known)}")


def open_files(paths: Path | str | Sequence[Path | str]) -> list[RowFile]:
    """Open the files, without repetitions.

    Raises ValueError if no file is given, if one is missing, not parquet or lacks required columns, or if all files are
    empty.
    """
    files = [RowFile.open(path) for path in _distinct(paths)]
    for file in files:
        check_columns(file.schema, file.path)
    if not any(file.rows for file in files):
        raise Mistake(f"{_listed(file.path for file in files)} has no rows; give a file with some")
    return files


def _distinct(paths: Path | str | Sequence[Path | str]) -> list[Path]:
    """The paths without repetitions. Raises ValueError if there are none."""
    several = [paths] if isinstance(paths, (Path, str)) else paths
    if not several:
        raise Mistake("no dataset file was given; name at least one parquet file")
    # A file given twice would otherwise be rejected for duplicate ids.
    return list(dict.fromkeys(Path(path) for path in several))


def _names(wanted: str | Sequence[str] | None) -> list[str]:
    return [wanted] if isinstance(wanted, str) else list(wanted or ())


def _listed(things: Any) -> str:
    texts = [str(thing) for thing in things]
    return ", ".join(texts[:20]) + (f" and {len(texts) - 20} more" if len(texts) > 20 else "")


def _refuse_duplicates(infos: Sequence[RowInfo]) -> None:
    first: dict[str, RowInfo] = {}
    for info in infos:
        other = first.setdefault(info.id, info)
        if other is not info:
            raise Mistake(
                f"the id {info.id!r} occurs twice: in row {other.row} of {other.file} and row {info.row} of "
                f"{info.file}; ids must be unique"
            )


def _read_infos(file: RowFile) -> Iterator[RowInfo]:
    for number, row in _light_rows(file, INFO_LEAVES):
        yield read_info(row, file.path, number, f"row {number} of {file.path}")


def _light_rows(file: RowFile, leaves: Collection[str]) -> Iterator[tuple[int, Row]]:
    return _read(scan(file, leaves, most=LIGHT_ROWS), file.path)


def _read(rows: Iterator[tuple[int, Row | Damage]], path: Path) -> Iterator[tuple[int, Row]]:
    for number, row in rows:
        if isinstance(row, Damage):
            raise Mistake(f"row {number} of {path} cannot be read: {row.reason}; write the file again")
        yield number, row


def _sound_sample(row: Row, info: RowInfo, *, masked: bool = True) -> Sample:
    where = f"row {info.row} ({info.id!r}) of {info.file}"
    sample = read_sample(row, info, where, masked=masked)
    faults = [box_fault(sample.box, sample.size), *(point_fault(point, sample.size) for point in sample.points)]
    for fault in filter(None, faults):
        raise Mistake(f"{where} has {fault}")
    return sample
