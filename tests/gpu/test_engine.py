"""The engine and the expert on a GPU: what they say, how they agree with the learner, and updates of their weights."""

import asyncio
import os
import time

import numpy as np
import pytest
import torch

from actors.config import RolloutConfig, SegmenterConfig
from actors.experts.drawing import draw_masks, load_frozen
from actors.weight_files import checksum_of, pack
from bench.published_shapes import scored_groups
from learner.policy import Policy
from learner.shared_prefix import Branches
from learner.shared_prefix import pack as packed
from phantoms import rows
from reasoner.model import load_reasoner
from reasoner.prompter import load_prompter
from tests.direct_sender import as_plugin, sent_directly
from umrg.answers import format_answer, parse_answer
from umrg.dataset import Dataset
from umrg.dataset_writer import write_rows
from umrg.group import SamplingParams
from umrg.metrics import mask_dice

pytestmark = [pytest.mark.gpu, pytest.mark.cluster]

BOUND = 0.15
"""Mean difference of log-probs, in nats, of bfloat16 in engine and learner: that of the canary."""


@pytest.fixture(scope="module")
def loop():
    running = asyncio.new_event_loop()
    yield running
    # What vLLM leaves running in it keeps a socket open, for which the process would wait at its end.
    left = asyncio.all_tasks(running)
    for task in left:
        task.cancel()
    if left:
        running.run_until_complete(asyncio.wait(left))
    running.close()


@pytest.fixture(scope="module")
def engine(folder, scale, loop, tmp_path_factory):
    """An engine in bfloat16, which leaves room for a learner."""
    prompter = load_prompter(folder)
    longest = len(scored_groups(prompter, scale.work)[0].samples.prompt_ids)
    config = RolloutConfig.model_validate(
        {
            "num_gpus": scale.gpus,
            "dtype": scale.dtype,
            "max_prompt_tokens": longest,
            "max_tokens": scale.work.length,
            "gpu_memory": 0.4,
            "max_num_seqs": 4 * scale.work.n,
        }
    ).sleeping()
    os.environ.update(config.process_environment)
    if scale.device == "cpu":
        os.environ["PYTHONPATH"] = as_plugin(tmp_path_factory.mktemp("plugins"))
    from actors.engine import Engine

    started = loop.run_until_complete(Engine.start(folder, prompter, config))
    yield started
    started.stop()


@pytest.fixture(scope="module")
def group(engine, scale):
    return scored_groups(engine.prompter, scale.work)[0].group


def sampled(engine, loop, group, scale):
    sampling = SamplingParams(n=scale.work.n, temperature=1.0, max_tokens=scale.work.length, seed=7)
    return loop.run_until_complete(engine.generate(group.sample.image(), group.sample.query, sampling))


def gap(samples, group, reasoner, scale):
    """Mean difference of log-probs between an engine's completions and the learner's forward."""
    policy = Policy(reasoner.model, temperature=1.0, forbidden=reasoner.vision_tokens).to(scale.device)
    tree = Branches(
        prefix=reasoner.encode(group.sample.query, reasoner.encode_image(group.sample.image())),
        branches=[torch.tensor(each.token_ids) for each in samples.completions],
    )
    assert tuple(tree.prefix.token_ids.tolist()) == samples.prompt_ids
    with torch.no_grad():
        own = policy(packed([tree], reasoner.model).to(scale.device)).logprobs.cpu().numpy()
    theirs = np.concatenate([each.logprobs for each in samples.completions])
    return float(np.abs(own - theirs).mean())


def test_an_engine_says_what_it_settled(engine, scale):
    print(engine.report)
    assert engine.report.dtype == scale.dtype and engine.report.max_num_seqs == 4 * scale.work.n
    assert engine.report.kv_tokens > scale.work.length and engine.report.concurrency >= 1
    assert engine.report.cuda_graphs == (scale.device == "cuda")


def test_engine_and_learner_agree_in_bfloat16(engine, loop, group, folder, scale):
    reasoner = load_reasoner(folder, device=scale.device, dtype=torch.bfloat16)
    found = gap(sampled(engine, loop, group, scale), group, reasoner, scale)
    print(f"mean difference of log-probs: {found:.4f} nats")
    assert found < BOUND


