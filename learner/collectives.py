"""The one door for collectives: what the ranks settle among themselves, over torch's process group.

A process group has a backend for each type of device: NCCL moves tensors between GPUs and refuses those in host memory,
which gloo moves. So `Ranks` makes its tensors on its rank's device, and no other module of the project calls
`torch.distributed` (a test keeps it so).

Under ZeRO every forward and backward pass is itself a collective: a rank that made fewer of them would leave the others
waiting for it. So all ranks run the same number of packed sequences, and a rank that has fewer runs idle ones, whose
loss has the weight 0.
"""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import deepspeed
import torch
from torch import distributed

T = TypeVar("T")


def backend(device: str) -> str:
    """torch's names of the backends by device type. gloo comes along beside NCCL for what DeepSpeed keeps on the CPU,
    such as offloaded state."""
    return "cpu:gloo,cuda:nccl" if torch.device(device).type == "cuda" else "gloo"


def join(rank: int, count: int, *, host: str, port: int, device: str, seconds: float) -> None:
    """Join the process group of `count` ranks that meet at the first one's host and port. A collective that takes
    longer than `seconds` raises under gloo; under NCCL, whose calls return before they are done, it ends the process.
    DeepSpeed reduces gradients in a group of its own, whose deadline is torch's default of half an hour. A process that
    has joined one stays in it."""
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(count),
        LOCAL_RANK="0",  # Ray shows each actor its own GPUs only
        MASTER_ADDR=host,
        MASTER_PORT=str(port),
    )
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(0)
    # At its first start on a machine DeepSpeed would compile its own shared-memory reduction for that processor.
    # gloo's does the same work and needs no compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend(device), timeout=timedelta(seconds=seconds), verbose=False)


class Ranks:
    """All ranks, as one of them sees them. The process group must have been joined. Every method is a collective."""

    def __init__(self, device: str) -> None:
        """device: of this rank."""
        self.device = torch.device(device)
        self.rank, self.count = distributed.get_rank(), distributed.get_world_size()

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Each element summed over all ranks, on this rank's device."""
        return self._reduced(values, distributed.ReduceOp.SUM)

    def summed(self, *counts: int) -> list[int]:
        """Each count summed over all ranks."""
        total: list[int] = self.total(torch.tensor(counts, device=self.device)).tolist()
        return total

    def highest(self, count: int) -> int:
        """The highest count of any rank."""
        return int(self._reduced(torch.tensor(count, device=self.device), distributed.ReduceOp.MAX))

    def with_idle(self, sequences: list[T], idle: Callable[[], T]) -> list[T]:
        """This rank's packed sequences, followed by idle ones until it has as many as any rank, and at least one. idle:
        makes one; called only where one is needed."""
        missing = self.highest(max(1, len(sequences))) - len(sequences)
        return sequences + [idle()] * missing if missing else sequences

    def _reduced(self, values: torch.Tensor, op: distributed.ReduceOp.RedOpType) -> torch.Tensor:
        # A copy, because the collective overwrites what it is given.
        reduced = values.detach().to(self.device, copy=True)
        distributed.all_reduce(reduced, op=op)
        return reduced
