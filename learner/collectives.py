"""What the ranks settle among themselves before an update.

Under ZeRO every forward and backward pass is itself a collective: a rank that made fewer of them would leave the others
waiting for it. So all ranks run the same number of packed sequences, and a rank that has fewer runs idle ones, whose
loss has the weight 0.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import distributed

T = TypeVar("T")


def summed(*counts: int) -> list[int]:
    """Each count, summed over all ranks."""
    total = torch.tensor(counts)
    distributed.all_reduce(total)
    return [int(count) for count in total]


def with_idle(sequences: list[T], idle: Callable[[], T]) -> list[T]:
    """This rank's packed sequences, followed by idle ones until it has as many as any rank, and at least one. idle:
    makes one; called only where one is needed."""
    most = torch.tensor(max(1, len(sequences)))
    distributed.all_reduce(most, op=distributed.ReduceOp.MAX)
    missing = int(most) - len(sequences)
    return sequences + [idle()] * missing if missing else sequences
