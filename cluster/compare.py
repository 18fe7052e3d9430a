"""Two evaluations compared: `medreasoner compare RUN_A RUN_B`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from cluster.comparison import compare_records
from cluster.config import EvaluateConfig
from cluster.data import open_held_out
from cluster.figures import GREEDY, TITLES
from cluster.report import write_comparison_report
from cluster.results import Record, read_results
from cluster.run_folder import RunFolder


def compare(first: Path, second: Path, out: Path | None = None) -> Path:
    """Print paired differences of the greedy answers of two evaluations over the rows that both answered, and write a
    page of the rows that changed most, `report/compared-with-<first>.html` of the second by default. Raises ValueError
    where they share no row."""
    answers = greedy_answers(first), greedy_answers(second)
    shared = [row for row in answers[1] if row in answers[0]]
    if not shared:
        raise ValueError(f"{first} and {second} have no row in common; compare evaluations of the same data")
    before, after = ({row: [records[row]] for row in shared} for records in answers)
    differences = compare_records(before, after, GREEDY)
    console, names = Console(), (first.name, second.name)
    console.print(_table(names, differences, len(shared)))
    if note := _lenience(names, (before, after)):
        console.print(note)
    config = EvaluateConfig.model_validate(yaml.safe_load((second / "config.yaml").read_bytes()))
    rows = [sample for sample in open_held_out(config, RunFolder(second)) if sample.id in before]
    path = out or second / "report" / f"compared-with-{first.name}.html"
    return write_comparison_report(path, names, differences, rows, answers, note=note)


def greedy_answers(run: Path) -> dict[str, Record]:
    """The record of the greedy answer to each row of an evaluation."""
    return {
        row: next(record for record in records if record["kind"] == "greedy")
        for row, records in read_results(run / "results.jsonl").items()
    }


def _lenience(names: tuple[str, str], answers: Sequence[Mapping[str, Sequence[Record]]]) -> str:
    """What of the figures hangs on lenient reading; "" where nothing does."""
    counts = [sum(record.get("read") == "lenient" for (record,) in records.values()) for records in answers]
    parts = [f"{count} of {name}" for count, name in zip(counts, names, strict=True) if count]
    return f"Answers that were read leniently: {', '.join(parts)}." if parts else ""


def _table(names: tuple[str, str], differences: Mapping[str, Mapping[str, float]], count: int) -> Table:
    table = Table("figure", *names, "difference", "95 % interval", title=f"{count} rows, paired", title_justify="left")
    for figure, pair in differences.items():
        interval = f"{pair['low']:+.3f} … {pair['high']:+.3f}"
        table.add_row(TITLES[figure], f"{pair['before']:.3f}", f"{pair['after']:.3f}", f"{pair['gain']:+.3f}", interval)
    return table
