"""`medreasoner data check`: all rows pass through all checks once; a second pass copies the rows without an error.

files ──scan──► row ──check_row──► CheckedRow ──extra checks──► Report, check.csv
   └──copied──► rows without an error ──► cleaned parquet
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
from umrg.checks import CHECKS, LOW_CEILING, Check, CheckedRow, DuplicateIndex, Finding, check_row
from umrg.dataset_writer import write_batches
from umrg.mistake import Mistake
from umrg.pictures import Picture, Tile, contact_sheet, overlay
from umrg.row_groups import RowFile, common_schema, copied, scan
from umrg.sample import Sample

COLUMNS = ("row", "file", "id", "check", "severity", "message")
"""Columns of check.csv."""

_EXAMPLES = 3
"""Findings kept as examples of each check."""

ExtraCheck = Callable[[CheckedRow], Iterable[Finding]]
"""A further check of a row, such as those of `cluster.commands.data_model_checks`, which need a model."""

DrawMask = Callable[[Sample], NDArray[np.bool_]]
"""Gives the expert's mask of a sample."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A finding, and the row it is about."""

    file: Path
    row: int
    finding: Finding
    sample: Sample | None = field(repr=False)
    """None where the row could not be read that far."""


@dataclass(kw_only=True)
class Report:
    """What the checks found."""

    rows: int = 0
    """Rows checked."""
    unusable: int = 0
    """Rows with an error."""
    flagged: int = 0
    """Rows with warnings only."""
    counts: Counter[Check] = field(default_factory=Counter)
    """Rows with a finding, by check."""
    worst: dict[Check, list[Example]] = field(default_factory=dict)
    """The few worst findings of each check."""

    def add(self, checked: CheckedRow) -> None:
        """Count a row and its findings."""
        self.rows += 1
        self.unusable += not checked.usable
        self.flagged += checked.usable and bool(checked.findings)
        by_check = {finding.check: finding for finding in sorted(checked.findings, key=lambda each: each.degree)}
        self.counts.update(by_check.keys())
        for check, finding in by_check.items():
            example = Example(file=checked.file, row=checked.row, finding=finding, sample=checked.sample)
            ranked = sorted([*self.worst.get(check, ()), example], key=lambda each: -each.finding.degree)
            self.worst[check] = ranked[:_EXAMPLES]


def check_files(
    files: Sequence[RowFile],
    *,
    extra_checks: Sequence[ExtraCheck] = (),
    table: Path | None = None,
    clean: Path | None = None,
    progress: Callable[[int], object] = lambda done: None,
) -> Report:
    """Check every row, with a few in memory at a time; a row that cannot be read is a finding.

    table: a CSV file to write, one line per finding (`COLUMNS`). clean: a parquet file to write, with all columns of
    the rows without an error, in the released schema. progress: called with the number of rows done. Raises ValueError
    where `clean` is one of the files.
    """
    if clean is not None and clean.resolve() in {file.path.resolve() for file in files}:
        raise Mistake(f"{clean} is one of the files to check; give the cleaned rows another name")
    schema = None if clean is None else common_schema(files)
    report = Report()
    usable: dict[Path, list[int]] = {file.path: [] for file in files}
    with _lines(table) as write:
        for checked in _checked(files, extra_checks):
            report.add(checked)
            write(checked)
            progress(report.rows)
            if checked.usable:
                usable[checked.file].append(checked.row)
        if clean is not None:
            batches = (batch for file in files for batch in copied(file, usable[file.path], schema))
            write_batches(clean, batches, schema=schema)
    return report


def _checked(files: Sequence[RowFile], extra_checks: Sequence[ExtraCheck]) -> Iterator[CheckedRow]:
    duplicates = DuplicateIndex()
    for file in files:
        for number, row in scan(file):
            checked = check_row(row, file.path, number, duplicates)
            for check in extra_checks:
                checked = replace(checked, findings=[*checked.findings, *check(checked)])
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


def worst_sheet(report: Report, draw: DrawMask | None = None, *, columns: int = 6, side: int = 280) -> Picture | None:
    """A contact sheet of the worst findings of each check, with the row's mask, box and points; None where no finding
    can be shown. draw: gives the expert's mask, which is shown with the findings about the expert."""
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


def _tile(example: Example, draw: DrawMask | None, side: int) -> Tile | None:
    sample = example.sample
    if sample is None:
        return None
    try:
        image = sample.image()
    except Mistake:
        return None
    try:
        mask = sample.mask_union()
    except Mistake:
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
