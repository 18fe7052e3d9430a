"""The arithmetic of GRPO against formulas written out."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.grpo import group_advantages, grpo_loss

finite = st.floats(-5, 5, width=32)


def test_advantages_are_centred_and_scaled_within_the_group():
    advantages = group_advantages(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert torch.allclose(advantages, torch.tensor([-2.0, -1.0, 0.0, 3.0]) / math.sqrt(14 / 3), atol=1e-5)


@pytest.mark.parametrize("rewards", [[0.7], [0.5, 0.5, 0.5], [2.7] * 8, [3.1234] * 16, [0.1] * 12])
def test_a_group_without_spread_says_nothing(rewards):
    assert group_advantages(torch.tensor(rewards)).abs().max() < 1e-5


@given(st.lists(finite, min_size=2, max_size=16), st.floats(0.1, 10), finite)
def test_advantages_do_not_depend_on_the_rewards_scale(rewards, scale, shift):
    values = torch.tensor(rewards, dtype=torch.float64)
    if values.std() < 1e-2:
        return
    moved = group_advantages(values * scale + shift)
    assert torch.allclose(group_advantages(values), moved, atol=1e-2)


@given(st.lists(st.tuples(finite, finite, finite, finite), min_size=1, max_size=12), st.floats(0.05, 0.5))
def test_the_loss_is_the_papers(tokens, clip):
    logprobs, old, advantages, reference = (
        torch.tensor(column, dtype=torch.float64) for column in zip(*tokens, strict=True)
    )
    found = grpo_loss(logprobs, old, advantages, clip=clip, reference_logprobs=reference, kl_weight=0.3)
    for i, (new, before, advantage, ref) in enumerate(tokens):
        ratio = math.exp(new - before)
        surrogate = min(ratio * advantage, min(max(ratio, 1 - clip), 1 + clip) * advantage)
        kl = math.exp(ref - new) - (ref - new) - 1
        assert found.loss[i].item() == pytest.approx(-surrogate + 0.3 * kl, rel=1e-6, abs=1e-9)
        assert found.kl[i].item() == pytest.approx(kl, rel=1e-6, abs=1e-9)


def test_on_policy_the_gradient_is_that_of_reinforce():
    logprobs = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    advantages = torch.tensor([1.0, -2.0, 0.5])
    found = grpo_loss(logprobs, logprobs.detach(), advantages, clip=0.2)
    found.loss.sum().backward()
    assert logprobs.grad is not None and torch.allclose(logprobs.grad, -advantages)
    assert found.clipped.sum() == 0 and torch.equal(found.ratio, torch.ones(3))


def test_far_off_a_good_token_is_pushed_no_further():
    logprobs = torch.tensor([0.0, 0.0], requires_grad=True)
    found = grpo_loss(logprobs, torch.tensor([-1.0, 1.0]), torch.tensor([1.0, -1.0]), clip=0.2)
    found.loss.sum().backward()
    assert logprobs.grad is not None and torch.equal(logprobs.grad, torch.zeros(2))
    assert torch.equal(found.clipped, torch.ones(2))
