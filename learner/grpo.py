"""The arithmetic of GRPO (Shao et al. 2024, arXiv:2402.03300): pure functions over tensors."""

from dataclasses import dataclass

import torch


def group_advantages(rewards: torch.Tensor, epsilon: float = 1e-6) -> torch.Tensor:
    """Advantages [n] of a group's answers from their rewards [n]: (r - mean) / (std + epsilon), std with n - 1.

    A group without spread, or of one answer, has nothing to say: zeros.
    """
    # The mean of equal numbers may be off by rounding, which so small a divisor would blow up.
    if len(rewards) < 2 or bool(rewards.max() == rewards.min()):
        return torch.zeros_like(rewards)
    centred = rewards - rewards.mean()
    return centred / (rewards.std() + epsilon)


@dataclass(frozen=True, kw_only=True)
class TokenLoss:
    """A loss a token, and what is worth watching about it; each [T].

    loss: to be summed. ratio: current over old probability. clipped: 1 where the clipped term was taken.
    kl: estimate of the divergence from the reference, 0 without one.
    """

    loss: torch.Tensor
    ratio: torch.Tensor
    clipped: torch.Tensor
    kl: torch.Tensor


def grpo_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    *,
    clip: float,
    reference_logprobs: torch.Tensor | None = None,
    kl_weight: float = 0.0,
) -> TokenLoss:
    """The clipped surrogate of each token, -min(r A, clip(r, 1 ± clip) A) + kl_weight · KL; all arguments [T].

    old_logprobs: of the policy that sampled. advantages: of the answer that each token belongs to. The divergence
    from the reference is the low-variance estimate "k3", q/p - ln(q/p) - 1, with q the reference's probability
    (http://joschu.net/blog/kl-approx.html).
    """
    ratio = torch.exp(logprobs - old_logprobs)
    unclipped, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    loss = -torch.minimum(unclipped, clipped)
    kl = torch.zeros_like(logprobs)
    if reference_logprobs is not None:
        log_ratio = reference_logprobs - logprobs
        kl = torch.exp(log_ratio) - log_ratio - 1
        loss = loss + kl_weight * kl
    return TokenLoss(
        loss=loss,
        ratio=ratio.detach(),
        clipped=(clipped < unclipped).float(),
        kl=kl.detach(),
    )
