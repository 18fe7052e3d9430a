"""Configuration: YAML plus `key=value`, checked before anything starts. Imports no torch."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from actors.config import DeadlineConfig, EndpointConfig, RolloutConfig, SegmenterConfig
from cluster.faults import in_words
from learner.config import LearnerConfig, ZeroConfig
from phantoms import MODALITIES
from rewards.config import RewardConfig
from umrg.atomic import written_aside
from umrg.config import Config, ModelFolder
from umrg.group import SamplingParams
from umrg.prompts import PromptSpec, ReasonerConfig

C = TypeVar("C", bound=Config)


def _is_every(value: Any) -> Any:
    if value != "auto" and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise ValueError(
            f"{value!r} is neither auto nor a number of steps; give one of them, 0 for the last step alone"
        )
    return value


def _is_resume(value: Any) -> Any:
    if not isinstance(value, (str, Path)) or not str(value):
        raise ValueError(f"{value!r} is neither auto nor never nor a checkpoint's folder; give one of them")
    return value


def _is_name(value: str) -> str:
    if not re.fullmatch(r"[\w.-]*\w[\w.-]*", value):
        raise ValueError(f"{value!r} is no name for a folder; give letters, digits, dots and dashes")
    return value


Name = Annotated[str, AfterValidator(_is_name)]

Every = Annotated[Literal["auto"] | int, BeforeValidator(_is_every)]
"""A number of steps, 0 for the last one alone, or "auto", by time."""

Resume = Annotated[Literal["never", "auto"] | Path, BeforeValidator(_is_resume)]


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


def _kind(value: Any) -> str:
    return "drawn" if isinstance(value, (dict, PhantomConfig)) else "files"


Rows = Annotated[Annotated[Files, Tag("files")] | Annotated[PhantomConfig, Tag("drawn")], Discriminator(_kind)]
"""Parquet files in the released schema, or phantoms to draw."""


class DataConfig(Config):
    """train: parquet files in the released schema. The filters keep rows of these names only."""

    train: Files
    supercategory: list[str] = Field(default_factory=list)
    category: list[str] = Field(default_factory=list)
    modality: list[str] = Field(default_factory=list)


class RunDataConfig(DataConfig):
    """train, eval: parquet files, or phantoms to draw."""

    train: Rows  # type: ignore[assignment]
    eval: Rows


class EvaluationConfig(Config):
    """How held-out rows are asked. limit: so many rows at most. n: sampled answers each, besides the greedy one.
    every: steps between evaluations on the way; 0 for none, before and after remain. before: measure the model that
    the run starts from."""

    limit: PositiveInt = 128
    n: NonNegativeInt = 8
    every: NonNegativeInt = 0
    before: bool = True


class RunConfig(ReasonerConfig):
    """What all runs share."""

    name: Name
    """Of the run."""
    runs: Path = Path("runs")
    """Folder of all runs, on storage that all nodes share; the run's own is `runs/<name>`."""
    placement: Literal["pack", "spread"] = "pack"
    """Whether actors are packed on few nodes or spread over many."""
    deadlines: DeadlineConfig = DeadlineConfig()


class TrainConfig(RunConfig):
    """GRPO: `medreasoner train CONFIG`.

    name: of the run; its folder is `runs/<name>`. expert: name or folder of the segmenter. batch: groups a step.
    steps: how many. dynamic_sampling_retries: how often in a step zero-variance groups give way to fresh ones.
    staleness: how many steps the rollouts' weights may lag behind. placement: whether actors are packed on few nodes
    or spread over many. checkpoint_every: steps between two checkpoints; 0 for none but the last; "auto" writes one
    every ten minutes, less often where that makes training wait. keep: newest checkpoints that stay, and beside them
    `keep_best` with the highest greedy Dice, of those at whose step the model was evaluated.
    resume: "auto" goes on from the newest checkpoint of a run folder that exists, "never" refuses such a folder; a
    checkpoint's folder goes on from that one, whether of this run, which then forgets what came after, or of another.
    """

    expert: str
    data: RunDataConfig
    reward: RewardConfig
    rollout: RolloutConfig = RolloutConfig()
    segmenter: SegmenterConfig = SegmenterConfig()
    learner: LearnerConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    staleness: NonNegativeInt = 0
    batch: PositiveInt = 16
    steps: PositiveInt
    dynamic_sampling_retries: NonNegativeInt = 0
    seed: NonNegativeInt = 0
    checkpoint_every: Every = "auto"
    keep: PositiveInt = 2
    keep_best: NonNegativeInt = 1
    resume: Resume = "never"

    @property
    def updates(self) -> int:
        """That the run makes: one a step and mini-batch."""
        return self.steps * math.ceil(self.batch / (self.learner.mini_batch or self.batch))

    @model_validator(mode="after")
    def _can_learn(self) -> Self:
        kind, n = self.learner.objective.advantage, self.rollout.n
        if n < 2:
            raise ValueError(
                f"learner.objective.advantage={kind} compares a group's answers; set rollout.n to 2 or more"
            )
        longest = self.rollout.max_prompt_tokens + self.rollout.max_tokens
        if self.learner.micro_batch_tokens < longest:
            raise ValueError(
                f"learner.micro_batch_tokens is {self.learner.micro_batch_tokens}, and a prompt with one answer may "
                f"have {longest} (rollout.max_prompt_tokens and max_tokens); raise it to that at least"
            )
        return self

    @field_validator("staleness")
    @classmethod
    def _on_policy(cls, value: int) -> int:
        if value:
            raise ValueError("only 0 is built: every step's answers come from the newest weights")
        return value


