"""The objective: what a step of GRPO makes likely. Pure functions over tensors, chosen by `ObjectiveConfig`.

    rewards [n] ──advantages──► [n]
    log-probs, advantages [T] ──token_losses──► [T] ──· aggregation_weights [T], summed over all ranks──► the loss

T counts the answer tokens of a micro-batch, n the answers of a group. GRPO: Shao et al. 2024, arXiv:2402.03300; where
another paper is followed, the function says so.
"""

from dataclasses import dataclass

import torch

from learner.config import ObjectiveConfig


def advantages(rewards: torch.Tensor, kind: str, epsilon: float = 1e-6) -> torch.Tensor:
    """Advantages [n] of a group's answers from their rewards [n].

    group: (r - mean) / (std + epsilon), std with n - 1 (GRPO). mean: r - mean (Dr.GRPO, Liu et al. 2025,
    arXiv:2503.20783). leave_one_out: r - mean of the others (RLOO, Ahmadian et al. 2024, arXiv:2402.14740).
    A group without spread, or of one answer, has nothing to say: zeros.
    """
    # The mean of equal numbers may be off by rounding, which so small a divisor would blow up.
    if len(rewards) < 2 or bool(rewards.max() == rewards.min()):
        return torch.zeros_like(rewards)
    centred = rewards - rewards.mean()
    if kind == "group":
        return centred / (rewards.std() + epsilon)
    return centred * len(rewards) / (len(rewards) - 1) if kind == "leave_one_out" else centred


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Of all ranks' answers in a mini-batch, those left out that count for nothing. tokens, answers: how many.
    longest: the most tokens that an answer may have."""

    tokens: int
    answers: int
    longest: int


def aggregation_weights(lengths: torch.Tensor, kind: str, totals: Totals) -> torch.Tensor:
    """What each token's loss counts, [T], from the lengths [n] of the answers that the tokens belong to, in order.

    token: the mean over all tokens (DAPO, Yu et al. 2025, arXiv:2503.14476, eq. 8). sequence: the mean over answers of
    means over their tokens (GRPO, eq. 3). constant: the sum over tokens by the longest length, in the mean over
    answers (Dr.GRPO).
    """
    each = {
        "token": torch.full(lengths.shape, 1 / totals.tokens),
        "sequence": 1 / (lengths * totals.answers),
        "constant": torch.full(lengths.shape, 1 / (totals.longest * totals.answers)),
    }[kind]
    return torch.repeat_interleave(each.float(), lengths)


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The answer tokens of a micro-batch; each tensor [T].

    logprobs: of the policy that learns, with a gradient; entropy: of its distributions, in nats. old_logprobs: of the
    policy that sampled, by the learner's arithmetic; engine_logprobs: by the rollout engine's. advantages: of the
    answer that each belongs to; answer: its index, 0, 1, …. reference_logprobs: of the model that the run began with.
    """

    logprobs: torch.Tensor
    entropy: torch.Tensor
    old_logprobs: torch.Tensor
    engine_logprobs: torch.Tensor
    advantages: torch.Tensor
    answer: torch.Tensor
    reference_logprobs: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class TokenLosses:
    """A loss a token, with a gradient, and what is worth watching about it, without; each [T].

    clipped: 1 where the ratio's gradient was cut off. kl: estimate of the divergence from the reference, 0 without one.
    truncated: 1 where a correction for the difference between engine and learner is, or would be, cut off at its cap.
    """

    loss: torch.Tensor
    clipped: torch.Tensor
    kl: torch.Tensor
    truncated: torch.Tensor


