"""`medreasoner train`, `sft` and `evaluate`: the commands that start a run on the cluster."""

from pathlib import Path
from typing import Annotated

import typer

from cluster.commands.options import (
    Checkpoint,
    ConfigFile,
    DryRun,
    Overrides,
    Prompt,
    console,
    examples,
    files_and_keys,
    run_folders,
)

jobs_app = typer.Typer()


@jobs_app.command(
    epilog=examples(
        "medreasoner train configs/demo.yaml name=mine steps=20",
        "medreasoner train configs/lingshu_7b_soft.yaml data.train=train.parquet --dry-run",
        "medreasoner train configs/demo.yaml resume=auto",
    )
)
def train(config: ConfigFile, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Train a reasoner with GRPO; the run folder holds model, metrics and report."""
    if dry_run:
        from cluster.config import TrainConfig, load_config
        from cluster.dry_run import dry_run as show

        show(load_config(TrainConfig, config, overrides or ()), console())
        return
    from cluster.train import main as run_train

    run_train([str(config), *(overrides or ())])


@jobs_app.command(
    epilog=examples(
        "medreasoner sft configs/tiny_reasoner_sft.yaml model=models/tiny-reasoner data.train=rows.parquet "
        "validation=0.1",
        "medreasoner sft configs/tiny_reasoner_sft.yaml model=models/tiny-reasoner data.train=rows.parquet --dry-run",
    )
)
def sft(config: ConfigFile, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Fine-tune a reasoner on reference answers."""
    if dry_run:
        from cluster.config import SftConfig, load_config
        from cluster.dry_run import dry_run as show

        show(load_config(SftConfig, config, overrides or ()), console())
        return
    from cluster.sft import main as run_sft

    run_sft([str(config), *(overrides or ())])


@jobs_app.command(
    epilog=examples(
        "medreasoner evaluate --model runs/demo --data held_out.parquet --expert tiny --n 8",
        "medreasoner evaluate configs/evaluate_demo.yaml limit=64",
        "medreasoner evaluate configs/evaluate_demo.yaml --model models/tiny-reasoner name=warm_start --dry-run",
    )
)
def evaluate(
    config: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG] [key=value]...", help="YAML file, and values laid over it.", autocompletion=files_and_keys
        ),
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Folder of a reasoner, a run or a checkpoint.", autocompletion=run_folders)
    ] = None,
    prompt: Prompt = None,
    data: Annotated[list[Path] | None, typer.Option(help="Rows to answer; may be given several times.")] = None,
    expert: Annotated[str | None, typer.Option(help="Name, folder or converted file of the expert.")] = None,
    checkpoint: Checkpoint = None,
    name: Annotated[str | None, typer.Option(help="Name of the run, whose folder is runs/NAME.")] = None,
    n: Annotated[int | None, typer.Option("--n", help="Answers to sample per row, besides the greedy one.")] = None,
    limit: Annotated[int | None, typer.Option(help="Evaluate at most this many rows.")] = None,
    seen: Annotated[list[Path] | None, typer.Option(help="Rows that the reasoner was trained on.")] = None,
    dry_run: DryRun = False,
) -> None:
    """Evaluate a reasoner with an expert, and write metrics, tables and a page to runs/NAME.

    Lengths, precision and devices are those of rollout.* and segmenter.*, not of the model's training; by default it
    computes on a CPU. An interrupted evaluation continues when it is run again."""
    options = {
        "model": model,
        "data.eval": data,
        "expert": expert,
        "segmenter.checkpoint": checkpoint,
        "name": name,
        "n": n,
        "limit": limit,
        "prompt": prompt,
        "data.seen": seen,
    }
    if dry_run:
        from cluster.dry_run import dry_run as show
        from cluster.evaluate import configured

        show(configured(config or [], options), console())
        return
    from cluster.evaluate import main as run_evaluate

    run_evaluate(config or [], options)
