"""The actors' parts of a run's configuration. Imports neither Ray nor torch."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, PrivateAttr, model_validator

from actors.experts.protocol import Preprocess
from umrg.config import ActorConfig, Config, Location, MayChange, located
from umrg.group import SamplingParams
from umrg.mistake import Mistake


class Autoscale(Config):
    """Bounds between which a role has as many actors as it needs: a training run measures who waits for whom, a service
    counts requests under way."""

    min: PositiveInt
    """Fewest actors."""
    max: PositiveInt
    """Most actors; the cluster should have room for them."""


class PoolConfig(ActorConfig):
    """Actors that may come and go."""

    actors: MayChange[PositiveInt] = 1
    """Number of actors; with `autoscale`, at the start."""
    autoscale: MayChange[Autoscale | None] = None
    """Bounds between which a training run or a service changes the number of actors by itself; null for a constant
    number, which an evaluation always has."""

    @model_validator(mode="after")
    def _begins_within(self) -> Self:
        if (bounds := self.autoscale) and not bounds.min <= self.actors <= bounds.max:
            raise Mistake(
                f"a run does not begin with {self.actors} actors and stay between {bounds.min} and {bounds.max}; set "
                "actors to a number from autoscale.min to autoscale.max"
            )
        return self


class RolloutConfig(PoolConfig):
    """Rollout actors, each with a vLLM engine."""

    tensor_parallel: PositiveInt = 1
    """GPUs that one engine spans; `num_gpus` must be the same number."""
    n: PositiveInt = 8
    """Completions sampled per prompt in training."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature in training."""
    max_tokens: PositiveInt = 512
    """Longest completion, in tokens."""
    max_prompt_tokens: PositiveInt = 2048
    """Longest prompt in tokens, those of the image included; a longer one ends the run by name."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the engine's weights."""
    gpu_memory: float = Field(default=0.6, gt=0, le=1)
    """Share of its GPU's memory that an engine may fill (vLLM's gpu_memory_utilization)."""
    cpu_cache_gib: PositiveInt = 1
    """Size of a CPU engine's KV cache, in GiB."""
    kv_cache: Literal["auto", "fp8"] = "auto"
    """Precision of an engine's keys and values: that of its weights, or 8 bits, which holds twice the tokens of
    bfloat16 and needs a GPU."""
    max_num_seqs: MayChange[PositiveInt | None] = None
    """Completions that an engine samples at the same time; null for all that it is given at once, at most 1024, or 128
    in a service."""
    max_num_batched_tokens: MayChange[PositiveInt | None] = None
    """Tokens of one forward pass of an engine; null for 16384 on a GPU and for 4096 on a CPU, or the longest prompt
    with its completion if that is more."""
    cuda_graphs: MayChange[bool] = True
    """Whether a GPU's engine replays CUDA graphs, which start more slowly and sample faster."""
    _sleeps: bool = PrivateAttr(default=False)

    @model_validator(mode="after")
    def _a_gpu_each(self) -> Self:
        if self.tensor_parallel > 1 and self.num_gpus != self.tensor_parallel:
            raise Mistake(
                f"an engine over {self.tensor_parallel} GPUs needs as many; set num_gpus to {self.tensor_parallel}, "
                "or tensor_parallel to 1"
            )
        return self

    @model_validator(mode="after")
    def _a_gpu_for_8_bits(self) -> Self:
        if self.kv_cache == "fp8" and self.num_gpus == 0:
            raise Mistake("kv_cache=fp8 needs a GPU; set num_gpus, or kv_cache to auto")
        return self

    @model_validator(mode="after")
    def _a_prompt_in_one_pass(self) -> Self:
        if self.max_num_batched_tokens and self.num_gpus == 0 and self.max_num_batched_tokens < self.longest:
            raise Mistake(
                f"a CPU's engine takes a prompt in one pass; set max_num_batched_tokens to {self.longest} "
                "(max_prompt_tokens and max_tokens) at least"
            )
        return self

    @model_validator(mode="after")
    def _a_token_each_in_one_pass(self) -> Self:
        if self.max_num_seqs and self.max_num_seqs > self.pass_tokens:
            raise Mistake(
                f"{self.max_num_seqs} completions at a time need a token each, and a pass has {self.pass_tokens}; "
                "lower max_num_seqs, or raise max_num_batched_tokens"
            )
        return self

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with its longest completion."""
        return self.max_prompt_tokens + self.max_tokens

    @property
    def pass_tokens(self) -> int:
        """`max_num_batched_tokens`, or its default."""
        return self.max_num_batched_tokens or max(self.longest, 16384 if self.num_gpus > 0 else 4096)

    @property
    def captured(self) -> int | None:
        """Completions up to which CUDA graphs are captured; None for vLLM's own choice, which is twice `max_num_seqs`
        and never over 512, so that larger batches would run without."""
        if self.num_gpus == 0 or not self.cuda_graphs or self.max_num_seqs is None or self.max_num_seqs <= 512:
            return None
        return math.ceil(self.max_num_seqs / 16) * 16  # vLLM's step between large sizes

    def holding(self, *asked: tuple[int, int]) -> Self:
        """The same with `max_num_seqs`, for engines that are given n completions of so many groups among them at once.
        asked: (groups, n) of each occasion."""
        most = max(math.ceil(groups / self.actors) * n for groups, n in asked)
        if self.max_num_seqs:
            return self
        # At its start vLLM samples for as many at once, and the sampler holds several float32 copies of all logits.
        return self.model_copy(update={"max_num_seqs": min(most, 1024, self.pass_tokens)})

    def sleeping(self) -> Self:
        """The same for engines that give their GPU's memory away for a while (`Engine.sleep`)."""
        found = self.model_copy()
        found._sleeps = True
        return found

    @property
    def sleeps(self) -> bool:
        """Whether an engine's memory is allocated so that it can be given away. No key: it follows from a run's
        `placement`."""
        return self._sleeps and self.num_gpus > 0

    def sampling(self, *, seed: int) -> SamplingParams:
        """How a run with this seed samples."""
        return SamplingParams(n=self.n, temperature=self.temperature, max_tokens=self.max_tokens, seed=seed)

    @property
    def own_environment(self) -> dict[str, str]:
        """Environment variables that a process must have before it imports vLLM."""
        return {
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
            "VLLM_CPU_KVCACHE_SPACE": str(self.cpu_cache_gib),
            # Left alone, vLLM pins its threads to core ids and keeps one core for itself.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            # On a CPU the one function that vLLM still compiles counts ranks, of which nothing is read; the first
            # request would wait ten seconds for the compiler, and on a busy machine forty.
            **({"TORCHDYNAMO_DISABLE": "1"} if self.num_gpus == 0 else {}),
        }


