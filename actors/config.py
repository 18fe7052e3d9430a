"""The actors' parts of a run's configuration. Imports neither Ray nor torch."""

import os
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from actors.experts.protocol import Preprocess
from umrg.config import Config, located
from umrg.group import SamplingParams


class RolloutConfig(Config):
    """Rollout actors: a vLLM engine each.

    actors: how many. num_gpus, num_cpus: of each, as Ray counts them. tensor_parallel: GPUs that one engine spans;
    it then wants as many in num_gpus. threads: of a CPU engine; None for all cores, shared among the actors.
    n: answers to a prompt. temperature: of sampling. max_tokens: longest answer. max_prompt_tokens: longest prompt,
    image included.
    dtype: of the engine's weights. gpu_memory: share of its GPU that an engine may fill. cpu_cache_gib: of a CPU
    engine's key-value cache.
    reset_caches: forget prompts and images at a weight update. Only ever false to see the canary stop a run.
    """

    actors: PositiveInt = 1
    num_gpus: float = Field(default=0.0, ge=0)
    num_cpus: float = Field(default=1.0, ge=0)
    tensor_parallel: PositiveInt = 1
    threads: PositiveInt | None = None
    n: PositiveInt = 8
    temperature: PositiveFloat = 1.0
    max_tokens: PositiveInt = 512
    max_prompt_tokens: PositiveInt = 2048
    dtype: Literal["float32", "bfloat16"] = "float32"
    gpu_memory: float = Field(default=0.6, gt=0, le=1)
    cpu_cache_gib: PositiveInt = 1
    reset_caches: bool = True

    @model_validator(mode="after")
    def _a_gpu_each(self) -> Self:
        if self.tensor_parallel > 1 and self.num_gpus != self.tensor_parallel:
            raise ValueError(
                f"an engine over {self.tensor_parallel} GPUs needs as many; set num_gpus to {self.tensor_parallel}, "
                "or tensor_parallel to 1"
            )
        return self

    def sampling(self, *, seed: int) -> SamplingParams:
        """How a run with this seed samples."""
        return SamplingParams(n=self.n, temperature=self.temperature, max_tokens=self.max_tokens, seed=seed)

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables that a process must have before it imports vLLM."""
        return {
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
            "VLLM_CPU_KVCACHE_SPACE": str(self.cpu_cache_gib),
            # Left alone, vLLM pins its threads to core ids and keeps one core for itself.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }


class EndpointConfig(Config):
    """A reasoner behind an OpenAI-compatible HTTP interface, such as vLLM's own.

    url: up to and with `/v1`. model: as the endpoint names it. key_variable: environment variable of whoever starts the
    evaluation that holds the key. body: further fields of each request, such as `{top_k: 0}`, where the endpoint's own
    defaults are not neutral.
    min_pixels, max_pixels: bounds of its processor's resize, where it answers in pixels of the model's frame.
    concurrency: requests at the same time. timeout: seconds of one request. retries: of one that failed.
    """

    url: str = Field(pattern=r"^https?://")
    model: str
    key_variable: str | None = None
    min_pixels: PositiveInt = 56 * 56
    max_pixels: PositiveInt = 28 * 28 * 1280
    concurrency: PositiveInt = 16
    timeout: PositiveFloat = 300.0
    retries: int = Field(default=3, ge=0)
    body: dict[str, Any] = Field(default_factory=dict)

    def key(self) -> str | None:
        """The key; None where none is asked for. Raises ValueError where the variable is not set."""
        if self.key_variable is None:
            return None
        if not (key := os.environ.get(self.key_variable)):
            raise ValueError(f"the environment variable {self.key_variable} is not set; export it with the key")
        return key


class SegmenterConfig(Config):
    """Segmenter actors: a frozen expert each.

    actors, num_gpus, num_cpus: as for rollouts; num_gpus may be a fraction. threads: of torch on CPU.
    checkpoint: weights of a published expert. device: None for a GPU where num_gpus is above 0, else the CPU.
    dtype: of the expert's image encoder. preprocess: as published, or as the expert's own code does it.
    """

    actors: PositiveInt = 1
    num_gpus: float = Field(default=0.0, ge=0)
    num_cpus: float = Field(default=1.0, ge=0)
    threads: PositiveInt | None = None
    checkpoint: Path | None = None
    device: str | None = None
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    preprocess: Preprocess = "published"

    def located(self) -> Self:
        """The same for an actor, which has another working directory."""
        return self.model_copy(update={"checkpoint": self.checkpoint and located(self.checkpoint)})

    @property
    def where(self) -> str:
        """The device that an actor's expert lives on."""
        return self.device or ("cuda" if self.num_gpus > 0 else "cpu")


class DeadlineConfig(Config):
    """Seconds after which a wait is given up. start: of actors and their models. step: of one phase of a step.
    resources: for the cluster to have room for all actors."""

    resources: NonNegativeInt = 120
    start: PositiveInt = 900
    step: PositiveInt = 1800
