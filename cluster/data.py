"""The rows of a run: read from files, or phantoms drawn into the run folder."""

from collections.abc import Sequence
from pathlib import Path

from cluster.config import EvaluateConfig, PhantomConfig, RowFilter, TrainConfig
from cluster.run_folder import RunFolder
from phantoms import rows
from umrg.dataset import Dataset
from umrg.dataset_writer import write_rows
from umrg.sample import Sample


def open_rows(config: TrainConfig, run: RunFolder) -> tuple[Dataset, list[Sample]]:
    """The training rows, and the held-out ones that are evaluated on."""
    data = config.data
    train = opened(_files(data.train, run.path / "data" / "train.parquet"), data)
    held_out = Dataset.open(_files(data.eval, run.path / "data" / "eval.parquet"))
    count = min(len(held_out), config.evaluation.limit)
    return train, held_out.samples(range(count))


def open_held_out(config: EvaluateConfig, run: RunFolder) -> list[Sample]:
    """The rows of an evaluation, in the order of their files."""
    rows = opened(_files(config.data.eval, run.path / "data" / "eval.parquet"), config.data)
    return rows.samples(range(min(len(rows), config.limit or len(rows))))


def opened(files: Sequence[Path], kept: RowFilter) -> Dataset:
    """The rows of files that a filter keeps."""
    return Dataset.open(files, supercategory=kept.supercategory, category=kept.category, modality=kept.modality)


def _files(source: Sequence[Path] | PhantomConfig, drawn: Path) -> Sequence[Path]:
    if not isinstance(source, PhantomConfig):
        return source
    if not drawn.exists():
        phantoms = rows(
            source.phantoms,
            seed=source.seed,
            modalities=source.modalities,
            phrasings=source.phrasings,
            queries_per_image=source.queries_per_image,
        )
        write_rows(drawn, phantoms)
    return [drawn]
