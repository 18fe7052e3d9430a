"""Configuration: YAML plus `key=value`, checked before anything starts. Imports no torch."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError

from umrg.prompts import PromptStyle

C = TypeVar("C", bound="Config")


class Config(BaseModel):
    """A part of a run's configuration: frozen, and without room for unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class DataConfig(Config):
    """train: parquet files in the released schema. The filters keep rows of these names only."""

    train: list[Path] = Field(min_length=1)
    supercategory: list[str] = []
    category: list[str] = []
    modality: list[str] = []


class OptimizerConfig(Config):
    """AdamW with a linear warm-up over `warmup` steps and a cosine decay to a tenth of `lr`.

    micro_batch_tokens: tokens, padding included, that go through the model at once.
    """

    lr: PositiveFloat
    warmup: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: PositiveFloat = 1.0
    micro_batch_tokens: PositiveInt = 4096


class SftConfig(Config):
    """Supervised fine-tuning: `medreasoner sft CONFIG`.

    name: of the run; its folder is `runs/<name>`. model: a Qwen-VL folder to start from. prompt, think: asked
    otherwise than the folder's prompt.json says. freeze_vision: the vision tower stands still. batch: images a
    step, each with all rows that ask about it. matmul_precision: of fp32 matrix products, as
    torch.set_float32_matmul_precision takes it.
    """

    name: str = Field(pattern=r"^[\w.-]+$")
    model: Path
    data: DataConfig
    prompt: PromptStyle | None = None
    think: bool | None = None
    learner: OptimizerConfig
    freeze_vision: bool = False
    batch: PositiveInt = 16
    steps: PositiveInt
    seed: int = 0
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    runs: Path = Path("runs")


def load_config(schema: type[C], path: Path, overrides: Sequence[str] = ()) -> C:
    """Read a YAML file, lay `key.sub=value` overrides over it, and check the whole.

    Values of overrides are YAML. Raises ValueError with one sentence a fault; an unknown key names the nearest one.
    """
    if not path.is_file():
        raise ValueError(f"there is no config file {path}")
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must hold keys and values, not a {type(tree).__name__}")
    for override in overrides:
        _apply(tree, override)
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        raise ValueError(f"{path}: " + "; ".join(_explain(schema, fault) for fault in error.errors())) from None


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration as YAML."""
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"{override!r} is not key=value; write for example learner.lr=1e-4")
    *parents, last = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise ValueError(f"{override!r}: {parent} holds a value, not keys")
    try:
        tree[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{override!r}: the value is not YAML") from error


def _explain(schema: type[BaseModel], fault: Any) -> str:
    location = [str(part) for part in fault["loc"]]
    if fault["type"] != "extra_forbidden":
        return f"{'.'.join(location)}: {fault['msg']}"
    known = _keys(schema, location[:-1])
    near = difflib.get_close_matches(location[-1], known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys here: {', '.join(sorted(known))}"
    return f"unknown key {'.'.join(location)!r}; {hint}"


def _keys(schema: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        annotation = schema.model_fields[part].annotation if part in schema.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        schema = annotation
    return list(schema.model_fields)
