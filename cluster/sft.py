"""The supervised job: `medreasoner sft CONFIG [key=value …]`, the same as `python -m cluster.sft CONFIG …`."""

import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cluster.cli_frame import run_command
from cluster.config import SftConfig, load_config
from cluster.run_folder import RunFolder, replace_folder
from umrg.dataset import Cursor, Dataset, batches
from umrg.sample import Sample


def sft(config: SftConfig) -> Path:
    """Fine-tune a reasoner; the run folder is returned, the model lies in its `model/`."""
    import torch

    from learner.reasoner import load_reasoner
    from learner.sft import SftOptimizer, SftStep, train_sft

    dataset = Dataset.open(
        config.data.train,
        supercategory=config.data.supercategory,
        category=config.data.category,
        modality=config.data.modality,
    )
    reasoner = load_reasoner(config.model).asked(style=config.prompt, think=config.think)
    run = RunFolder.create(config.runs / config.name, config)
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision(config.matmul_precision)
    started = time.monotonic()
    with _progress() as progress:
        task = progress.add_task("sft", total=config.steps, loss=float("nan"))

        def report(step: SftStep) -> None:
            run.log(asdict(step))
            progress.update(task, advance=1, loss=step.loss)
            if not progress.console.is_terminal and (step.step + 1) % 50 == 0:
                print(f"step {step.step + 1}/{config.steps}  loss {step.loss:.4f}", flush=True)

        optimizer = SftOptimizer(steps=config.steps, **config.learner.model_dump())
        train_sft(reasoner, _batches(dataset, config), optimizer, report)
    replace_folder(run.model, reasoner.save)
    run.write_json("summary.json", {"steps": config.steps, "seconds": {"sft": time.monotonic() - started}})
    return run.path


def _batches(dataset: Dataset, config: SftConfig) -> Iterator[list[Sample]]:
    for rows, _ in batches(dataset, config.batch, Cursor(seed=config.seed)):
        yield [dataset[row] for row in rows]


def _progress() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, refresh_per_second=2)


def main(arguments: list[str]) -> None:
    if not arguments:
        raise ValueError("usage: python -m cluster.sft CONFIG [key=value …]")
    path = sft(load_config(SftConfig, Path(arguments[0]), arguments[1:]))
    print(f"the model lies in {path / 'model'}")


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
