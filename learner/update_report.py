"""What an update tells of itself; apart from `learner.zero`, so that the driver need not import DeepSpeed."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class UpdateReport:
    """What one step of updates did; means over the step's answer tokens, all ranks.

    loss, kl, clipped (share): as `learner.grpo.TokenLoss` has them. engine_gap: mean absolute difference between the
    rollout engine's log-probs and the learner's before the first update. grad_norm: of the last update, before
    clipping. lr: of the last update. tokens: answer tokens. updates: how many there were.
    """

    loss: float
    kl: float
    clipped: float
    engine_gap: float
    grad_norm: float
    lr: float
    tokens: int
    updates: int