def token_losses(tokens: Tokens, objective: ObjectiveConfig) -> TokenLosses:
    """-min(r A, clip(r) A) · correction + kl · KL - entropy · H, a token."""
    ratio = importance_ratio(tokens.logprobs - tokens.old_logprobs, tokens.answer, objective.ratio)
    surrogate, clipped = clipped_surrogate(ratio, tokens.advantages, objective)
    correction = engine_correction(tokens.old_logprobs - tokens.engine_logprobs, tokens.answer, objective.correction)
    loss = -surrogate
    if objective.correction != "none":
        loss = loss * correction.clamp(max=objective.correction_cap)
    kl = torch.zeros_like(tokens.logprobs)
    if tokens.reference_logprobs is not None:
        kl = divergence(tokens.logprobs, tokens.reference_logprobs, objective.kl_estimator)
        loss = loss + objective.kl * kl
    if objective.entropy > 0:
        loss = loss - objective.entropy * tokens.entropy
    truncated = (correction > objective.correction_cap).float()
    return TokenLosses(loss=loss, clipped=clipped.detach(), kl=kl.detach(), truncated=truncated)


def importance_ratio(log_ratio: torch.Tensor, answer: torch.Tensor, kind: str) -> torch.Tensor:
    """Probability under the policy that learns over that under the one that sampled, [T], from the tokens' log-ratios.

    token: each token's own. sequence: of each answer's whole text, to the power of one over its length, the same for
    all its tokens (GSPO, Zheng et al. 2025, arXiv:2507.18071, eq. 7).
    """
    return (log_ratio if kind == "token" else _mean_of_answer(log_ratio, answer)).exp()


def clipped_surrogate(
    ratio: torch.Tensor, advantages: torch.Tensor, objective: ObjectiveConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """min(r A, clip(r, 1 - clip, 1 + clip_high) A), [T], and 1 where the clipped value was taken (PPO, Schulman et al.
    2017, arXiv:1707.06347; an upper bound of its own: clip-higher of DAPO). dual_clip bounds it by c A from below where
    A < 0 (Ye et al. 2020, arXiv:1912.09729, eq. 5)."""
    high = objective.clip if objective.clip_high is None else objective.clip_high
    free, bound = ratio * advantages, ratio.clamp(1 - objective.clip, 1 + high) * advantages
    surrogate, clipped = torch.minimum(free, bound), bound < free
    if objective.dual_clip is not None:
        floor = objective.dual_clip * advantages
        lifted = (advantages < 0) & (surrogate < floor)
        surrogate, clipped = torch.where(lifted, floor, surrogate), clipped | lifted
    return surrogate, clipped.float()


def engine_correction(log_ratio: torch.Tensor, answer: torch.Tensor, kind: str) -> torch.Tensor:
    """Learner's over engine's probability of what was sampled, [T], without a gradient, from the tokens' log-ratios: of
    each token, or of each answer's whole text. To be truncated at a cap (Yao et al. 2025, "Your efficient RL framework
    secretly brings you off-policy RL training"; truncation as in Espeholt et al. 2018, arXiv:1802.01561)."""
    log_ratio = log_ratio.detach()
    return (_sum_of_answer(log_ratio, answer) if kind == "sequence" else log_ratio).exp()


def divergence(logprobs: torch.Tensor, reference: torch.Tensor, kind: str) -> torch.Tensor:
    """Estimates of KL(policy | reference) a token, [T]; with x the reference's log-prob less the policy's: k1: -x.
    k2: x²/2. k3: e^x - x - 1 (Schulman 2020, http://joschu.net/blog/kl-approx.html; GRPO, eq. 4)."""
    x = reference - logprobs
    if kind == "k1":
        return -x
    return x.square() / 2 if kind == "k2" else x.exp() - x - 1


def _sum_of_answer(values: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
    """The sum over each answer's tokens, [T]."""
    sums = torch.zeros(int(answer.max()) + 1, dtype=values.dtype, device=values.device)
    return sums.index_add(0, answer, values)[answer]


def _mean_of_answer(values: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
    """The mean over each answer's tokens, [T]."""
    return _sum_of_answer(values, answer) / _sum_of_answer(torch.ones_like(values), answer)