class EndpointConfig(Config):
    """A reasoner behind an OpenAI-compatible HTTP interface, such as vLLM's server."""

    url: str = Field(pattern=r"^https?://")
    """Base URL, up to and including `/v1`."""
    model: str
    """Name of the model at the endpoint."""
    key_variable: str | None = None
    """Environment variable with the API key, read by the process that starts the evaluation; null for no key."""
    min_pixels: PositiveInt = 56 * 56
    """Lower bound of its processor's resize, in pixels; needed if it answers in the model frame."""
    max_pixels: PositiveInt = 28 * 28 * 1280
    """Upper bound of its processor's resize, in pixels; needed if it answers in the model frame."""
    concurrency: PositiveInt = 16
    """Concurrency limit: requests in flight at the same time."""
    timeout: PositiveFloat = 300.0
    """Seconds that one request may last."""
    retries: int = Field(default=3, ge=0)
    """Retries of a failed request."""
    body: dict[str, Any] = Field(default_factory=dict)
    """Further fields of each request, such as `{top_k: 0}` if the endpoint's own defaults are not neutral."""

    def key(self) -> str | None:
        """The API key; None without `key_variable`. Raises ValueError if the variable is not set."""
        if self.key_variable is None:
            return None
        if not (key := os.environ.get(self.key_variable)):
            raise Mistake(f"the environment variable {self.key_variable} is not set; export it with the key")
        return key


class EmbeddingsConfig(Config):
    """Where a segmenter keeps the embeddings of images, so that each image is embedded once."""

    memory_mib: MayChange[PositiveInt] = 1024
    """Main memory of each actor for the embeddings that it used last, in MiB; one of SAM takes 4 MiB and one of SAM 2
    16 MiB, with a folder half of that."""
    folder: Path | None = None
    """Folder on each node's own disk, where embeddings outlive a run and all actors of the node share them; null for
    memory alone. Embeddings are then rounded to float16, whether they come from the disk or from the expert."""
    disk_gib: MayChange[PositiveInt] = 64
    """Most bytes of that folder, in GiB, all experts that share it included; what was unused for longest gives way."""
    ahead: bool | None = None
    """Whether a segmenter with nothing to do embeds images of groups that are yet to be scored; null for those with a
    GPU, as on a CPU it would take cores from the engines that are waited for. A service heeds no such thing: it embeds
    an image while its answer is written."""

    def located(self) -> Self:
        """The same for an actor, which has another working directory. The folder need not be there."""
        return self if self.folder is None else self.model_copy(update={"folder": self.folder.absolute()})


class SegmenterConfig(PoolConfig):
    """Segmenter actors, each with a frozen expert."""

    checkpoint: Location | None = None
    """Weights of a published expert, a safetensors file as `medreasoner expert convert` writes it; in a run
    also its URI."""
    device: str | None = None
    """torch device of the expert; null for `cuda` if `num_gpus` is above 0, else `cpu`."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision of the expert's image encoder."""
    preprocess: Preprocess = "published"
    """`published`: as the published evaluation runs every expert. `native`: as the expert's own code does."""
    embeddings: EmbeddingsConfig = EmbeddingsConfig()
    """Where embeddings of images are kept."""

    def at(self, place: Callable[[Path], Path]) -> Self:
        """The same with its file where `place` says that it is."""
        return self.model_copy(update={"checkpoint": self.checkpoint and place(self.checkpoint)})

    def located(self) -> Self:
        """The same for an actor, which has another working directory."""
        return self.at(located).model_copy(update={"embeddings": self.embeddings.located()})

    @property
    def embeds_ahead(self) -> bool:
        """Whether images are embedded before their groups are scored."""
        return self.num_gpus > 0 if self.embeddings.ahead is None else self.embeddings.ahead

    @property
    def where(self) -> str:
        """The device that an actor's expert lives on."""
        return self.device or ("cuda" if self.num_gpus > 0 else "cpu")


class DeadlineConfig(Config):
    """Seconds after which a wait is given up."""

    resources: NonNegativeInt = 600
    """For the cluster to have room for what a run cannot begin without: the learner, a rollout and a segmenter."""
    start: PositiveInt = 900
    """For actors to start and to load their models; and for copies of what their nodes have not."""
    step: PositiveInt = 1800
    """For one phase of a step."""
