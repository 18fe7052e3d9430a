"""The learner's part of a run's configuration. Imports no torch."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from umrg.config import Config


class OptimizerConfig(Config):
    """AdamW.

    lr: learning rate. warmup: steps in which it rises linearly from nothing. betas: decay rates of the two moments.
    eps: added to the root of the second moment. A number whose gradient is far below it hardly moves; without it, Adam
    moves such a number as far as any other, in a direction that rounding decides.
    micro_batch_tokens: tokens, padding included, that go through the model at once.
    """

    lr: PositiveFloat
    warmup: NonNegativeInt = 0
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    max_grad_norm: PositiveFloat = 1.0
    micro_batch_tokens: PositiveInt = 4096


class LearnerConfig(OptimizerConfig):
    """The GRPO learner: ZeRO ranks, one Ray actor each.

    vector_lr: learning rate of vectors, that is the norms' gains and all biases; None for `lr`. Adam moves each number
    by about its learning rate whatever its gradient, and a gain of 1 wants larger steps than one of a matrix's many
    small numbers; the wider the matrix, the more so (Yang et al. 2022, arXiv:2203.03466).
    ranks: how many. num_gpus, num_cpus: of each, as Ray counts them. threads: of torch on CPU; None for all cores,
    shared among the ranks.
    zero_stage: what is partitioned over the ranks: nothing, optimizer state (1), gradients (2), parameters (3).
    dtype: of the model's copy; float32 on CPU.
    clip: the ratio's range is 1 ± clip. kl: weight of the divergence from the model that the run started from; at 0
    no reference pass is made. mini_batch: groups an update; None for the whole step's.
    freeze_vision: the vision tower stands still.
    """

    vector_lr: PositiveFloat | None = None
    ranks: PositiveInt = 1
    num_gpus: float = Field(default=0.0, ge=0)
    num_cpus: float = Field(default=1.0, ge=0)
    threads: PositiveInt | None = None
    zero_stage: Literal[0, 1, 2, 3] = 2
    dtype: Literal["float32", "bfloat16"] = "float32"
    clip: PositiveFloat = 0.2
    kl: float = Field(default=0.0, ge=0)
    mini_batch: PositiveInt | None = None
    freeze_vision: bool = False
