"""A rank's AdamW: torch's own, so that nothing is compiled at the first start."""

import math
from collections.abc import Iterable
from typing import Any

import torch

from learner.config import OptimizerConfig


def lr_factor(update: int, updates: int, config: OptimizerConfig) -> float:
    """Factor of the learning rate at update 0, 1, … of `updates`: linear warm-up, then constant, or linear or cosine
    decay to `final_lr`."""
    if update < config.warmup:
        return (update + 1) / (config.warmup + 1)
    if config.schedule == "constant":
        return 1.0
    progress = min(1.0, (update - config.warmup) / max(1, updates - config.warmup))
    decayed = progress if config.schedule == "linear" else (1 - math.cos(math.pi * progress)) / 2
    return 1 - (1 - config.final_lr) * decayed


def adamw(parameters: Iterable[torch.nn.Parameter], config: OptimizerConfig, *, fused: bool) -> torch.optim.AdamW:
    """AdamW over some parameters, with a parameter group for matrices and one for vectors.

    fused: one kernel for the whole step. Without it torch makes several temporaries of the size of a whole parameter,
    which under ZeRO is a rank's whole partition in float32. ZeRO's offload steps on the CPU, for which torch has such a
    kernel too; it rounds differently from the default, so a rank without a GPU does not take it.
    """
    parameters = list(parameters)
    vectors = [parameter for parameter in parameters if is_vector(parameter)]
    matrices = [parameter for parameter in parameters if not is_vector(parameter)]
    rates = ((matrices, config.lr), (vectors, config.vector_lr or config.lr))
    groups: list[dict[str, Any]] = [{"params": params, "lr": lr, "initial_lr": lr} for params, lr in rates if params]
    return torch.optim.AdamW(
        groups,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=fused or None,  # None: torch's default, which False would not be on every device
    )


def set_lr(optimizer: Any, factor: float) -> None:
    """Set each parameter group's learning rate to that factor of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def is_vector(parameter: torch.nn.Parameter) -> bool:
    """Whether a parameter is a norm's gain or a bias, also if ZeRO-3 has partitioned it."""
    return len(getattr(parameter, "ds_shape", parameter.shape)) < 2
