"""The evaluation job: `medreasoner evaluate`, the same as `python -m cluster.evaluate CONFIG [key=value …]`.

rows ──Group──► rollouts or endpoint ──GroupSamples──► segmenters ──ScoredAnswer──► results.jsonl ──► tables, report
"""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from actors.experts.registry import licence_line
from cluster.cli import run_command
from cluster.config import EvaluateConfig, load_config
from cluster.data import open_held_out
from cluster.display import progress
from cluster.evaluation import evaluate, evaluation_groups
from cluster.fetching import fetched
from cluster.figures import TrainingCoverage, comma_separated, figures_of, greedy_record, markdown, settings
from cluster.hiring import ActorSpec
from cluster.records import Results, as_results
from cluster.report import write_evaluation_report
from cluster.run_folder import RunFolder
from cluster.workers import Workers, endpoints, ray_connection, rollouts, segmenters, started
from rewards.scoring import Scorer
from umrg.atomic import write_text
from umrg.mistake import Mistake
from umrg.sample import Sample


def run_evaluation(config: EvaluateConfig) -> RunFolder:
    """Evaluate, or continue an interrupted evaluation. Raises ValueError where one of that name is finished."""
    with RunFolder.begun(config.runs / config.name, config, resume=True) as run:
        refuse_finished(run)
        given, config = config, fetched(config)
        rows, lengths = open_held_out(config, run)
        if lengths:
            print(lengths, flush=True)
            run.tell(prompts=asdict(lengths))
        told = settings(given, config.spec())
        run.tell(settings=told)
        coverage = TrainingCoverage.of_files(config.data.seen)
        results = Results(run.path / "results.jsonl", n=config.n, hold=run.hold)
        if any(row.id not in results.rows for row in rows):
            print(licence_line(config.expert, config.segmenter.checkpoint), flush=True)
            with ray_connection(), started(actors(config), config) as workers, run.telling():
                run.tell(engines=[asdict(engine) for engine in workers.engines])
                answer(workers, rows, config, results)
        results.sort([row.id for row in rows])
        write_figures(run, rows, coverage, results, config, told, left_out=lengths.left_out if lengths else 0)
    return run


def refuse_finished(run: RunFolder) -> None:
    """Raise ValueError where an evaluation has all its figures."""
    if run.read_json("metrics.json"):
        raise Mistake(f"the evaluation {run.path} is finished; give another name=… or remove it")


def actors(config: EvaluateConfig) -> list[ActorSpec]:
    """The actors of an evaluation: segmenters, and rollouts or the clients of an endpoint."""
    spec = config.spec()
    scorer, lenient = Scorer.of_preset("mask"), config.answers == "lenient"
    if config.endpoint is not None:
        answering = endpoints(config.endpoint, config.rollout, spec)
    else:
        assert config.model is not None
        answering = rollouts(config.model, config.engines, spec)
    return [*answering, *segmenters(config.expert, config.segmenter, scorer, spec, lenient=lenient)]


def answer(workers: Workers, rows: Sequence[Sample], config: EvaluateConfig, results: Results) -> None:
    """Answer and score the rows that have no results yet, `batch` at a time."""
    left = [group for group in evaluation_groups(rows) if group.sample.id not in results.rows]
    done = len(rows) - len(left)
    with progress("evaluating", len(rows), done=done) as show:
        for start in range(0, len(left), config.batch):
            batch = left[start : start + config.batch]
            found = evaluate(workers, batch, config.sampling(), "ablations")
            results.add([*as_results(found.greedy, "greedy"), *as_results(found.sampled, "sampled")])
            show(done + start + len(batch))
    workers.check_expert()


def write_figures(
    run: RunFolder,
    rows: Sequence[Sample],
    coverage: TrainingCoverage,
    results: Results,
    config: EvaluateConfig,
    told: Mapping[str, Any],
    *,
    left_out: int = 0,
) -> None:
    """Write metrics.json, table.md, table.csv and the report, from the recorded answers alone. told: the settings, as
    `settings`. left_out: rows that were too long to be answered."""
    by_id = {row.id: row for row in rows}
    # Others were answered under another limit.
    answers = {row.id: results.rows[row.id] for row in rows}
    metrics = {
        "settings": told,
        "left_out": left_out,
        **figures_of(answers, by_id, coverage, lenient=config.answers == "lenient"),
    }
    for name, text in (("table.md", markdown(metrics)), ("table.csv", comma_separated(metrics))):
        write_text(run.path / name, text)
    greedy = {row: greedy_record(records) for row, records in answers.items()}
    write_evaluation_report(
        run.report / "index.html", run.path.resolve().name, metrics, greedy, by_id, limit=config.gallery
    )
    # Written last, because its presence marks the evaluation as finished.
    run.write_json("metrics.json", metrics)


def main(arguments: list[str], options: Mapping[str, Any] | None = None) -> None:
    """Run an evaluation from the command line.

    arguments: a YAML file, which may be left out, then key=value. options: further values by key; None stands for a
    value that was not given.
    """
    run = run_evaluation(configured(arguments, options))
    print((run.path / "table.md").read_text())
    print(f"the evaluation lies in {run.path}; open {run.report / 'index.html'}")


def configured(arguments: list[str], options: Mapping[str, Any] | None = None) -> EvaluateConfig:
    """The configuration that a command line asks for; arguments as those of `main`."""
    file = Path(arguments[0]) if arguments and "=" not in arguments[0] else None
    given = {key: value for key, value in (options or {}).items() if value is not None}
    if "name" not in given and "model" in given and "data.eval" in given:
        given["name"] = _name(given["model"], given["data.eval"][0])
    return load_config(EvaluateConfig, file, arguments[1 if file else 0 :], given)


def _name(model: Path, data: Path) -> str:
    folder = model.resolve().parent if model.name == "model" else model.resolve()
    return re.sub(r"[^\w.-]+", "-", f"evaluate-{folder.name}-{data.stem}")


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
