"""The learning rate over a run."""

import math

from learner.config import OptimizerConfig


def lr_share(update: int, updates: int, config: OptimizerConfig) -> float:
    """Share of its learning rate that update 0, 1, … of so many has: a linear warm-up, then constant, or down to
    `final_lr` linearly or by half a cosine."""
    if update < config.warmup:
        return (update + 1) / (config.warmup + 1)
    if config.schedule == "constant":
        return 1.0
    progress = min(1.0, (update - config.warmup) / max(1, updates - config.warmup))
    fallen = progress if config.schedule == "linear" else (1 - math.cos(math.pi * progress)) / 2
    return 1 - (1 - config.final_lr) * fallen
