"""The learner's part of a run's configuration. Imports no torch."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from umrg.config import Config, located
from umrg.prompts import PromptSpec


@dataclass(frozen=True, kw_only=True)
class LearnerTask:
    """What a rank is to learn, besides its configuration."""

    model: Path
    """Folder of the model that the run begins with."""
    spec: PromptSpec
    """How the model is asked."""
    updates: int
    """That the whole run makes, for the learning rate's schedule."""
    seed: int = 0
    temperature: float = 1.0
    """Of the sampling distribution whose log-probs are learnt from."""
    max_tokens: int = 1
    """Longest completion; the divisor of `aggregation: constant`."""
    run: Path | None = None
    """The run's folder, to which all ranks write their parts of checkpoints; None where none is written."""

    def located(self) -> Self:
        """The same for an actor, which has another working directory."""
        return replace(self, model=located(self.model), run=self.run and located(self.run))


Part = Literal["vision_tower", "merger", "language_model"]


class OptimizerConfig(Config):
    """AdamW, and how a model is taken through it.

    lr: learning rate. warmup: updates in which it rises linearly from nothing. schedule: how it then goes on, over all
    the run's updates, down to the share `final_lr` of itself. betas: decay rates of the two moments.
    eps: added to the root of the second moment. A number whose gradient is far below it hardly moves; without it, Adam
    moves such a number as far as any other, in a direction that rounding decides.
    vector_lr: learning rate of vectors, that is the norms' gains and all biases; None for `lr`. Adam moves each number
    by about its learning rate whatever its gradient, and a gain of 1 wants larger steps than one of a matrix's many
    small numbers; the wider the matrix, the more so (Yang et al. 2022, arXiv:2203.03466).
    micro_batch_tokens: tokens that go through the model at once; the longest prompt and answer must fit.
    gradient_checkpointing: keep each layer's input alone, and compute the rest again in the backward pass.
    freeze: parts of the model that stand still. The merger is what turns the vision tower's features into tokens.
    """

    lr: PositiveFloat
    warmup: NonNegativeInt = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    final_lr: float = Field(default=0.1, ge=0, le=1)
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    vector_lr: PositiveFloat | None = None
    max_grad_norm: PositiveFloat = 1.0
    micro_batch_tokens: PositiveInt = 4096
    gradient_checkpointing: bool = False
    freeze: list[Part] = Field(default_factory=list)

    @model_validator(mode="after")
    def _something_learns(self) -> Self:
        if set(self.freeze) == {"vision_tower", "merger", "language_model"}:
            raise ValueError("every part of the model is frozen; take one out of freeze")
        return self


class ObjectiveConfig(Config):
    """What a step of GRPO makes likely; `learner.objective` has the formulas and their sources.

    advantage: of an answer in its group. aggregation: what is averaged over. ratio: of tokens, or of whole answers.
    clip: the ratio's range is 1 - clip to 1 + clip_high, which is `clip` where it is not given. dual_clip: bound on the
    loss of bad answers, as a multiple of their advantage; above 1. kl: weight of the divergence from the model that the
    run started from; at 0 no reference pass is made. entropy: weight of the bonus.
    correction: of losses for the difference between the engine's and the learner's arithmetic, at most
    `correction_cap`. unfinished: answers that hit the length limit are kept or left out (overlong filtering of DAPO);
    the reward term `answer_length` punishes length softly.
    """

    advantage: Literal["group", "mean", "leave_one_out"] = "group"
    aggregation: Literal["token", "sequence", "constant"] = "token"
    ratio: Literal["token", "sequence"] = "token"
    clip: PositiveFloat = 0.2
    clip_high: PositiveFloat | None = None
    dual_clip: float | None = Field(default=None, gt=1)
    kl: float = Field(default=0.0, ge=0)
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    entropy: float = Field(default=0.0, ge=0)
    correction: Literal["none", "token", "sequence"] = "none"
    correction_cap: PositiveFloat = 2.0
    unfinished: Literal["keep", "leave_out"] = "keep"

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.clip >= 1:
            raise ValueError(f"clip is {self.clip:g}, and 1 - clip a ratio; give one below 1")
        if self.clip_high is not None and self.clip_high < self.clip:
            raise ValueError(f"clip_high {self.clip_high:g} is below clip {self.clip:g}; give at least that")
        return self


class LoraConfig(Config):
    """Low-rank adapters: rank, and alpha, by whose ratio to the rank they are scaled."""

    rank: PositiveInt = 16
    alpha: PositiveInt = 32


class ZeroConfig(OptimizerConfig):
    """The learner's ranks, one Ray actor each, and how DeepSpeed's ZeRO divides the model among them.

    ranks: how many. num_gpus, num_cpus: of each, as Ray counts them. threads: of torch on CPU; None for all cores,
    shared among the ranks. dtype: of the model's copy; float32 on CPU.
    zero_stage: what is partitioned over the ranks: nothing, optimizer state (1), gradients (2), parameters (3).
    offload: to the host's memory: optimizer state (from stage 1 on), or parameters too (stage 3).
    lora: adapters of the language model learn, and everything else stands still; null for full fine-tuning.
    """

    ranks: PositiveInt = 1
    num_gpus: float = Field(default=0.0, ge=0)
    num_cpus: float = Field(default=1.0, ge=0)
    threads: PositiveInt | None = None
    zero_stage: Literal[0, 1, 2, 3] = 2
    offload: Literal["none", "optimizer", "parameters"] = "none"
    dtype: Literal["float32", "bfloat16"] = "float32"
    lora: LoraConfig | None = None

    @property
    def entropy_learns(self) -> bool:
        """Whether the policy's entropy is part of the loss."""
        return False

    @model_validator(mode="after")
    def _adapters_learn(self) -> Self:
        if self.lora and "language_model" in self.freeze:
            raise ValueError("lora adapts the language model, and freeze holds it still; take it out of freeze")
        return self

    @model_validator(mode="after")
    def _offload_fits_stage(self) -> Self:
        least = {"none": 0, "optimizer": 1, "parameters": 3}[self.offload]
        if self.zero_stage < least:
            raise ValueError(f"offload={self.offload} needs zero_stage {least} or more; this is {self.zero_stage}")
        return self


class LearnerConfig(ZeroConfig):
    """The GRPO learner. objective: what a step makes likely. mini_batch: groups an update; None for the step's."""

    objective: ObjectiveConfig = ObjectiveConfig()
    mini_batch: PositiveInt | None = None

    @property
    def entropy_learns(self) -> bool:
        return self.objective.entropy > 0
