"""The base of every part of a run's configuration: frozen, unknown keys refused, each field documented beneath its
default. Imports no torch."""

import re
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainSerializer, PositiveInt, field_validator

from umrg.mistake import Mistake


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
    node_labels: MayChange[dict[str, str]] = Field(default_factory=dict)
    """Labels of the nodes that actors may lie on, such as `{ray.io/accelerator-type: H100}`; a value may be a condition
    of Ray's, such as `in(H100, H200)` or `!T4`. Empty for any node."""
    environment: MayChange[dict[str, str]] = Field(default_factory=dict)
    """Environment variables of each actor's process, such as NCCL_SOCKET_IFNAME. What the driver's shell exports does
    not reach actors."""

    @field_validator("num_gpus")
    @classmethod
    def _whole_above_one(cls, value: float) -> float:
        if value > 1 and not value.is_integer():
            raise Mistake(f"{value:g} GPUs cannot be given; Ray divides one GPU, and gives whole ones above that")
        return value

    @field_validator("environment", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if own := sorted(name for name in map(str, value) if name.startswith("RAY_") or name == "CUDA_VISIBLE_DEVICES"):
            raise Mistake(f"{own[0]} is set by Ray; take it out of environment, and see num_gpus")
        for name, text in value.items():
            if not re.fullmatch(r"[A-Za-z_]\w*", str(name), re.ASCII):
                raise Mistake(f"{name!r} is no name of a variable; give letters, digits and underscores")
            if type(text) not in (str, int, float):
                raise Mistake(f"{name} is {text!r}; give text, in quotes where YAML would read something else")
        # YAML reads 1 as a number; a variable is text.
        return {name: str(text) for name, text in value.items()}

    @property
    def own_environment(self) -> dict[str, str]:
        """Variables that an actor of this role needs, whatever the user's are."""
        return {}

    @property
    def process_environment(self) -> dict[str, str]:
        """All variables of an actor's process, the user's over our own."""
        return {**self.own_environment, **self.environment}


P = TypeVar("P", str, Path)


def located(path: P) -> P:
    """The full path of an existing file or folder, for processes with another working directory. Anything else, such as
    an expert's name, is returned as it is."""
    return type(path)(Path(path).resolve()) if Path(path).exists() else path


def uri(path: str | Path) -> str | None:
    """The URI that a configuration gave in place of a path, such as `s3://bucket/model`; None for a path. (As a path it
    has lost one of its slashes.)"""
    found = re.fullmatch(r"([a-z][a-z0-9+]+):/{1,3}(.+)", str(path))
    return found and f"{found[1]}://{'/' if found[1] == 'file' else ''}{found[2]}"


def written(path: str | Path) -> str:
    """A path or URI as users write it."""
    return uri(path) or str(path)


Location = Annotated[Path, PlainSerializer(written, return_type=str, when_used="json")]
"""A file or folder, or the URI of one (`umrg.copies`)."""


def model_folder(path: Path) -> Path:
    """The folder itself or, if it holds no model and has a `model/` that does, that one."""
    inner = path / "model"
    return inner if (inner / "config.json").exists() and not (path / "config.json").exists() else path


ModelFolder = Annotated[Location, AfterValidator(model_folder)]
"""A Hugging Face folder, or the folder of a run or of a checkpoint, which stands for its `model/`."""
