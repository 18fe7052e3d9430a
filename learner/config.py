"""The learner's part of a run's configuration. Imports no torch."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from rewards.scored import ScoredGroup
from umrg.config import ActorConfig, Config, MayChange, located
from umrg.mistake import Mistake
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
    resume: Path | None = None
    """A checkpoint of another folder that all ranks read; None where there is none."""

    def located(self) -> Self:
        """The same for an actor, which has another working directory."""
        return replace(
            self,
            model=located(self.model),
            run=self.run and located(self.run),
            resume=self.resume and located(self.resume),
        )


Part = Literal["vision_tower", "merger", "language_model"]


class OptimizerConfig(Config):
    """AdamW, and how the model is run through it."""

    lr: PositiveFloat
    """Peak learning rate."""
    warmup: NonNegativeInt = 0
    """Updates over which the learning rate rises linearly from 0."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """The learning rate after the warm-up, over all updates of the run."""
    final_lr: float = Field(default=0.1, ge=0, le=1)
    """Share of the peak learning rate that `linear` and `cosine` end at."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay of AdamW."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's first and second moments."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment. A parameter whose gradient is far below it hardly moves; with a smaller
    eps, Adam moves it as far as any other, in a direction that rounding decides."""
    vector_lr: PositiveFloat | None = None
    """Learning rate of vectors, that is norm gains and biases; null for `lr`. Adam moves each number by about its
    learning rate whatever its gradient, and a gain of 1 needs larger steps than the many small entries of a matrix, the
    more so the wider the matrix (Yang et al. 2022, arXiv:2203.03466)."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this global norm."""
    micro_batch_tokens: MayChange[PositiveInt] = 4096
    """Tokens of one packed sequence; the longest prompt with its longest answer must fit."""
    gradient_checkpointing: MayChange[bool | None] = None
    """Keep only each layer's input, and recompute the rest in the backward pass; null: where a rank has a GPU."""
    freeze: list[Part] = Field(default_factory=list)
    """Parts of the model that do not learn. The merger projects the vision tower's features to image tokens."""

    @model_validator(mode="after")
    def _something_learns(self) -> Self:
        if set(self.freeze) == {"vision_tower", "merger", "language_model"}:
            raise Mistake("every part of the model is frozen; take one out of freeze")
        return self


class ObjectiveConfig(Config):
    """The objective of a GRPO step; `learner.objective` has the formulas and their sources."""

    advantage: Literal["group", "mean", "leave_one_out"] = "group"
    """Advantage of an answer within its group: normalized by the standard deviation (GRPO), centred on the mean
    (Dr.GRPO), or on the mean of the others (RLOO)."""
    aggregation: Literal["token", "sequence", "constant"] = "token"
    """How per-token losses are averaged: over all tokens (DAPO), over answers of means over tokens (GRPO), or divided
    by the longest length (Dr.GRPO)."""
    ratio: Literal["token", "sequence"] = "token"
    """Importance ratio of each token, or of each whole answer (GSPO)."""
    clip: PositiveFloat = 0.2
    """The ratio is clipped to the range from 1 - clip to 1 + clip_high."""
    clip_high: PositiveFloat | None = None
    """Upper clip range (clip-higher of DAPO); null for `clip`."""
    dual_clip: float | None = Field(default=None, gt=1)
    """Bound on the loss of answers of negative advantage, as a multiple of the advantage; null for none."""
    kl: float = Field(default=0.0, ge=0)
    """Weight of the KL divergence from the reference model, that which the run started from; at 0 there is no reference
    model."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Per-token estimator of the divergence."""
    entropy: float = Field(default=0.0, ge=0)
    """Weight of the entropy bonus."""
    correction: Literal["none", "token", "sequence"] = "none"
    """Importance weights, per token or per answer, that correct for the difference between the engine's and the
    learner's log-probs."""
    correction_cap: PositiveFloat = 2.0
    """Upper bound of these importance weights."""
    unfinished: Literal["keep", "leave_out"] = "keep"
    """Whether answers that hit the length limit count in the loss (`leave_out`: overlong filtering of DAPO); the reward
    term `answer_length` penalizes length softly."""

    @property
    def everything_learns(self) -> bool:
        """Whether groups whose advantages are all 0 have a gradient too."""
        return self.kl > 0 or self.entropy > 0

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.clip >= 1:
            raise Mistake(f"clip is {self.clip:g}, and 1 - clip a ratio; give one below 1")
        if self.clip_high is not None and self.clip_high < self.clip:
            raise Mistake(f"clip_high {self.clip_high:g} is below clip {self.clip:g}; give at least that")
        return self


class LoraConfig(Config):
    """Low-rank adapters."""

    rank: PositiveInt = 16
    """Rank of each adapter."""
    alpha: PositiveInt = 32
    """Adapters are scaled by alpha / rank."""


