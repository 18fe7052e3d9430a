"""The base of every part of a run's configuration: frozen, unknown keys refused, each field documented beneath its
default. Imports no torch."""

from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt


class Config(BaseModel):
    """A part of a run's configuration. Each package has the part that it reads; `cluster.config` joins them."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class _MayChange:
    """Marks a field that may change when a run resumes."""


MAY_CHANGE = _MayChange()

T = TypeVar("T")
MayChange = Annotated[T, MAY_CHANGE]
"""`steps: MayChange[PositiveInt]`: a run may resume with another value than it began with. Such keys say how a run is
computed, or for how long; all others say what is computed."""


class ActorConfig(Config):
    """The resources of each actor of a role."""

    num_gpus: MayChange[float] = Field(default=0.0, ge=0)
    """GPUs of each actor, as Ray counts them; fractions share one."""
    num_cpus: MayChange[float] = Field(default=1.0, ge=0)
    """CPUs of each actor, as Ray counts them."""
    threads: MayChange[PositiveInt | None] = None
    """CPU threads that each actor computes with; null for an equal share of the machine's cores."""


P = TypeVar("P", str, Path)


def located(path: P) -> P:
    """The full path of an existing file or folder, for processes with another working directory. Anything else, such as
    an expert's name, is returned as it is."""
    return type(path)(Path(path).resolve()) if Path(path).exists() else path


def model_folder(path: Path) -> Path:
    """The folder itself or, if it holds no model and has a `model/` that does, that one."""
    inner = path / "model"
    return inner if (inner / "config.json").exists() and not (path / "config.json").exists() else path


ModelFolder = Annotated[Path, AfterValidator(model_folder)]
"""A Hugging Face folder, or the folder of a run or of a checkpoint, which stands for its `model/`."""
