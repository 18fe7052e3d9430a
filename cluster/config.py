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
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from actors.config import DeadlineConfig, EndpointConfig, RolloutConfig, SegmenterConfig
from cluster.data_config import EvaluationDataConfig, SftDataConfig, TrainDataConfig
from cluster.faults import in_words
from cluster.tracking_config import TrackerName, TrackingConfig
from learner.config import LearnerConfig, ZeroConfig
from rewards.config import RewardConfig
from umrg.atomic import write_text
from umrg.config import Config, MayChange, ModelFolder
from umrg.group import SamplingParams
from umrg.mistake import Mistake
from umrg.prompts import PromptSpec, ReasonerConfig

C = TypeVar("C", bound=Config)

ANSWER_TOKENS = 256
"""Length that answers are assumed to have, where their limit is higher, in estimates of memory and time."""


def _is_every(value: Any) -> Any:
    if value != "auto" and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise Mistake(f"{value!r} is neither auto nor a number of steps; give one of them, 0 for the last step alone")
    return value


def _is_resume(value: Any) -> Any:
    if not isinstance(value, (str, Path)) or not str(value):
        raise Mistake(f"{value!r} is neither auto nor never nor a checkpoint's folder; give one of them")
    return value


def _is_name(value: str) -> str:
    if not re.fullmatch(r"[\w.-]*\w[\w.-]*", value):
        raise Mistake(f"{value!r} is no name for a folder; give letters, digits, dots and dashes")
    return value


Name = Annotated[str, AfterValidator(_is_name)]

Every = Annotated[
    Literal["auto"] | int, BeforeValidator(_is_every, json_schema_input_type=Literal["auto"] | NonNegativeInt)
]
"""A number of steps, 0 for the last one alone, or "auto", by time."""

Resume = Annotated[
    Literal["never", "auto"] | Path,
    BeforeValidator(_is_resume, json_schema_input_type=Literal["never", "auto"] | Path),
]


class EvaluationConfig(Config):
    """Evaluations of a training run on its held-out rows."""

    limit: PositiveInt = 128
    """Maximum number of rows to evaluate."""
    n: NonNegativeInt = 8
    """Answers sampled per row, besides the greedy one."""
    every: NonNegativeInt = 0
    """Evaluate every N steps; 0 for before and after training only."""
    before: bool = True
    """Evaluate the model that the run starts from."""


class RunConfig(ReasonerConfig):
    """What all runs share."""

    name: Name
    """Name of the run."""
    runs: MayChange[Path] = Path("runs")
    """Folder of all runs, which the driver's node and the learner's share; the run's own folder is `runs/<name>`."""
    cache: MayChange[Path | None] = None
    """Folder of each node for copies of what it has not: of the driver's files, and of URIs; null for `medreasoner` in
    the node's `$XDG_CACHE_HOME`, else in `~/.cache`."""
    spread: MayChange[bool] = False
    """Whether actors are spread over many nodes, rather than packed on few."""
    deadlines: MayChange[DeadlineConfig] = DeadlineConfig()

    @property
    def colocated(self) -> bool:
        """Whether each engine shares a GPU with a rank of the learner."""
        return False

    @model_validator(mode="before")
    @classmethod
    def _spread_has_a_key_of_its_own(cls, given: Any) -> Any:
        if isinstance(given, dict) and (older := given.get("placement")) in ("pack", "spread"):
            raise Mistake(f"in place of placement={older} write spread={str(older == 'spread').lower()}")
        return given


class LearningConfig(RunConfig):
    """What training and supervised fine-tuning share."""

    steps: MayChange[PositiveInt]
    """Steps of the run."""
    seed: NonNegativeInt = 0
    """Seed of everything that is drawn at random."""
    checkpoint_every: MayChange[Every] = "auto"
    """Write a checkpoint every N steps; 0 for the last step only; `auto` writes one every ten minutes, less often if
    that would make training wait."""
    keep: MayChange[PositiveInt] = 2
    """How many of the newest checkpoints are kept."""
    resume: MayChange[Resume] = "never"
    """`auto`: resume from the newest checkpoint of an existing run folder. `never`: refuse an existing run folder. A
    checkpoint's folder: resume from that one, either of this run, which then drops everything later, or of another."""
    trackers: MayChange[list[TrackerName]] = Field(default_factory=list)
    """Experiment trackers that get the metrics too: `wandb`, `swanlab`, `mlflow`."""
    tracking: MayChange[TrackingConfig] = TrackingConfig()


