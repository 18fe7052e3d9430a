"""What an engine says of itself: once it has started, and of each weight update. Imports no vLLM, so that the driver
can read it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class EngineReport:
    """An engine's limits, as vLLM settled them."""

    dtype: str
    """Precision of the weights."""
    attention: str
    """vLLM's names of the attention kernels."""
    kv_cache: str
    """Precision of keys and values; `auto` for that of the weights."""
    kv_tokens: int
    """Tokens whose keys and values the cache holds."""
    concurrency: float
    """How many sequences of the longest prompt and completion that is."""
    max_num_seqs: int
    """Completions that are sampled at the same time at most."""
    max_num_batched_tokens: int
    """Tokens of one forward pass at most."""
    cuda_graphs: bool
    """Whether decoding replays CUDA graphs."""

    def __str__(self) -> str:
        graphs = ", CUDA graphs" if self.cuda_graphs else ""
        return (
            f"{self.dtype}, {self.attention}, KV cache of {self.kv_tokens:,} tokens ({self.concurrency:.1f} sequences "
            f"of the longest), {self.max_num_seqs} completions at a time, {self.max_num_batched_tokens:,} tokens a pass"
            f"{graphs}"
        )


@dataclass(frozen=True, kw_only=True)
class UpdateReceipt:
    """What an engine says of a weight update."""

    checksum: str
    """Of the tensors that arrived (`actors.weight_files.Checksum`)."""
    compared: int
    """Live parameters that were compared with them. Those that are packed for a CPU, or shared out over several GPUs,
    are not."""
    unlike: tuple[str, ...]
    """Names of the compared ones that hold other weights."""


@dataclass(frozen=True, kw_only=True)
class Receiver:
    """An engine that takes weights directly from the learner's process."""

    name: str
    """Of its actor."""
    handle: Any
    """Ray's, of a `Rollout`."""
    workers: int
    """Its processes that hold weights: `tensor_parallel`."""


@dataclass(frozen=True, kw_only=True)
class Sent:
    """Weights that were sent directly."""

    checksum: str
    """Of the tensors that were sent (`actors.weight_files.Checksum`)."""
    receipts: Mapping[str, UpdateReceipt]
    """What each engine says of them, by its actor's name."""
