"""What an update tells of itself; apart from `learner.zero`, so that the driver need not import DeepSpeed."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class UpdateReport:
    """What one step of updates did; means over the answer tokens that learning looked at, all ranks.

    loss: the objective with its sign turned, summed over updates. kl, clipped and truncated (shares): as
    `learner.objective.TokenLosses` has them. entropy: of the policy's distributions, in nats. engine_gap: mean absolute
    difference between the rollout engine's log-probs and the learner's, both of the policy that sampled; engine_kl: the
    divergence that it means, by the estimator k3. grad_norm, lr: of the last update, before clipping. tokens: of all
    answers. updates: how many there were.
    """

    loss: float
    kl: float
    clipped: float
    entropy: float
    engine_gap: float
    engine_kl: float
    truncated: float
    grad_norm: float
    lr: float
    tokens: int
    updates: int


@dataclass(frozen=True, kw_only=True)
class SftReport:
    """What one supervised update did. loss: mean negative log-likelihood of a token, in nats. grad_norm: before
    clipping. tokens: of all answers, all ranks."""

    loss: float
    grad_norm: float
    lr: float
    tokens: int