class TrainConfig(LearningConfig):
    """GRPO: `medreasoner train CONFIG`."""

    expert: str
    """Name of the expert, its folder, a converted file, or the URI of one of these."""
    data: TrainDataConfig
    reward: RewardConfig
    rollout: RolloutConfig = RolloutConfig()
    segmenter: SegmenterConfig = SegmenterConfig()
    learner: LearnerConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    placement: MayChange[Literal["disaggregated", "colocated"]] = "disaggregated"
    """`disaggregated`: engines and learner have GPUs of their own, or shares of one that both fill at the same time.
    `colocated`: each engine shares a GPU with a rank and sleeps while that learns, so that each has nearly all of its
    memory in turn."""
    transfer: MayChange[Literal["host", "nccl", "ipc"]] = "host"
    """How weights go from the learner to the engines: through host memory and Ray's object store; by NCCL from GPU to
    GPU; or, where a learner and an engine share GPUs, by CUDA's handles of the memory itself. A rollout that starts
    during the run gets its first ones through host memory."""
    staleness: MayChange[NonNegativeInt] = 0
    """Steps by which the weights that sample may be older than those that learn. 0: a step begins when the one before
    is learnt (on-policy). 1: the next step is sampled while one is learnt; more for steps of uneven length."""
    batch: PositiveInt = 16
    """Groups per step."""
    dynamic_sampling_retries: NonNegativeInt = 0
    """How often per step zero-variance groups are replaced by newly sampled ones (dynamic sampling of DAPO)."""
    keep_best: MayChange[NonNegativeInt] = 1
    """Number of checkpoints kept besides the newest: those with the highest greedy Dice, among the evaluated ones."""
    restarts: MayChange[NonNegativeInt] = 2
    """How often a learner that died is started again within the run, from the newest checkpoint."""
    tolerated_failures: MayChange[float] = Field(default=0.05, ge=0, lt=1)
    """Share of a step's groups that may be put aside because they kill or fail whatever samples or scores them; above
    it the run stops."""

    @property
    def updates(self) -> int:
        """Number of optimizer updates of the run: one per step and mini-batch."""
        return self.steps * math.ceil(self.batch / (self.learner.mini_batch or self.batch))

    @property
    def engines(self) -> RolloutConfig:
        """`rollout`, its engines as large as the work of a step and of an evaluation."""
        evaluation = self.evaluation
        engines = self.rollout.holding((self.batch, self.rollout.n), (evaluation.limit, max(1, evaluation.n)))
        return engines.sleeping() if self.colocated else engines

    @property
    def colocated(self) -> bool:
        return self.placement == "colocated"

    @property
    def image_tokens(self) -> int:
        """How many tokens of a packed sequence are of images at most, as the estimate of memory takes it."""
        group = self.rollout.max_prompt_tokens + self.rollout.n * min(self.rollout.max_tokens, ANSWER_TOKENS)
        images = math.ceil(self.learner.micro_batch_tokens / group)
        # A token is 28x28 pixels, or 32x32.
        most = self.max_pixels // 28**2 + 1 if self.max_pixels else self.rollout.max_prompt_tokens
        return min(images * min(most, self.rollout.max_prompt_tokens), self.learner.micro_batch_tokens)

    @model_validator(mode="after")
    def _can_learn(self) -> Self:
        kind, n = self.learner.objective.advantage, self.rollout.n
        if n < 2:
            raise Mistake(f"learner.objective.advantage={kind} compares a group's answers; set rollout.n to 2 or more")
        longest = self.rollout.max_prompt_tokens + self.rollout.max_tokens
        if self.learner.micro_batch_tokens < longest:
            raise Mistake(
                f"learner.micro_batch_tokens is {self.learner.micro_batch_tokens}, and a prompt with one answer may "
                f"have {longest} (rollout.max_prompt_tokens and max_tokens); raise it to that at least"
            )
        return self

    @model_validator(mode="after")
    def _corrects_for_lag(self) -> Self:
        if self.staleness and self.learner.objective.correction == "none":
            raise Mistake(
                f"with staleness={self.staleness} weights sample that are older than those that learn, and the loss "
                "must correct for that; set learner.objective.correction to token or sequence, or staleness to 0"
            )
        return self

    @model_validator(mode="after")
    def _colocated_in_pairs(self) -> Self:
        ranks, engines = self.learner.ranks, self.rollout.actors
        if self.colocated and ranks != engines:
            raise Mistake(
                f"placement=colocated gives each rank one engine, and there are {ranks} ranks (learner.ranks) and "
                f"{engines} engines (rollout.actors); set both to the same number"
            )
        if self.colocated and self.rollout.autoscale:
            raise Mistake("placement=colocated has as many engines as ranks; take rollout.autoscale out")
        return self

    @model_validator(mode="after")
    def _colocated_one_gpu_each(self) -> Self:
        if self.colocated and self.rollout.tensor_parallel > 1:
            raise Mistake(
                f"placement=colocated has one engine on each GPU; set rollout.tensor_parallel from "
                f"{self.rollout.tensor_parallel} to 1, or placement to disaggregated"
            )
        if self.colocated and self.learner.num_gpus > 1:
            raise Mistake(
                f"placement=colocated has one rank on each GPU, and learner.num_gpus is {self.learner.num_gpus:g}; "
                "set it to a share of one, such as 0.6"
            )
        if self.colocated and self.learner.nodes:
            raise Mistake("placement=colocated packs pairs of a rank and an engine; take learner.nodes out")
        return self

    @model_validator(mode="after")
    def _colocated_shares(self) -> Self:
        learner, rollout, segmenter = self.learner.num_gpus, self.rollout.num_gpus, self.segmenter.num_gpus
        if self.colocated and (learner > 0) is not (rollout > 0):
            raise Mistake(
                f"placement=colocated has rank and engine on one device, and learner.num_gpus is {learner:g} and "
                f"rollout.num_gpus {rollout:g}; give both a share of a GPU, or neither"
            )
        beside = math.ceil(self.segmenter.actors / self.learner.ranks) if 0 < segmenter < 1 and learner > 0 else 0
        if self.colocated and (sum_ := learner + rollout + beside * segmenter) > 1 + 1e-6:
            others = f", and {beside} of segmenter.num_gpus {segmenter:g}," if beside else ""
            raise Mistake(
                f"placement=colocated lays a rank and an engine on one GPU; learner.num_gpus {learner:g} and "
                f"rollout.num_gpus {rollout:g}{others} are {sum_:g} together; lower them to 1"
            )
        return self

    @model_validator(mode="after")
    def _colocated_on_policy(self) -> Self:
        if self.colocated and self.staleness:
            raise Mistake(
                "placement=colocated samples and learns in turn; set staleness to 0, or placement to disaggregated"
            )
        return self

    @model_validator(mode="after")
    def _transfers(self) -> Self:
        if self.transfer == "nccl" and self.colocated:
            raise Mistake(
                "placement=colocated has sender and receiver on one GPU, which NCCL refuses; set transfer to ipc"
            )
        if self.transfer == "nccl" and (self.rollout.num_gpus < 1 or self.learner.num_gpus < 1):
            raise Mistake(
                "transfer=nccl needs whole GPUs of engines and learner, because no GPU holds two members of a group; "
                "set rollout.num_gpus and learner.num_gpus to 1 or more, or transfer to host"
            )
        if self.transfer == "ipc" and not (self.colocated and self.rollout.num_gpus > 0):
            raise Mistake(
                "transfer=ipc needs a learner and engines that share GPUs; set placement to colocated with shares of "
                "one as num_gpus of both, or transfer to host"
            )
        return self


