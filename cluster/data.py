"""The rows of a run: read from files, or phantoms drawn into the run folder."""

from collections.abc import Sequence
from pathlib import Path

from actors.config import RolloutConfig
from cluster.config import EvaluateConfig, PhantomConfig, RowFilter, TrainConfig
from cluster.lengths import Lengths, fitting
from cluster.run_folder import RunFolder
from phantoms import rows as phantom_rows
from reasoner.prompter import Prompter, load_prompter
from umrg.dataset import Dataset
from umrg.dataset_writer import write_rows
from umrg.sample import Sample


def open_rows(config: TrainConfig, run: RunFolder) -> tuple[Dataset, list[Sample], Lengths]:
    """The training rows, the held-out ones that are evaluated on, and the lengths of the former. Raises ValueError if
    a prompt is too long, unless it is to be left out."""
    data, prompter = config.data, load_prompter(config.model, config.spec())
    train = opened(_files(data.train, run.path / "data" / "train.parquet"), data)
    held_out = first_rows(Dataset.open(_files(data.eval, run.path / "data" / "eval.parquet")), config.evaluation.limit)
    train, lengths = fit_prompts(train, prompter, config.rollout, data)
    held_out, _ = fit_prompts(held_out, prompter, config.rollout, data)
    return train, list(held_out), lengths


def evaluated_rows(config: EvaluateConfig, run: RunFolder) -> Dataset:
    """The rows of an evaluation, in the order of their files, those too that are too long."""
    return first_rows(opened(_files(config.data.eval, run.path / "data" / "eval.parquet"), config.data), config.limit)


def open_held_out(config: EvaluateConfig, run: RunFolder) -> list[Sample]:
    """The rows of an evaluation. Raises ValueError as `open_rows` does; what an endpoint takes is not known."""
    rows = evaluated_rows(config, run)
    if config.model is not None:
        rows, lengths = fit_prompts(rows, load_prompter(config.model, config.spec()), config.rollout, config.data)
        print(lengths, flush=True)
    return list(rows)


def first_rows(rows: Dataset, limit: int | None) -> Dataset:
    """At most so many rows; None for all."""
    return rows if limit is None or limit >= len(rows) else rows.only(range(limit))


def fit_prompts(rows: Dataset, prompter: Prompter, config: RolloutConfig, kept: RowFilter) -> tuple[Dataset, Lengths]:
    """The rows whose prompts an engine takes."""
    most = config.max_prompt_tokens
    return fitting(rows, prompter, most=most, overlong=kept.overlong, key="rollout.max_prompt_tokens")


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
