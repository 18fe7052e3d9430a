"""What an update reports. In a module of its own, so that the driver reads reports without importing DeepSpeed."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class UpdateReport:
    """The updates of one GRPO step. Means are over the completion tokens in the loss, of all ranks."""

    loss: float
    """The objective with its sign reversed, summed over the updates."""
    kl: float
    """Estimate of the divergence from the reference model; 0 without one."""
    clip_fraction: float
    """Share of the tokens whose importance ratio was clipped."""
    entropy: float
    """Of the policy's distributions, in nats."""
    engine_gap: float
    """Mean absolute difference between the rollout engine's and the learner's log-probs of the sampling policy."""
    engine_kl: float
    """The divergence that this difference implies, by the estimator k3."""
    truncated_fraction: float
    """Share of the tokens whose engine correction is above `correction_cap`, whether or not it is applied."""
    correction: float
    """Mean engine correction, each at most `correction_cap`, whether or not it is applied: the behaviour weight where
    steps overlap."""
    grad_norm: float
    """Gradient norm of the last update, before clipping."""
    lr: float
    """Learning rate of the last update."""
    tokens: int
    """Of all completions, in the loss or not."""
    updates: int
    """Updates that the step made: one per mini-batch."""


@dataclass(frozen=True, kw_only=True)
class SftReport:
    """One supervised update."""

    loss: float
    """Mean negative log-likelihood per scored token, in nats."""
    grad_norm: float
    """Gradient norm before clipping."""
    lr: float
    """Learning rate."""
    tokens: int
    """Scored tokens of all reference answers, over all ranks."""