class EvaluateConfig(RunConfig):
    """An evaluation: `medreasoner evaluate`."""

    model: ModelFolder | None = None  # type: ignore[assignment]
    """Folder of a Qwen-VL model, or its URI; or the folder of a run or a checkpoint that holds one; null with
    `endpoint`."""
    endpoint: EndpointConfig | None = None
    """Sampled from in place of `model`; `frame` must then say what its coordinates are."""
    expert: str
    """Name of the expert, its folder, a converted file, or the URI of one of these."""
    data: EvaluationDataConfig
    n: NonNegativeInt = 0
    """Answers sampled per row, besides the greedy one."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature of the answers besides the greedy one."""
    answers: Literal["strict", "lenient"] = "strict"
    """`lenient` also accepts the forms in which foreign models answer (`umrg.foreign_answers`), and counts them
    apart."""
    limit: PositiveInt | None = None
    """Maximum number of rows to evaluate; null for all."""
    batch: PositiveInt = 32
    """Rows between two writes of results."""
    gallery: PositiveInt = 500
    """Maximum number of rows shown in the report."""
    rollout: RolloutConfig = RolloutConfig()
    segmenter: SegmenterConfig = SegmenterConfig()

    @model_validator(mode="after")
    def _one_reasoner(self) -> Self:
        if (self.model is None) == (self.endpoint is None):
            raise Mistake("give either model or endpoint")
        if self.endpoint and self.frame is None:
            raise Mistake("say what the endpoint's coordinates are: frame=model, original or relative")
        if self.endpoint and (self.min_pixels or self.max_pixels):
            raise Mistake(
                "an endpoint resizes images by its own settings; leave min_pixels and max_pixels out, and say in "
                "endpoint.min_pixels and endpoint.max_pixels what they are"
            )
        return self

    @model_validator(mode="after")
    def _as_many_as_it_began_with(self) -> Self:
        for role, actors in (("rollout", self.rollout), ("segmenter", self.segmenter)):
            if actors.autoscale:
                raise Mistake(
                    f"an evaluation has a constant number of actors; take {role}.autoscale out and set {role}.actors"
                )
        return self

    @property
    def engines(self) -> RolloutConfig:
        """`rollout`, its engines as large as the work of a batch: the greedy answers come first, then the others."""
        return self.rollout.holding((self.batch, max(1, self.n)))

    def sampling(self) -> SamplingParams:
        """Sampling parameters of the answers besides the greedy one."""
        return SamplingParams(n=self.n, temperature=self.temperature, max_tokens=self.rollout.max_tokens)

    def spec(self) -> PromptSpec:
        folder = PromptSpec() if self.model is None else PromptSpec.of_model(self.model)
        return self.asked(folder)


