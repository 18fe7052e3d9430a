"""The supervised job: `medreasoner sft CONFIG [key=value …]`, the same as `python -m cluster.sft CONFIG …`."""

import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cluster.cli_frame import run_command
from cluster.config import SftConfig, load_config
from cluster.run_folder import RunFolder
from umrg.atomic import written_aside
from umrg.dataset import Dataset
from umrg.sample import Sample
from umrg.shuffling import Cursor, batches


def sft(config: SftConfig) -> RunFolder:
    """Fine-tune a reasoner; the model lies in the run folder's `model/`."""
    import torch

    from learner.policy import freeze
    from learner.reasoner import load_reasoner
    from learner.sft import SftStep, train_sft

    dataset = Dataset.open(
        config.data.train,
        supercategory=config.data.supercategory,
        category=config.data.category,
        modality=config.data.modality,
    )
    reasoner = load_reasoner(config.model, config.spec())
    freeze(reasoner.model, config.learner.freeze)
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

        train_sft(reasoner, _batches(dataset, config), config.steps, config.learner, report)
    with written_aside(run.model) as aside:
        reasoner.save(aside)
    run.write_json("summary.json", {"steps": config.steps, "seconds": {"sft": time.monotonic() - started}})
    return run


def _batches(dataset: Dataset, config: SftConfig) -> Iterator[list[list[Sample]]]:
    """Images in shuffled order, each as the samples that ask about it."""
    images = dataset.rows_by_image()
    for chosen, _ in batches(images, config.batch, Cursor(seed=config.seed)):
        rows = [row for image in chosen for row in images[image]]
        # Paths only propose what belongs together; the bytes decide.
        together: dict[bytes, list[Sample]] = {}
        for sample in dataset.samples(rows):
            together.setdefault(sample.image_bytes, []).append(sample)
        yield list(together.values())


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
    run = sft(load_config(SftConfig, Path(arguments[0]), arguments[1:]))
    print(f"the model lies in {run.model}")


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
