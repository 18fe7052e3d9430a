"""Each objective against its paper's formula, written out in loops, and against TRL's own loss."""

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.config import ObjectiveConfig
from learner.objective import Tokens, Totals, advantages, aggregation_weights, token_losses

pytestmark = pytest.mark.numeric

finite = st.floats(-5, 5, width=32)
near = st.floats(-2, 2, width=32)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("group", [-2 / math.sqrt(14 / 3), -1 / math.sqrt(14 / 3), 0, 3 / math.sqrt(14 / 3)]),
        ("mean", [-2, -1, 0, 3]),
        ("leave_one_out", [1 - 11 / 3, 2 - 10 / 3, 3 - 9 / 3, 6 - 6 / 3]),
    ],
)
def test_advantages_are_those_of_the_papers(kind, expected):
    found = advantages(torch.tensor([1.0, 2.0, 3.0, 6.0]), kind)
    torch.testing.assert_close(found, torch.tensor(expected).float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["group", "mean", "leave_one_out"])
@pytest.mark.parametrize("rewards", [[0.7], [0.5, 0.5, 0.5], [2.7] * 8, [3.1234] * 16, [0.1] * 12])
def test_a_zero_variance_group_has_no_advantages(rewards, kind):
    assert not advantages(torch.tensor(rewards), kind).any()


@given(st.lists(finite, min_size=2, max_size=16), st.floats(0.1, 10), finite)
def test_group_advantages_do_not_depend_on_the_rewards_scale(rewards, scale, shift):
    values = torch.tensor(rewards, dtype=torch.float64)
    if values.std() < 1e-2:
        return
    assert torch.allclose(advantages(values, "group"), advantages(values * scale + shift, "group"), atol=1e-2)


answers = st.lists(
    st.tuples(finite, st.lists(st.tuples(near, near, near, near, st.floats(0, 3, width=32)), min_size=1, max_size=6)),
    min_size=1,
    max_size=5,
)
objectives = st.fixed_dictionaries(
    {
        "aggregation": st.sampled_from(["token", "sequence", "constant"]),
        "ratio": st.sampled_from(["token", "sequence"]),
        "clip": st.sampled_from([3e-4, 0.2]),
        "clip_high": st.sampled_from([None, 0.28]),
        "dual_clip": st.sampled_from([None, 3.0]),
        "kl": st.sampled_from([0.0, 0.3]),
        "kl_estimator": st.sampled_from(["k1", "k2", "k3"]),
        "entropy": st.sampled_from([0.0, 0.1]),
        "correction": st.sampled_from(["none", "token", "sequence"]),
        "correction_cap": st.sampled_from([1.5, 2.0]),
    }
)


def tensors(drawn):
    """The tokens, in float64, of completions [(advantage, [(log-prob, old, engine, reference, entropy)])]."""
    flat = [(a, i, *token) for i, (a, tokens) in enumerate(drawn) for token in tokens]
    advantage, index, new, old, engine, reference, entropy = (
        torch.tensor(column) for column in zip(*flat, strict=True)
    )
    return Tokens(
        logprobs=new.double().requires_grad_(),
        entropy=entropy.double().requires_grad_(),
        old_logprobs=old.double(),
        engine_logprobs=engine.double(),
        advantages=advantage.double(),
        answer=index,
        reference_logprobs=reference.double(),
    )


def objective_of(drawn, config):
    """The loss by `learner.objective`, and its gradients with respect to log-probs and entropies."""
    tokens = tensors(drawn)
    lengths = torch.tensor([len(tokens) for _, tokens in drawn])
    totals = Totals(tokens=int(lengths.sum()), answers=len(drawn), max_tokens=7)
    weights = aggregation_weights(lengths, config.aggregation, totals)
    loss = (token_losses(tokens, config).loss * weights).sum()
    gradients = torch.autograd.grad(loss, [tokens.logprobs, tokens.entropy], allow_unused=True)
    return loss, [torch.zeros(len(tokens.answer)) if g is None else g for g in gradients]


