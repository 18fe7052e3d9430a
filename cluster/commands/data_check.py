"""`medreasoner data check`: the rows of some files through all checks, in one pass; what is sound is copied in another.

files ──scan──► row ──check_row──► CheckedRow ──judges──► Report, check.csv
   └──copied──► where a row has no error ──► cleaned parquet
"""

import csv
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from umrg.atomic import written_aside
from umrg.checks import (
    CHECKS,
    LOW_CEILING,
    Check,
    CheckedRow,
    DuplicateIndex,
    Finding,
    check_row,
)
from umrg.dataset_writer import write_batches
from umrg.pictures import Picture, Tile, contact_sheet, overlay
from umrg.row_groups import RowFile, common_schema, copied, scan
from umrg.sample import Sample

COLUMNS = ("row", "file", "id", "check", "severity", "message")
_WORST = 3

Judge = Callable[[CheckedRow], Iterable[Finding]]
"""Further checks of a row, such as those of `cluster.commands.data_judges`, which need a model."""

Draw = Callable[[Sample], NDArray[np.bool_]]


@dataclass(frozen=True, kw_only=True)
class Example:
    """A finding and where it was made. sample: None where the row could not be read that far."""

    file: Path
    row: int
    finding: Finding
    sample: Sample | None = field(repr=False)


@dataclass(kw_only=True)
class Report:
    """What was found. rows, unusable, flagged: numbers of rows, of those with an error, and of those with warnings
    only. counts: rows with a finding, by check. worst: the worst few findings of each check."""

    rows: int = 0
    unusable: int = 0
    flagged: int = 0
    counts: Counter[Check] = field(default_factory=Counter)
    worst: dict[Check, list[Example]] = field(default_factory=dict)

    def add(self, checked: CheckedRow) -> None:
        self.rows += 1
        self.unusable += not checked.usable
        self.flagged += checked.usable and bool(checked.findings)
        by_check = {finding.check: finding for finding in sorted(checked.findings, key=lambda each: each.degree)}
        self.counts.update(by_check.keys())
        for check, finding in by_check.items():
            example = Example(file=checked.file, row=checked.row, finding=finding, sample=checked.sample)
            ranked = sorted([*self.worst.get(check, ()), example], key=lambda each: -each.finding.degree)
            self.worst[check] = ranked[:_WORST]


def check_files(
    files: Sequence[RowFile],
    *,
    judges: Sequence[Judge] = (),
    table: Path | None = None,
    clean: Path | None = None,
    progress: Callable[[int], object] = lambda done: None,
) -> Report:
    """Check every row, a few in memory at a time; a row that cannot be read is a finding.

    table: CSV file for a line a finding (`COLUMNS`). clean: parquet file for the rows without an error, in the released
    schema, with all their columns.
    `progress` is told the number of rows done. Raises ValueError where `clean` is one of the files.
    """
    if clean is not None and clean.resolve() in {file.path.resolve() for file in files}:
        raise ValueError(f"{clean} is one of the files to check; give the cleaned rows another name")
    schema = None if clean is None else common_schema(files)
    report = Report()
    usable: dict[Path, list[int]] = {file.path: [] for file in files}
    with _lines(table) as write:
        for checked in _checked(files, judges):
            report.add(checked)
            write(checked)
            progress(report.rows)
            if checked.usable:
                usable[checked.file].append(checked.row)
        if clean is not None:
            batches = (batch for file in files for batch in copied(file, usable[file.path], schema))
            write_batches(clean, batches, schema=schema)
    return report


def _checked(files: Sequence[RowFile], judges: Sequence[Judge]) -> Iterator[CheckedRow]:
    duplicates = DuplicateIndex()
    for file in files:
        for number, row in scan(file):
            checked = check_row(row, file.path, number, duplicates)
            for judge in judges:
                checked = replace(checked, findings=[*checked.findings, *judge(checked)])
            yield checked


@contextmanager
def _lines(path: Path | None) -> Iterator[Callable[[CheckedRow], None]]:
    if path is None:
        yield lambda checked: None
        return
    with written_aside(path) as aside, aside.open("w", newline="") as text:
        table = csv.writer(text)
        table.writerow(COLUMNS)

        def write(checked: CheckedRow) -> None:
            row_id = checked.info.id if checked.info else ""
            for finding in checked.findings:
                check = finding.check
                table.writerow([checked.row, checked.file, row_id, check.name, check.severity.value, finding.message])

        yield write


def worst_sheet(report: Report, draw: Draw | None = None, *, columns: int = 6, side: int = 280) -> Picture | None:
    """A contact sheet of the worst findings of each check, with the row's mask, box and points; None where no finding
    can be shown. draw: the expert's mask of a sample, shown where the expert fails."""
    tiles = [
        tile
        for check in CHECKS
        for example in report.worst.get(check, ())
        if (tile := _tile(example, draw if check is LOW_CEILING else None, side))
    ]
    if not tiles:
        return None
    heading = "The worst of each check · dashed: mask and box · disc and ring: key points"
    return contact_sheet(tiles, columns, side=side, heading=heading + (" · orange: the expert's mask" if draw else ""))


def _tile(example: Example, draw: Draw | None, side: int) -> Tile | None:
    sample = example.sample
    if sample is None:
        return None
    try:
        image = sample.image()
    except ValueError:
        return None
    try:
        mask = sample.mask_union()
    except ValueError:
        mask = None
    picture = overlay(
        image,
        mask=draw(sample) if draw else None,
        reference_mask=mask,
        reference_box=sample.box,
        reference_points=sample.points,
        long_side=side,
    )
    title = f"{example.finding.check.name} · row {example.row} · {sample.category}"
    return Tile(picture=picture, title=title, text=example.finding.message)
