"""Configuration: YAML plus `key=value`, checked before anything starts. Imports no torch."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, Field, NonNegativeInt, PositiveInt, ValidationError, field_validator

from actors.config import DeadlineConfig, RolloutConfig, SegmenterConfig
from learner.config import LearnerConfig, OptimizerConfig
from rewards.config import RewardConfig
from umrg.config import Config
from umrg.phantoms import MODALITIES
from umrg.prompts import PromptStyle

C = TypeVar("C", bound=Config)


class PhantomConfig(Config):
    """Rows to be drawn instead of read. queries_per_image: at most so many rows share an image. phrasings: "held_out"
    asks in words that training has not seen."""

    phantoms: PositiveInt
    seed: NonNegativeInt = 0
    modalities: list[str] = Field(default_factory=lambda: list(MODALITIES))
    queries_per_image: PositiveInt = 4
    phrasings: Literal["seen", "held_out"] = "seen"


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, (str, Path)) else value


Files = Annotated[list[Path], BeforeValidator(_as_list), Field(min_length=1)]


class DataConfig(Config):
    """train: parquet files in the released schema. The filters keep rows of these names only."""

    train: Files
    supercategory: list[str] = Field(default_factory=list)
    category: list[str] = Field(default_factory=list)
    modality: list[str] = Field(default_factory=list)


class RunDataConfig(DataConfig):
    """train, eval: parquet files, or phantoms to draw."""

    train: Files | PhantomConfig  # type: ignore[assignment]
    eval: Files | PhantomConfig


class EvaluationConfig(Config):
    """How held-out rows are asked. limit: so many rows at most. n: sampled answers each, besides the greedy one.
    every: steps between evaluations on the way; 0 for none, before and after remain. before: measure the model that
    the run starts from."""

    limit: PositiveInt = 128
    n: NonNegativeInt = 8
    every: NonNegativeInt = 0
    before: bool = True


class TrainConfig(Config):
    """GRPO: `medreasoner train CONFIG`.

    name: of the run; its folder is `runs/<name>`. model: a Qwen-VL folder. expert: name or folder of the segmenter.
    prompt, think: asked otherwise than the folder's prompt.json says. batch: groups a step. steps: how many.
    staleness: how many steps the rollouts' weights may lag behind. placement: whether actors are packed on few nodes
    or spread over many. checkpoint_every: steps; 0 for none but the last. keep: newest checkpoints that stay.
    resume: "auto" goes on from the newest checkpoint of a run folder that exists, "never" refuses such a folder.
    """

    name: str = Field(pattern=r"^[\w.-]+$")
    model: Path
    expert: str
    data: RunDataConfig
    prompt: PromptStyle | None = None
    think: bool | None = None
    reward: RewardConfig
    rollout: RolloutConfig = RolloutConfig()
    segmenter: SegmenterConfig = SegmenterConfig()
    learner: LearnerConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    deadlines: DeadlineConfig = DeadlineConfig()
    placement: Literal["pack", "spread"] = "pack"
    staleness: NonNegativeInt = 0
    batch: PositiveInt = 16
    steps: PositiveInt
    seed: NonNegativeInt = 0
    checkpoint_every: NonNegativeInt = 0
    keep: PositiveInt = 2
    resume: Literal["never", "auto"] = "never"
    runs: Path = Path("runs")

    @field_validator("staleness")
    @classmethod
    def _on_policy(cls, value: int) -> int:
        if value:
            raise ValueError("only 0 is built: every step's answers come from the newest weights")
        return value


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
