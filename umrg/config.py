"""What every part of a run's configuration is: frozen, and without room for unknown keys. Imports no torch."""

from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict


class Config(BaseModel):
    """A part of a run's configuration. Each package keeps the part that it reads; `cluster.config` joins them."""

    model_config = ConfigDict(frozen=True, extra="forbid")


P = TypeVar("P", str, Path)


def located(path: P) -> P:
    """A file or folder by its full path, for processes with another working directory; what is none, such as an
    expert's name, as it is."""
    return type(path)(Path(path).resolve()) if Path(path).exists() else path


def model_folder(path: Path) -> Path:
    """The folder itself, or where it has no model but a `model/` that is one, that."""
    inner = path / "model"
    return inner if (inner / "config.json").exists() and not (path / "config.json").exists() else path


ModelFolder = Annotated[Path, AfterValidator(model_folder)]
"""A Hugging Face folder, or a run's or a checkpoint's folder, which stands for the `model/` in it."""
