"""The rows of a run: read from files, or phantoms drawn into the run folder."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from actors.config import RolloutConfig
from cluster.config import EvaluateConfig, TrainConfig
from cluster.data_config import PhantomConfig, RowFilter
from cluster.lengths import Lengths, RowLimit, fitting
from cluster.run_folder import RunFolder
from phantoms import rows as phantom_rows
from reasoner.prompter import load_prompter
from umrg.dataset import Dataset
from umrg.dataset_writer import write_rows
from umrg.prompts import PromptSpec
from umrg.sample import Sample


def open_rows(
    config: TrainConfig, run: RunFolder, console: Console | None = None
) -> tuple[Dataset, list[Sample], dict[str, Lengths]]:
    """The training rows, the held-out ones that are evaluated on, and the lengths of both, as `train` and `held_out`.
    console: on which to show the progress. Raises ValueError if a prompt is too long, unless it is to be left out."""
    data, limit = config.data, prompt_limit(config.model, config.spec(), config.rollout)
    train = opened(_files(data.train, run.drawn_train), data)
    held_out = first_rows(Dataset.open(_files(data.eval, run.drawn_eval)), config.evaluation.limit)
    train, lengths = fitting(train, limit, data.overlong, console)
    held_out, of_held_out = fitting(held_out, limit, data.overlong, console)
    return train, list(held_out), {"train": lengths, "held_out": of_held_out}


def evaluated_rows(config: EvaluateConfig, run: RunFolder) -> Dataset:
    """The rows of an evaluation, in the order of their files, those too that are too long."""
    return first_rows(opened(_files(config.data.eval, run.drawn_eval), config.data), config.limit)


def open_held_out(config: EvaluateConfig, run: RunFolder) -> tuple[list[Sample], Lengths | None]:
    """The rows of an evaluation, and their lengths. Raises ValueError as `open_rows` does. What an endpoint takes is
    not known: its rows are all kept, and have no lengths."""
    rows = evaluated_rows(config, run)
    if config.model is None:
        return list(rows), None
    rows, lengths = fitting(rows, prompt_limit(config.model, config.spec(), config.rollout), config.data.overlong)
    return list(rows), lengths


def first_rows(rows: Dataset, limit: int | None) -> Dataset:
    """At most so many rows; None for all."""
    return rows if limit is None or limit >= len(rows) else rows.only(range(limit))


def prompt_limit(model: Path, spec: PromptSpec, config: RolloutConfig) -> RowLimit:
    """The longest prompt that a model folder's engine takes. Raises ValueError where it is no such folder."""
    return RowLimit(load_prompter(model, spec), config.max_prompt_tokens, "rollout.max_prompt_tokens")


def opened(files: Sequence[Path], kept: RowFilter) -> Dataset:
    """The rows of files that a filter keeps."""
    return Dataset.open(files, supercategory=kept.supercategory, category=kept.category, modality=kept.modality)


def _files(source: Sequence[Path] | PhantomConfig, drawn: Path) -> Sequence[Path]:
    if not isinstance(source, PhantomConfig):
        return source
    if not drawn.exists():
        phantoms = phantom_rows(
            source.phantoms,
            seed=source.seed,
            modalities=source.modalities,
            phrasings=source.phrasings,
            queries_per_image=source.queries_per_image,
        )
        write_rows(drawn, phantoms)
    return [drawn]
