"""The rows of a job, as its configuration names them: files or phantoms, and which of them are kept."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, NonNegativeInt, PositiveInt, Tag

from phantoms import MODALITIES
from umrg.config import Config, Location


class PhantomConfig(Config):
    """Rows that are drawn instead of read."""

    phantoms: PositiveInt
    """Number of rows."""
    seed: NonNegativeInt = 0
    """Seed of the drawing."""
    modalities: list[str] = Field(default_factory=lambda: list(MODALITIES))
    """Modalities that are drawn."""
    queries_per_image: PositiveInt = 4
    """Maximum number of rows that share an image."""
    phrasings: Literal["seen", "held_out"] = "seen"
    """`held_out`: queries in words that the bundled model was not trained on."""


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, (str, Path)) else value


Files = Annotated[
    list[Location], BeforeValidator(_as_list, json_schema_input_type=str | list[str]), Field(min_length=1)
]


def _kind(value: Any) -> str:
    return "drawn" if isinstance(value, (dict, PhantomConfig)) else "files"


Rows = Annotated[Annotated[Files, Tag("files")] | Annotated[PhantomConfig, Tag("drawn")], Discriminator(_kind)]
"""Parquet files in the released schema, or phantoms to draw."""


class RowFilter(Config):
    """Which rows of the files are kept."""

    supercategory: list[str] = Field(default_factory=list)
    """Keep rows of these super-categories only; empty for all."""
    category: list[str] = Field(default_factory=list)
    """Keep rows of these categories only; empty for all."""
    modality: list[str] = Field(default_factory=list)
    """Keep rows of these modalities only; empty for all."""
    overlong: Literal["refuse", "leave_out"] = "refuse"
    """What becomes of rows whose prompt is too long, which is found out at the start: they end the run by name, or are
    left out and counted."""


class SftDataConfig(RowFilter):
    """The rows of a supervised run."""

    train: Files
    """Parquet files in the released schema, or their URIs."""


class TrainDataConfig(RowFilter):
    """The rows of a training run."""

    train: Rows
    """Parquet files in the released schema or their URIs, or phantoms to draw. The filters apply to these."""
    eval: Rows
    """Held-out rows that are evaluated on: parquet files or their URIs, or phantoms to draw."""


class EvaluationDataConfig(RowFilter):
    """The rows of an evaluation."""

    eval: Rows
    """Parquet files in the released schema, or phantoms to draw."""
    seen: Annotated[list[Location], BeforeValidator(_as_list, json_schema_input_type=str | list[str])] = Field(
        default_factory=list
    )
    """The files that the reasoner was trained on, so that figures tell rows of seen phrasings, categories and
    modalities from others."""
