"""The rows that a run answered, as far as they can still be read. Imports neither torch nor Ray."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.data_config import PhantomConfig
from cluster.records import Record
from cluster.run_folder import RunFolder
from umrg.dataset import Dataset
from umrg.mistake import Mistake
from umrg.sample import Sample


@dataclass(frozen=True, kw_only=True)
class AnsweredRows:
    """The rows that records answer, as far as they can be read."""

    rows: Mapping[str, Sample]
    """By id."""
    remarks: Sequence[str]
    """Why others cannot be, in a sentence for who looks for them; empty where all can."""


def answered_rows(source: Sequence[Path] | PhantomConfig, run: RunFolder, answers: Iterable[Record]) -> AnsweredRows:
    """The rows that a run's records answer, where its files still are. Nothing is drawn, and nothing refused: a run's
    folder may have been moved to another machine. A row under the same id that asks or shows something else is none.

    source: of the run's configuration.
    """
    by_id = {record["sample_id"]: record for record in answers}
    try:
        data = Dataset.open([run.drawn_eval] if isinstance(source, PhantomConfig) else source)
        there = [i for i, info in enumerate(data.infos) if info.id in by_id]
        rows = {row.id: row for row in data.samples(there) if _answers(by_id[row.id], row)}
    except (Mistake, OSError) as error:
        return AnsweredRows(rows={}, remarks=[f"Without the images, which cannot be read here: {error}."])
    if len(rows) == len(by_id):
        return AnsweredRows(rows=rows, remarks=[])
    missing = f"{len(by_id) - len(rows)} of {len(by_id)} images, which are not in the files that lie here now"
    return AnsweredRows(rows=rows, remarks=[f"Without {missing}."])


def _answers(record: Record, row: Sample) -> bool:
    return bool(record["query"] == row.query and record["reference_box"] == list(row.box))