class SftConfig(LearningConfig):
    """Supervised fine-tuning: `medreasoner sft CONFIG`."""

    data: SftDataConfig
    learner: ZeroConfig
    batch: PositiveInt = 16
    """Images per step, each with all rows that ask about it."""
    validation: float = Field(default=0.0, ge=0, lt=1)
    """Share of the images that is held out for validation."""
    validate_every: PositiveInt = 100
    """Validate every N steps, and at the last. A checkpoint is written at each lowest loss, and the run's model is that
    of the lowest."""
    patience: MayChange[PositiveInt | None] = None
    """Early stopping: validations in a row without a lower loss that end the run; null for never."""
    keep: MayChange[PositiveInt] = 1
    """Number of newest checkpoints that are kept, besides the one of the lowest validation loss."""

    @property
    def image_tokens(self) -> int:
        """How many tokens of a packed sequence are of images, as the estimate of memory takes it: half of them."""
        return self.learner.micro_batch_tokens // 2

    @model_validator(mode="after")
    def _stops_by_something(self) -> Self:
        if self.patience and not self.validation:
            raise Mistake("patience waits for a lower validation loss; give validation, the share that is held out")
        return self


def load_config(
    schema: type[C], path: Path | None, overrides: Sequence[str] = (), options: Mapping[str, object] | None = None
) -> C:
    """Read a YAML file, lay options and `key.sub=value` overrides over it, and check the whole.

    path: None for no file. options: values by key, from a command line's options. Values of overrides are YAML. Raises
    ValueError with one sentence per fault; an unknown key names the nearest one.
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
        raise Mistake(where + "; ".join(in_words(schema, tree, error.errors()))) from None


def schema_of(path: Path) -> type[TrainConfig | SftConfig | EvaluateConfig]:
    """What a configuration file is for, by the keys that only one kind has."""
    keys = _read(path).keys()
    return TrainConfig if "reward" in keys else SftConfig if "learner" in keys else EvaluateConfig


def config_text(config: Config) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration as YAML."""
    write_text(path, config_text(config))


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise Mistake(f"there is no config file {path}")
    try:
        tree = yaml.safe_load(path.read_bytes()) or {}
    except yaml.YAMLError as error:
        raise Mistake(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise Mistake(f"{path} must hold keys and values, not a {type(tree).__name__}")
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise Mistake(f"{override!r} is not key=value; write for example learner.lr=1e-4")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise Mistake(f"{override!r}: the value is not YAML") from error
    _set(tree, key, value)


def _set(tree: dict[str, Any], key: str, value: object) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise Mistake(f"{key!r} cannot be set: {parent} holds a value, not keys")
    tree[last] = value
