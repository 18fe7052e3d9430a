"""Groups sampled, scored and learnt from, on the engine, the expert and the learner that all tests share."""

from dataclasses import replace

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import load_file

from actors.weight_files import unpack
from cluster.evaluation import collect
from cluster.weight_sync import Canary, WeightsDiffer, sync_weights
from phantoms import rows
from reasoner.model import load_reasoner
from reasoner.prompter import load_prompter
from tests.conftest import TINY_REASONER
from tests.ranks import running
from tests.runs import hand_out
from umrg.dataset import Dataset
from umrg.dataset_writer import write_rows
from umrg.group import Group, SamplingParams


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "phantoms.parquet"
    write_rows(path, rows(6, seed=9, modalities=["CT"], queries_per_image=2))
    return list(Dataset.open(path))


def scored(workers, groups, *, n, max_tokens, seed=7):
    """Groups sampled at temperature 1 and scored."""
    sampling = SamplingParams(n=n, temperature=1.0, max_tokens=max_tokens, seed=seed)
    return [each.scored for each in collect(workers, groups, sampling, "masks")]


def gap(canary, workers):
    """What the canary finds, which some engine must have been asked for."""
    found = canary.check(workers)
    assert found is not None
    return found


def test_a_rollout_is_the_same_whichever_actor_draws_it_and_however_it_is_batched(workers, samples):
    groups = [Group(run="t", step=0, index=i, sample=sample) for i, sample in enumerate(samples)]
    together = scored(workers, groups, n=4, max_tokens=96)
    (alone,) = scored(workers, groups[3:4], n=4, max_tokens=96)
    assert alone.samples == together[3].samples
    texts = {completion.text for completion in together[0].samples.completions}
    assert len(texts) > 1, "four answers at temperature 1 should differ"


def test_a_prompt_is_prefilled_once_a_group(workers, samples):
    """All but the last blocks of the prefix cache; the answer that is asked for first fills it for the others."""
    query = "What may break in old age and cause back pain? " * 20
    groups = [
        Group(run="t", step=0, index=i, sample=replace(sample, query=f"{query} {i}"))
        for i, sample in enumerate(samples[:2])
    ]
    for each in scored(workers, groups, n=4, max_tokens=8):
        prompt = len(each.samples.prompt_ids)
        assert prompt > 384 and prompt - each.samples.cached <= 128


def test_a_prompt_over_the_limit_is_named(workers, samples):
    long = replace(samples[0], query="Where? " * 600)
    group = Group(run="t", step=0, index=0, sample=long)
    with pytest.raises(ValueError, match=rf"rollout 0, sampling: {long.name}: the prompt has \d+ tokens, 64 of them"):
        scored(workers, [group], n=1, max_tokens=8)


def test_vision_tokens_are_never_sampled(workers, samples):
    """Not even from a model that wants nothing else: whichever way the hidden state points, one of two such tokens has
    by far the largest logit, some 20 nats above all others."""
    weights = load_file(TINY_REASONER / "model.safetensors")
    prompter = load_prompter(TINY_REASONER)
    vision = sorted(prompter.vision_tokens)
    head = torch.zeros_like(weights["lm_head.weight"])
    direction = torch.randn(head.shape[1], generator=torch.Generator().manual_seed(0))
    head[vision[0]], head[vision[1]] = 1.5 * direction, -1.5 * direction
    try:
        hand_out(workers, {**weights, "lm_head.weight": head})
        group = Group(run="t", step=0, index=0, sample=samples[0])
        (taken,) = scored(workers, [group], n=4, max_tokens=32)
        for completion in taken.samples.completions:
            assert not set(vision) & set(completion.token_ids)
            assert np.isfinite(completion.logprobs).all()
    finally:
        sync_weights(workers, version=0, everything=True)


def test_a_frozen_vision_tower_is_left_out_of_updates(workers, samples, demo_config):
    """The engine keeps its tower, biases and all, and computes with the learner's language model."""
    tower = dict(load_reasoner(TINY_REASONER).model.named_parameters())["model.visual.blocks.0.attn.qkv.bias"]
    assert tower.abs().min() > 0
    canary = Canary(samples[0], demo_config())
    own = workers.learner.weights(2, everything=False)
    sent = {entry.name for ref in own.buckets for entry in ray.get(ref).entries}
    assert sent and not any(name.startswith("model.visual.") for name in sent)
    # Other weights first, so that an update that changed nothing would show.
    other = {name: tensor + 0.1 for ref in own.buckets for name, tensor in unpack(ray.get(ref)).items()}
    try:
        hand_out(workers, other)
        with pytest.raises(WeightsDiffer, match="stale weights or caches"):
            canary.check(workers)
        (member,) = workers.rollouts
        receipt = ray.get(member.handle.update_weights.remote(2, list(own.buckets)), timeout=120)
        assert receipt.checksum == own.checksum and receipt.unlike == () and receipt.compared > 10
        assert gap(canary, workers) < 1e-3
    finally:
        sync_weights(workers, version=0, everything=True)
    canary.check(workers)


def test_answers_are_scored_by_form_geometry_and_mask(workers, samples):
    (group,) = scored(workers, [Group(run="t", step=0, index=0, sample=samples[0])], n=4, max_tokens=96)
    for completion, answer in zip(group.samples.completions, group.answers, strict=True):
        assert 0 <= answer.reward.total <= 4.5 and np.isfinite(list(answer.metrics.values())).all()
        assert (answer.mask is not None) == (answer.metrics["well_formed"] == 1.0)
        assert len(completion.logprobs) == len(completion.token_ids)


@pytest.mark.numeric
def test_the_learners_log_probs_are_the_engines_after_updates(workers, hosts, demo_config, samples):
    """After two real updates, every token of a new group, to 1e-4."""
    own = replace(workers, learner=running(hosts, steps=2, lr=3e-4, freeze=["vision_tower", "merger"]))
    canary = Canary(samples[0], demo_config())
    try:
        assert gap(canary, own) < 1e-5
        for step in range(2):
            groups = [Group(run="t", step=step, index=i, sample=sample) for i, sample in enumerate(samples[:3])]
            taken = collect(own, groups, SamplingParams(n=4, temperature=1.0, max_tokens=96, seed=7), "reward")
            report = own.learner.update([each.refs for each in taken], [1] * len(taken))
            assert report.engine_gap < 1e-5
            sync_weights(own, version=step + 1)
            assert gap(canary, own) < 1e-5
        group = Group(run="t", step=2, index=0, sample=samples[4])
        (new,) = scored(own, [group], n=3, max_tokens=96, seed=8)
        for completion in new.samples.completions:
            assert completion.policy_version == 2
            expected = own.learner.logprobs(ray.put(group), completion.token_ids)
            assert np.abs(np.subtract(completion.logprobs, expected)).max() < 1e-4
    finally:
        sync_weights(workers, version=0)
