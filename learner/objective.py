"""The policy-gradient objective: pure functions over tensors, selected by `ObjectiveConfig`.

    rewards [n] ──advantages──► [n]
    log-probs, advantages [T] ──token_losses──► [T] ──· aggregation_weights [T], summed over all ranks──► the loss

n is the number of completions in a group, T the number of completion tokens in a micro-batch. The basis is GRPO (Shao
et al. 2024, arXiv:2402.03300); a function that follows another paper cites it.
"""

from dataclasses import dataclass

import torch

from learner.config import ObjectiveConfig


def advantages(rewards: torch.Tensor, kind: str, epsilon: float = 1e-6) -> torch.Tensor:
    """Advantages [n] of a group's completions from their rewards [n].

    group: (r - mean) / (std + epsilon), std with n - 1 (GRPO). mean: r - mean (Dr.GRPO, Liu et al. 2025,
    arXiv:2503.20783). leave_one_out: r - mean of the others (RLOO, Ahmadian et al. 2024, arXiv:2402.14740).
    A zero-variance group, or one of a single completion, has advantages of 0.
    """
    # Compared, not subtracted: the mean of equal numbers may be off by a rounding, which division by epsilon, their
    # std being 0, would turn into an advantage.
    if len(rewards) < 2 or bool(rewards.max() == rewards.min()):
        return torch.zeros_like(rewards)
    centred = rewards - rewards.mean()
    if kind == "group":
        return centred / (rewards.std() + epsilon)
    return centred * len(rewards) / (len(rewards) - 1) if kind == "leave_one_out" else centred


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Denominators of a mini-batch, over all ranks. Completions that are not in the loss are not counted."""

    tokens: int
    """Completion tokens."""
    answers: int
    """Completions."""
    max_tokens: int
    """Longest possible completion, in tokens."""


def aggregation_weights(lengths: torch.Tensor, kind: str, totals: Totals) -> torch.Tensor:
    """Weight of each token's loss, [T], from the lengths [n] of the completions that the tokens belong to, in order.

    token: mean over all tokens (DAPO, Yu et al. 2025, arXiv:2503.14476, eq. 8). sequence: mean over completions of the
    mean over their tokens (GRPO, eq. 3). constant: sum over tokens divided by the longest possible completion, mean
    over completions (Dr.GRPO).
    """
    each = {
        "token": torch.full(lengths.shape, 1 / totals.tokens),
        "sequence": 1 / (lengths * totals.answers),
        "constant": torch.full(lengths.shape, 1 / (totals.max_tokens * totals.answers)),
    }[kind]
    return torch.repeat_interleave(each.float(), lengths)


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The completion tokens of a micro-batch."""

    logprobs: torch.Tensor
    """[T], under the learning policy, with a gradient."""
    entropy: torch.Tensor
    """[T], of the learning policy's distributions, in nats; with a gradient if the objective has an entropy bonus."""
    old_logprobs: torch.Tensor
    """[T], under the policy before the step, computed by the learner."""
    engine_logprobs: torch.Tensor
    """[T], under the policy that sampled, computed by the rollout engine: that before the step, or an earlier one."""
    advantages: torch.Tensor
    """[T], of the completion that each token belongs to."""
    answer: torch.Tensor
    """[T] int64, index of that completion: 0, 1, …."""
    reference_logprobs: torch.Tensor | None = None
    """[T], under the reference model, the one that the run began with; None without a KL term."""


@dataclass(frozen=True, kw_only=True)
class TokenLosses:
    """Per-token losses, and detached diagnostics."""

    loss: torch.Tensor
    """[T], with a gradient."""
    clipped: torch.Tensor
    """[T], 1 where the ratio was clipped, so that the surrogate has no gradient."""
    kl: torch.Tensor
    """[T], estimate of the divergence from the reference model; 0 without one."""
    truncated: torch.Tensor
    """[T], 1 where the engine correction is above its cap, whether or not it is applied."""
    correction: torch.Tensor
    """[T], the engine correction, at most its cap, whether or not it is applied."""


