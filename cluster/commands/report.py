"""`medreasoner report RUN`: the page of a run as its folder is now, finished or not, here or moved elsewhere."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from cluster.answered_rows import answered_rows
from cluster.comparison import compare_run
from cluster.config import EvaluateConfig
from cluster.config_keys import nested
from cluster.data_config import Rows
from cluster.figures import TrainingCoverage, figures_of, greedy_record, settings
from cluster.records import whole_rows
from cluster.report import write_evaluation_report, write_report, write_supervised_report
from cluster.report.evaluation import chosen
from cluster.report.training import evaluations, read_greedy
from cluster.run_folder import SUMMARY, RunFolder, kept_config, kept_values
from cluster.standing import Standing, clock, refuse_empty, standing
from umrg.mistake import Mistake


@dataclass(frozen=True, kw_only=True)
class Written:
    """A page that was written."""

    path: Path
    standing: Standing
    remarks: Sequence[str]
    """What it lacks, each a sentence."""


def report(path: Path, out: Path | None = None) -> Written:
    """Write the page of a run to `out`, by default to its `report/index.html`. The run's folder is only read besides:
    its driver may be at work. Raises ValueError where it is no run's folder, or has recorded nothing yet."""
    run = RunFolder(path)
    found = standing(run)
    refuse_empty(run, found)
    page = out or run.report / "index.html"
    text = str(found)
    above = [] if found.status == "ended" else [f"{text[0].upper()}{text[1:]}. This page is of {clock(time.time())}."]
    write = {"train": _training, "sft": _supervised, "evaluate": _evaluation}[found.kind]
    return Written(path=page, standing=found, remarks=write(run, page, above))


def _training(run: RunFolder, page: Path, above: Sequence[str]) -> Sequence[str]:
    shown = evaluations(run)
    answers = read_greedy(run, shown[-1]) if shown else {}
    # Only this part is checked: a reward term of one's own need not be importable here.
    source: Any = TypeAdapter(Rows).validate_python(nested(kept_values(run.path))["data"]["eval"])
    held_out = answered_rows(source, run, answers.values())
    gain = compare_run(run, shown[-1].name) if shown else {}
    summary = {**(run.read_json(SUMMARY) or {}), "gain": gain}
    rows = list(held_out.rows.values())
    write_report(run, summary, rows, path=page, remarks=[*above, *held_out.remarks])
    return held_out.remarks


def _supervised(run: RunFolder, page: Path, above: Sequence[str]) -> Sequence[str]:
    write_supervised_report(run, run.read_json(SUMMARY) or {}, path=page, remarks=above)
    return []


def _evaluation(run: RunFolder, page: Path, above: Sequence[str]) -> Sequence[str]:
    config = kept_config(EvaluateConfig, run.path)
    answers = whole_rows(run.path / "results.jsonl", n=config.n)
    if not answers:
        raise Mistake(f"{run.path} has no row yet that was answered as a whole; ask again later")
    greedy = {row: greedy_record(records) for row, records in answers.items()}
    metrics = run.read_json("metrics.json")
    shown = chosen(greedy, config.gallery) if metrics else list(greedy)
    found = answered_rows(config.data.eval, run, [greedy[row] for row in shown])
    remarks = list(found.remarks)
    if metrics is None:
        summary = run.read_json(SUMMARY) or {}
        coverage, unknown = _coverage(config.data.seen)
        remarks += unknown
        metrics = {
            "settings": summary.get("settings") or settings(config, config.spec()),
            "left_out": summary.get("prompts", {}).get("left_out", 0),
            # All or none: rows of which some lack a figure have no mean of it.
            **figures_of(answers, {} if found.remarks else found.rows, coverage, lenient=config.answers == "lenient"),
        }
    name = run.path.resolve().name
    write_evaluation_report(page, name, metrics, greedy, found.rows, limit=config.gallery, remarks=[*above, *remarks])
    return remarks


def _coverage(seen: Sequence[Path]) -> tuple[TrainingCoverage, list[str]]:
    """Of the rows that the reasoner was trained on, and a remark where they cannot be read."""
    try:
        return TrainingCoverage.of_files(seen), []
    except (Mistake, OSError) as error:
        return TrainingCoverage([]), [f"Seen and unseen rows are not told apart: {error}."]