REDUCE_BUCKET = 100_000_000
"""Gradients that DeepSpeed reduces at once, in elements. Its default, five times as many, costs a rank up to 4 GiB."""


class ZeroConfig(OptimizerConfig, ActorConfig):
    """The learner's ranks, each a Ray actor, and how DeepSpeed's ZeRO partitions the model over them."""

    ranks: MayChange[PositiveInt] = 1
    """Number of ranks (data-parallel size)."""
    nodes: MayChange[PositiveInt | None] = None
    """Nodes that the ranks are divided over, as many for each; null for the fewest that hold them. What several of them
    would get lies on one where that has room for it."""
    zero_stage: MayChange[Literal[0, 1, 2, 3]] = 2
    """What ZeRO partitions over the ranks: nothing, optimizer state (1), gradients too (2), parameters too (3)."""
    offload: MayChange[Literal["none", "optimizer", "parameters"]] = "none"
    """What ZeRO keeps in host memory: the optimizer state (from stage 1 on), or the parameters too (stage 3)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the model; float32 on CPU. With bfloat16, master weights, gradients and their reduction are float32,
    for which it needs stage 2 or 3."""
    lora: LoraConfig | None = None
    """Low-rank adapters of the language model learn, and everything else is frozen; null for full fine-tuning."""

    @property
    def own_environment(self) -> dict[str, str]:
        return {"DS_ACCELERATOR": self.device}

    @property
    def device(self) -> str:
        """torch's name of the device that a rank computes on."""
        return "cuda" if self.num_gpus > 0 else "cpu"

    @property
    def checkpoints_layers(self) -> bool:
        """Whether layers are computed again in the backward pass."""
        return self.num_gpus > 0 if self.gradient_checkpointing is None else self.gradient_checkpointing

    @property
    def entropy_learns(self) -> bool:
        """Whether the policy's entropy is part of the loss."""
        return False

    @model_validator(mode="after")
    def _adapters_learn(self) -> Self:
        if self.lora and "language_model" in self.freeze:
            raise Mistake("lora adapts the language model, and freeze holds it still; take it out of freeze")
        return self

    @model_validator(mode="after")
    def _sums_in_float32(self) -> Self:
        # Without ZeRO DeepSpeed has no float32 gradients for a bfloat16 model, and at stage 1 it takes an optimizer of
        # another kind. Stage 2 does the work of both, on one rank too.
        if self.dtype == "bfloat16" and self.zero_stage < 2:
            raise Mistake(f"dtype=bfloat16 needs zero_stage 2 or 3, this is {self.zero_stage}; one rank takes 2 too")
        return self

    @model_validator(mode="after")
    def _as_many_ranks_on_each_node(self) -> Self:
        if self.nodes and self.ranks % self.nodes:
            raise Mistake(f"{self.ranks} ranks cannot be spread over {self.nodes} nodes, as many on each; change nodes")
        return self

    @model_validator(mode="after")
    def _a_gpu_each(self) -> Self:
        # NCCL takes one rank for each GPU.
        if self.ranks > 1 and 0 < self.num_gpus <= 0.5:
            raise Mistake(
                f"{self.ranks} ranks of {self.num_gpus:g} GPUs may share one, which NCCL refuses; set num_gpus above "
                "0.5"
            )
        return self

    @model_validator(mode="after")
    def _offload_fits_stage(self) -> Self:
        least = {"none": 0, "optimizer": 1, "parameters": 3}[self.offload]
        if self.zero_stage < least:
            raise Mistake(f"offload={self.offload} needs zero_stage {least} or more; this is {self.zero_stage}")
        return self


class LearnerConfig(ZeroConfig):
    """The GRPO learner."""

    objective: ObjectiveConfig = ObjectiveConfig()
    mini_batch: PositiveInt | None = None
    """Groups per update; null for all groups of the step."""
    reference: MayChange[Literal["parked", "partitioned"] | None] = None
    """Where the reference model of the KL term is. `parked`: in host memory, and on the GPU during its passes alone.
    `partitioned`: over the ranks' GPUs. null: `partitioned` at zero_stage 3, else `parked`. With `lora` it is the
    policy without its adapters, and this key has no effect."""
    sha256: MayChange[bool] = False
    """Compare the weights that reach the engines by their sha256 too, which takes seconds for each GiB of every update.
    Without it sums of their words are compared, which miss numbers that change places within a tensor."""

    def work(self, group: ScoredGroup) -> int:
        """Tokens of a group that go through the model; 0 for one that has no gradient."""
        if group.zero_variance and not self.objective.everything_learns:
            return 0
        return len(group.samples.prompt_ids) + group.tokens

    @property
    def entropy_learns(self) -> bool:
        return self.objective.entropy > 0

    @property
    def reference_kind(self) -> Literal["parked", "partitioned"]:
        """`reference`, or its default for the ZeRO stage, whose model may be larger than a GPU."""
        return self.reference or ("partitioned" if self.zero_stage == 3 else "parked")
