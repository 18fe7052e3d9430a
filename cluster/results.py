"""An evaluation's results.jsonl: a record an answer, added to as rows are done, so that an interrupted evaluation goes
on where it stopped."""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from umrg.atomic import named, whole_lines, written_aside

Record = Mapping[str, Any]


class Results:
    """The records in a file. A row is done when its greedy answer and all n sampled ones are there. hold: raises where
    the run's folder is another's by now; called before anything is added."""

    def __init__(self, path: Path, *, n: int, hold: Callable[[], None] = lambda: None) -> None:
        self._path, self._n, self._hold = path, n, hold
        self.rows: dict[str, list[Record]] = {}
        for record in whole_lines(path):
            self.rows.setdefault(record["sample_id"], []).append(record)
        self.rows = {row: records for row, records in self.rows.items() if len(records) == 1 + n}
        self._write(self.rows)

    def add(self, records: Iterable[Record]) -> None:
        """Keep the records of some rows, all their answers at once; they are on disk when this returns."""
        self._hold()
        lines = []
        for record in records:
            self.rows.setdefault(record["sample_id"], []).append(record)
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
        with named(self._path), self._path.open("a") as file:
            file.write("".join(lines))
            file.flush()
            os.fsync(file.fileno())

    def sort(self, order: Sequence[str]) -> None:
        """Bring the file into the order of the rows' ids, however it came about."""
        self.rows = {row: self.rows[row] for row in order}
        self._write(self.rows)

    def _write(self, rows: Mapping[str, Sequence[Record]]) -> None:
        self._hold()
        with written_aside(self._path) as aside, aside.open("w") as file:
            for records in rows.values():
                file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def read_results(path: Path) -> dict[str, list[Record]]:
    """The records of a results.jsonl by row. Raises ValueError where there is none."""
    if not path.is_file():
        raise ValueError(f"there is no {path}; give the folder of an evaluation")
    rows: dict[str, list[Record]] = {}
    for record in whole_lines(path):
        rows.setdefault(record["sample_id"], []).append(record)
    return rows