def plain(drawn, config):
    """The same from the papers, one completion and one token at a time; torch only for the gradient."""
    tokens = tensors(drawn)
    new, entropy = tokens.logprobs, tokens.entropy
    total, at = torch.zeros((), dtype=torch.float64), 0
    for advantage, answer in drawn:
        places = range(at, at + len(answer))
        at += len(answer)
        deltas = [new[t] - tokens.old_logprobs[t] for t in places]
        gaps = [float(tokens.old_logprobs[t] - tokens.engine_logprobs[t]) for t in places]
        losses = []
        for t, delta, gap in zip(places, deltas, gaps, strict=True):
            ratio = torch.exp(delta if config.ratio == "token" else torch.stack(deltas).mean())
            high = config.clip_high if config.clip_high is not None else config.clip
            low, top = 1 - config.clip, 1 + high
            bound = min(max(float(ratio), low), top)
            clipped = ratio if low <= float(ratio) <= top else torch.tensor(bound, dtype=torch.float64)
            surrogate = ratio * advantage if float(ratio) * advantage <= bound * advantage else clipped * advantage
            if config.dual_clip is not None and advantage < 0 and float(surrogate) < config.dual_clip * advantage:
                surrogate = torch.tensor(config.dual_clip * advantage, dtype=torch.float64)
            weight = math.exp(gap if config.correction == "token" else sum(gaps))
            loss = -surrogate * (1 if config.correction == "none" else min(weight, config.correction_cap))
            x = tokens.reference_logprobs[t] - new[t]
            loss = loss + config.kl * {"k1": -x, "k2": x**2 / 2, "k3": torch.exp(x) - x - 1}[config.kl_estimator]
            losses.append(loss - config.entropy * entropy[t])
        summed = torch.stack(losses).sum()
        every = sum(len(tokens) for _, tokens in drawn)
        total = (
            total
            + {
                "token": summed / every,
                "sequence": summed / len(answer) / len(drawn),
                "constant": summed / 7 / len(drawn),
            }[config.aggregation]
        )
    gradients = torch.autograd.grad(total, [new, entropy], allow_unused=True)
    return total, [torch.zeros(len(new)) if g is None else g for g in gradients]


@settings(deadline=None, max_examples=300)
@given(drawn=answers, chosen=objectives)
def test_every_objective_is_its_papers(drawn, chosen):
    config = ObjectiveConfig(**chosen)
    # At a kink of the clipped surrogate the two may take different sides.
    for _, answer in drawn:
        deltas = [new - old for new, old, *_ in answer]
        ratios = [math.exp(d) for d in deltas] + [math.exp(sum(deltas) / len(deltas))]
        edges = (1 - config.clip, 1 + config.clip, 1 + (config.clip_high or config.clip), config.dual_clip or 1e9)
        if any(abs(ratio - edge) < 1e-6 for ratio in ratios for edge in edges):
            return
    found, expected = objective_of(drawn, config), plain(drawn, config)
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), atol=1e-5, rtol=1e-5)


@given(drawn=answers, kind=st.sampled_from(["token", "sequence", "constant"]))
def test_losses_of_several_ranks_sum_to_that_of_one(drawn, kind):
    config = ObjectiveConfig(aggregation=kind)
    whole, _ = objective_of(drawn, config)
    lengths = torch.tensor([len(tokens) for _, tokens in drawn])
    totals = Totals(tokens=int(lengths.sum()), answers=len(drawn), max_tokens=7)
    parts = [
        (token_losses(tensors([answer]), config).loss * aggregation_weights(lengths[i : i + 1], kind, totals)).sum()
        for i, answer in enumerate(drawn)
    ]
    torch.testing.assert_close(torch.stack(parts).sum(), whole)


def test_on_policy_the_gradient_is_that_of_reinforce():
    _, (gradient, _) = objective_of(
        [(1.0, [(-1.0, -1.0, -1.0, 0.0, 0.0)]), (-2.0, [(-2.0, -2.0, 0.0, 0.0, 0.0)])], GRPO
    )
    torch.testing.assert_close(gradient, torch.tensor([-0.5, 1.0], dtype=torch.float64))