def token_losses(tokens: Tokens, objective: ObjectiveConfig) -> TokenLosses:
    """Per-token loss: -min(r A, clip(r) A) · correction + kl · KL - entropy · H."""
    ratio = importance_ratio(tokens.logprobs - tokens.old_logprobs, tokens.answer, objective.ratio)
    surrogate, clipped = clipped_surrogate(ratio, tokens.advantages, objective)
    weight = engine_correction(tokens.old_logprobs - tokens.engine_logprobs, tokens.answer, objective.correction)
    correction, truncated = weight.clamp(max=objective.correction_cap), (weight > objective.correction_cap).float()
    loss = -surrogate
    if objective.correction != "none":
        loss = loss * correction
    kl = torch.zeros_like(tokens.logprobs)
    if tokens.reference_logprobs is not None:
        kl = divergence(tokens.logprobs, tokens.reference_logprobs, objective.kl_estimator)
        loss = loss + objective.kl * kl
    if objective.entropy > 0:
        loss = loss - objective.entropy * tokens.entropy
    return TokenLosses(loss=loss, clipped=clipped.detach(), kl=kl.detach(), truncated=truncated, correction=correction)


def importance_ratio(log_ratio: torch.Tensor, answer: torch.Tensor, kind: str) -> torch.Tensor:
    """Importance ratio of the learning policy to the one before the step, [T], from the tokens' log-ratios.

    token: each token's own. sequence: the geometric mean over each completion's tokens, the same for all of them (GSPO,
    Zheng et al. 2025, arXiv:2507.18071, eq. 7).
    """
    return (log_ratio if kind == "token" else _mean_of_answer(log_ratio, answer)).exp()


def clipped_surrogate(
    ratio: torch.Tensor, advantages: torch.Tensor, objective: ObjectiveConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """The surrogate min(r A, clip(r, 1 - clip, 1 + clip_high) A), [T], and 1 where the clipped value was taken (PPO,
    Schulman et al. 2017, arXiv:1707.06347; the separate upper bound is DAPO's clip-higher). With dual_clip = c it is at
    least c A where A < 0 (Ye et al. 2020, arXiv:1912.09729, eq. 5)."""
    high = objective.clip if objective.clip_high is None else objective.clip_high
    free, bound = ratio * advantages, ratio.clamp(1 - objective.clip, 1 + high) * advantages
    surrogate, clipped = torch.minimum(free, bound), bound < free
    if objective.dual_clip is not None:
        floor = objective.dual_clip * advantages
        lifted = (advantages < 0) & (surrogate < floor)
        surrogate, clipped = torch.where(lifted, floor, surrogate), clipped | lifted
    return surrogate, clipped.float()


def engine_correction(log_ratio: torch.Tensor, answer: torch.Tensor, kind: str) -> torch.Tensor:
    """Importance weight of the policy before the step, in the learner's arithmetic, over the one that sampled, in the
    engine's, [T], detached, from the tokens' log-ratios: of each token, or of each completion as a whole. The caller
    truncates it at a cap (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training";
    truncation as in Espeholt et al. 2018, arXiv:1802.01561). Where an earlier version sampled, it is the behaviour
    weight of the decoupled objective, whose clip is centred on the policy before the step (Hilton et al. 2021,
    arXiv:2110.00641, eq. 2; Fu et al. 2025, arXiv:2505.24298)."""
    log_ratio = log_ratio.detach()
    return (_sum_of_answer(log_ratio, answer) if kind == "sequence" else log_ratio).exp()


def divergence(logprobs: torch.Tensor, reference: torch.Tensor, kind: str) -> torch.Tensor:
    """Per-token estimates of KL(policy | reference), [T]. With x = ln p_reference - ln p_policy: k1 = -x, k2 = x²/2,
    k3 = e^x - x - 1 (Schulman 2020, http://joschu.net/blog/kl-approx.html; GRPO, eq. 4)."""
    x = reference - logprobs
    if kind == "k1":
        return -x
    return x.square() / 2 if kind == "k2" else x.exp() - x - 1


def _sum_of_answer(values: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
    """The sum over each completion's tokens, repeated for each of them, [T]."""
    # As many sums as tokens, though there are fewer answers: to count these would make the host wait for the GPU.
    return torch.zeros_like(values).index_add(0, answer, values)[answer]


def _mean_of_answer(values: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
    """The mean over each completion's tokens, repeated for each of them, [T]."""
    return _sum_of_answer(values, answer) / _sum_of_answer(torch.ones_like(values), answer)