def test_new_weights_arrive_are_live_and_leave_no_stale_cache(engine, loop, group, folder, scale):
    """The prompt was answered before, so that a cache of its image or prefix would show: a model with the tower of
    before is farther from the engine than the bound."""
    reasoner = load_reasoner(folder, device=scale.device, dtype=torch.bfloat16)
    weights = dict(reasoner.model.named_parameters())
    tower = {name: parameter.clone() for name, parameter in weights.items() if "visual" in name}
    sampled(engine, loop, group, scale)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in weights.items():
            change = 2.0 if "visual" in name else 0.05
            parameter.add_(change * parameter.abs().mean() * torch.randn_like(parameter))

    async def buckets():
        yield pack(weights)

    receipt = loop.run_until_complete(engine.update_weights(buckets(), 1))
    assert receipt.checksum == checksum_of([weights]) and receipt.unlike == ()
    print(f"{receipt.compared} live parameters compared")
    if scale.device == "cuda":
        assert receipt.compared > 50, "on a GPU nothing is packed, so that matrices are compared too"
    samples = sampled(engine, loop, group, scale)
    assert {each.policy_version for each in samples.completions} == {1}
    found = gap(samples, group, reasoner, scale)
    with torch.no_grad():
        for name, before in tower.items():
            weights[name].copy_(before)
    stale = gap(samples, group, reasoner, scale)
    print(f"mean difference of log-probs: {found:.4f} nats, with the tower of before {stale:.4f}")
    assert found < BOUND < stale


def test_weights_of_this_process_s_gpu_arrive_in_the_engine_s_by_handles_of_their_memory(
    engine, loop, group, folder, scale
):
    """By vLLM's `ipc`, and then by host memory again; on a CPU by the stand-in."""
    reasoner = load_reasoner(folder, device=scale.device, dtype=torch.bfloat16)
    weights = dict(reasoner.model.named_parameters())
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in weights.values():
            parameter.add_(0.05 * parameter.abs().mean() * torch.randn_like(parameter))
    way = "ipc" if scale.device == "cuda" else "stand-in"
    for version in (2, 3):
        began = time.monotonic()
        receipt = loop.run_until_complete(sent_directly(engine, weights, way, version))
        print(f"{sum(each.nbytes for each in weights.values()) / 1e9:.1f} GB in {time.monotonic() - began:.2f} s")
        assert receipt.checksum == checksum_of([weights]) and receipt.unlike == () and receipt.compared > 0
    samples = sampled(engine, loop, group, scale)
    assert {each.policy_version for each in samples.completions} == {3}
    assert gap(samples, group, reasoner, scale) < BOUND

    async def buckets():
        yield pack(weights)

    assert loop.run_until_complete(engine.update_weights(buckets(), 4)) == receipt


def test_an_engine_that_slept_answers_as_before_with_its_weights_sent_again(engine, loop, folder, group, scale):
    """And while it sleeps, nearly all of its memory is another's: the weights' and the KV cache's."""
    reasoner = load_reasoner(folder, device=scale.device, dtype=torch.bfloat16)
    weights = dict(reasoner.model.named_parameters())

    async def buckets():
        yield pack(weights)

    loop.run_until_complete(engine.update_weights(buckets(), 5))
    before, awake = sampled(engine, loop, group, scale), in_use()
    loop.run_until_complete(engine.sleep())
    asleep = in_use()
    loop.run_until_complete(engine.wake_weights())
    half = in_use()
    receipt = loop.run_until_complete(engine.update_weights(buckets(), 6))
    assert receipt.checksum == checksum_of([weights]) and receipt.unlike == ()
    loop.run_until_complete(engine.wake())
    after = sampled(engine, loop, group, scale)
    print(f"GiB of the GPU in use: {awake:.1f} awake, {asleep:.1f} asleep, {half:.1f} with weights")
    if scale.device == "cuda":
        size = sum(each.nbytes for each in weights.values()) / 2**30
        assert asleep < awake - 0.6 * 0.4 * total() and asleep + 0.8 * size < half < awake
    assert {each.policy_version for each in after.completions} == {6}
    if scale.device == "cpu":  # on a GPU batches may be cut otherwise
        assert [each.token_ids for each in after.completions] == [each.token_ids for each in before.completions]
    assert gap(after, group, reasoner, scale) < BOUND


def in_use():
    """GiB of the GPU that all processes have; 0 on a CPU."""
    if not torch.cuda.is_available():
        return 0.0
    torch.cuda.empty_cache()
    free, whole = torch.cuda.mem_get_info()
    return (whole - free) / 2**30


def total():
    return torch.cuda.mem_get_info()[1] / 2**30


def test_the_expert_in_bfloat16_draws_the_masks_of_float32(scale, tmp_path):
    write_rows(tmp_path / "rows.parquet", rows(3, seed=3, modalities=["CT"], queries_per_image=1))
    here = SegmenterConfig(device=scale.device, dtype="bfloat16")
    experts = [load_frozen("tiny", config) for config in (SegmenterConfig(device="cpu"), here)]
    for sample in Dataset.open(tmp_path / "rows.parquet"):
        answer = parse_answer(format_answer(box=sample.box, points=sample.points, think="Here."))
        exact, rounded = (draw_masks(each, each.embed(sample.image()), [answer])[0][0] for each in experts)
        assert mask_dice(rounded, exact) > 0.9