GRPO = ObjectiveConfig()


def test_a_mismatch_of_engine_and_learner_is_reported_even_if_it_is_not_corrected():
    tokens = tensors([(1.0, [(0.0, 0.0, -1.0, 0.0, 0.0), (0.0, 0.0, 0.1, 0.0, 0.0)])])
    found = token_losses(tokens, GRPO)
    assert found.truncated.tolist() == [1, 0] and found.loss.tolist() == [-1, -1]
    assert found.correction.tolist() == pytest.approx([2, math.exp(-0.1)])


@pytest.mark.parametrize(
    ("loss_type", "aggregation"),
    [("grpo", "sequence"), ("bnpo", "token"), ("dapo", "token"), ("dr_grpo", "constant")],
)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_loss_and_its_gradient_are_trls(loss_type, aggregation, level):
    """TRL's own `_compute_loss`, given the log-probs that a model would have returned."""
    generator = torch.Generator().manual_seed(0)
    new, old, reference = (-torch.rand(5, 7, generator=generator, dtype=torch.float64) for _ in range(3))
    lengths = [7, 3, 1, 5, 7]
    mask = torch.tensor([[i < length for i in range(7)] for length in lengths])
    rewards = torch.tensor([0.3, 2.0, 1.0, 0.0, 4.0])
    advantage = advantages(rewards, "group").double()
    theirs = new.clone().requires_grad_()
    loss = trl_loss(theirs, old, reference, advantage, mask, loss_type=loss_type, level=level)
    loss.backward()

    config = ObjectiveConfig(aggregation=aggregation, ratio=level, kl=0.04)
    ours = new[mask].clone().requires_grad_()
    counts = torch.tensor(lengths)
    tokens = Tokens(
        logprobs=ours,
        entropy=torch.zeros_like(ours),
        old_logprobs=old[mask],
        engine_logprobs=old[mask],
        advantages=torch.repeat_interleave(advantage, counts),
        answer=torch.repeat_interleave(torch.arange(5), counts),
        reference_logprobs=reference[mask],
    )
    weights = aggregation_weights(counts, aggregation, Totals(tokens=sum(lengths), answers=5, max_tokens=7))
    found = (token_losses(tokens, config).loss * weights).sum()
    found.backward()
    torch.testing.assert_close(found, loss, atol=1e-5, rtol=1e-5)
    assert theirs.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad[mask], atol=1e-5, rtol=1e-5)


def trl_loss(new, old, reference, advantage, mask, *, loss_type, level):
    """TRL's loss at its defaults except beta, the KL weight, from a trainer without a model."""
    from trl import GRPOTrainer

    class WithoutModel(GRPOTrainer):
        def __init__(self) -> None:
            self.args = SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1)
            self.accelerator = SimpleNamespace(
                num_processes=1, reduce=lambda x, reduction: x, gather=lambda x: x, gather_for_metrics=lambda x: x
            )
            self.model = SimpleNamespace(training=True)
            self.loss_type, self.importance_sampling_level = loss_type, level
            self.beta, self.epsilon_low, self.epsilon_high = 0.04, 0.2, 0.2
            self.max_completion_length, self.current_gradient_accumulation_steps = 7, 1
            self.aux_loss_enabled = self.use_vllm = self._entropy_bonus_enabled = False
            self.off_policy_mask_threshold, self.top_entropy_quantile = None, 1.0
            self._metrics: Any = {"train": defaultdict(list)}

        def _get_per_token_logps_and_entropies(self, *args, **kwargs):
            return new, torch.zeros_like(new), None

    ids = torch.zeros(5, 7, dtype=torch.int64)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": torch.ones(5, 1),
        "completion_ids": ids,
        "completion_mask": mask.double(),
        "advantages": advantage,
        "old_per_token_logps": old,
        "ref_per_token_logps": reference,
        "num_items_in_batch": mask.sum(),
    }
    return WithoutModel()._compute_loss(None, inputs)
