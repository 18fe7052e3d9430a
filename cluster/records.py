"""Sample records, one per answer: the same fields in `samples/*.parquet` of a training run and `results.jsonl` of an
evaluation, and for every report that shows them."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rewards.scored import ScoredGroup
from umrg.atomic import named, whole_lines, written_aside
from umrg.mistake import Mistake


def records(groups: Iterable[ScoredGroup]) -> Iterator[dict[str, Any]]:
    """Records as plain values. Boxes and points are in original pixels, masks in COCO run-length encoding. The image is
    found in its dataset under `sample_id`."""
    for each in groups:
        sample = each.group.sample
        for i, (completion, scored) in enumerate(zip(each.samples.completions, each.answers, strict=True)):
            yield {
                "answer_id": each.group.answer_id(i),
                "step": each.group.step,
                "sample_id": sample.id,
                "query": sample.query,
                "supercategory": sample.supercategory,
                "category": sample.category,
                "modality": sample.modality,
                "completion": completion.text,
                "tokens": len(completion.token_ids) or None,
                "finished": completion.finished,
                "policy_version": completion.policy_version,
                "read": "lenient" if scored.answer.lenient else "strict",
                "reasoning": scored.answer.think,
                "box": list(scored.answer.box) if scored.answer.box else None,
                "points": [list(point) for point in scored.answer.points] if scored.answer.points else None,
                "mask": dict(scored.mask) if scored.mask else None,
                "expert_score": scored.expert_score,
                "reference_box": list(sample.box),
                "reference_points": [list(point) for point in sample.points],
                "reward": scored.reward.total,
                "parts": dict(scored.reward.parts),
                "failure": scored.failure,
                "metrics": dict(scored.metrics),
            }


def as_results(groups: Iterable[ScoredGroup], kind: str) -> list[dict[str, Any]]:
    """Records of one kind of answers, "greedy" or "sampled", as in an evaluation's results.jsonl."""
    return [{"kind": kind, **record} for record in records(groups)]


def write_records(path: Path, groups: Iterable[ScoredGroup]) -> None:
    """Write records as parquet."""
    with written_aside(path) as aside:
        pq.write_table(pa.Table.from_pylist(list(records(groups))), aside)


def read_records(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


Record = Mapping[str, Any]


def read_samples(path: Path) -> dict[str, list[Record]]:
    """The records of a run's samples file by row; none where there is no such file."""
    rows: dict[str, list[Record]] = {}
    for record in read_records(path) if path.exists() else []:
        rows.setdefault(record["sample_id"], []).append(record)
    return rows


class Results:
    """An evaluation's results.jsonl, appended to as rows are done, so that an interrupted evaluation resumes. A row is
    done when its greedy answer and all n sampled ones are there. hold: called before every write; raises if another
    driver has taken over the run's folder."""

    def __init__(self, path: Path, *, n: int, hold: Callable[[], None] = lambda: None) -> None:
        self._path, self._n, self._hold = path, n, hold
        self.rows = whole_rows(path, n=n)
        self._write(self.rows)

    def add(self, records: Iterable[Record]) -> None:
        """Append the records of whole rows. They are on disk when this returns."""
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
        """Sort the file by the given order of row ids."""
        self.rows = {row: self.rows[row] for row in order}
        self._write(self.rows)

    def _write(self, rows: Mapping[str, Sequence[Record]]) -> None:
        self._hold()
        with written_aside(self._path) as aside, aside.open("w") as file:
            for records in rows.values():
                file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def read_results(path: Path) -> dict[str, list[Record]]:
    """The records of a results.jsonl by row id. Raises ValueError if there is no such file."""
    if not path.is_file():
        raise Mistake(f"there is no {path}; give the folder of an evaluation")
    return _by_row(path)


def whole_rows(path: Path, *, n: int) -> dict[str, list[Record]]:
    """The records of the rows of a results.jsonl that have their greedy answer and all n sampled ones; none where there
    is no such file."""
    return {row: records for row, records in _by_row(path).items() if len(records) == 1 + n}


def _by_row(path: Path) -> dict[str, list[Record]]:
    rows: dict[str, list[Record]] = {}
    for record in whole_lines(path):
        rows.setdefault(record["sample_id"], []).append(record)
    return rows