class EvaluationDataConfig(Config):
    """eval: parquet files, or phantoms to draw. The filters keep rows of these names only. seen: the files that the
    reasoner was trained on, so that figures tell rows whose words, category or modality it has seen from others."""

    eval: Rows
    supercategory: list[str] = Field(default_factory=list)
    category: list[str] = Field(default_factory=list)
    modality: list[str] = Field(default_factory=list)
    seen: Annotated[list[Path], BeforeValidator(_as_list)] = Field(default_factory=list)


class EvaluateConfig(RunConfig):
    """An evaluation: `medreasoner evaluate`.

    name: of the run; its folder is `runs/<name>`. endpoint: asked in the model's place; `frame` must then say what its
    coordinates are. expert: name or folder of the segmenter. n: answers sampled a row at `temperature`, besides the
    greedy one. answers: `lenient` also takes forms that a foreign model answers in (`umrg.foreign_answers`), and counts
    them apart. limit: so many rows at most. batch: rows between two writes of results. gallery: rows in the report.
    """

    model: ModelFolder | None = None  # type: ignore[assignment]
    endpoint: EndpointConfig | None = None
    expert: str
    data: EvaluationDataConfig
    n: NonNegativeInt = 0
    temperature: PositiveFloat = 1.0
    answers: Literal["strict", "lenient"] = "strict"
    limit: PositiveInt | None = None
    batch: PositiveInt = 32
    gallery: PositiveInt = 500
    rollout: RolloutConfig = RolloutConfig()
    segmenter: SegmenterConfig = SegmenterConfig()

    @model_validator(mode="after")
    def _one_reasoner(self) -> Self:
        if (self.model is None) == (self.endpoint is None):
            raise ValueError("give either model or endpoint")
        if self.endpoint and self.frame is None:
            raise ValueError("say what the endpoint's coordinates are: frame=model, original or relative")
        return self

    def sampling(self) -> SamplingParams:
        """How rows are answered, besides greedily."""
        return SamplingParams(n=self.n, temperature=self.temperature, max_tokens=self.rollout.max_tokens)

    def spec(self) -> PromptSpec:
        folder = PromptSpec() if self.model is None else PromptSpec.of_model(self.model)
        return folder.but(style=self.prompt, think=self.think, frame=self.frame)


class SftConfig(RunConfig):
    """Supervised fine-tuning: `medreasoner sft CONFIG`.

    name: of the run; its folder is `runs/<name>`. batch: images a step, each with all rows that ask about it. steps:
    how many. validation: share of the images that is held out. validate_every: steps between two looks at its loss;
    a checkpoint is written where it is the lowest yet, and the run's model is that one. patience: so many looks
    without a lower loss end the run; None for never. The others as in training.
    """

    data: DataConfig
    learner: ZeroConfig
    batch: PositiveInt = 16
    steps: PositiveInt
    validation: float = Field(default=0.0, ge=0, lt=1)
    validate_every: PositiveInt = 100
    patience: PositiveInt | None = None
    seed: NonNegativeInt = 0
    checkpoint_every: Every = "auto"
    keep: PositiveInt = 1
    resume: Resume = "never"

    @model_validator(mode="after")
    def _stops_by_something(self) -> Self:
        if self.patience and not self.validation:
            raise ValueError("patience waits for a lower validation loss; give validation, the share that is held out")
        return self


def load_config(
    schema: type[C], path: Path | None, overrides: Sequence[str] = (), options: Mapping[str, object] | None = None
) -> C:
    """Read a YAML file, lay options and `key.sub=value` overrides over it, and check the whole.

    path: None for no file. options: values by key, from a command line's options. Values of overrides are YAML. Raises
    ValueError with one sentence a fault; an unknown key names the nearest one.
    """
    tree = {} if path is None else _read(path)
    for key, value in (options or {}).items():
        _set(tree, key, value)
    for override in overrides:
        _apply(tree, override)
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        where = "" if path is None else f"{path}: "
        raise ValueError(where + "; ".join(in_words(schema, tree, error.errors()))) from None


def config_text(config: Config) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration as YAML."""
    with written_aside(path) as aside:
        aside.write_text(config_text(config), encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"there is no config file {path}")
    try:
        tree = yaml.safe_load(path.read_bytes()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must hold keys and values, not a {type(tree).__name__}")
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"{override!r} is not key=value; write for example learner.lr=1e-4")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{override!r}: the value is not YAML") from error
    _set(tree, key, value)


def _set(tree: dict[str, Any], key: str, value: object) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise ValueError(f"{key!r} cannot be set: {parent} holds a value, not keys")
    tree[last] = value
