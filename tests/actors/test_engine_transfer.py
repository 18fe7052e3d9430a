"""The real engine on a CPU: weights that are sent directly, and updates while images are in flight."""

import asyncio
import os
from dataclasses import asdict

import numpy as np
import pytest
import torch

from actors.config import RolloutConfig
from actors.engine import Engine
from actors.weight_files import checksum_of, pack
from reasoner.model import load_reasoner
from reasoner.prompter import load_prompter
from tests.conftest import TINY_REASONER
from tests.direct_sender import as_plugin, sent_directly
from umrg.group import SamplingParams

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

SECONDS = 240
"""Deadline of a wait."""
GREEDY = SamplingParams(n=1, temperature=0.0, max_tokens=64)


@pytest.fixture(scope="module")
def run():
    loop = asyncio.new_event_loop()
    yield lambda coroutine: loop.run_until_complete(asyncio.wait_for(coroutine, SECONDS))
    left = asyncio.all_tasks(loop)
    for task in left:
        task.cancel()
    if left:
        loop.run_until_complete(asyncio.wait(left))
    loop.close()


@pytest.fixture(scope="module")
def engine(run, tmp_path_factory):
    """One in whose processes the stand-in is registered, as one of vLLM's plugins."""
    config = RolloutConfig(max_tokens=256, threads=1, max_num_seqs=16)
    before = dict(os.environ)
    os.environ.update(config.process_environment, PYTHONPATH=as_plugin(tmp_path_factory.mktemp("plugins")))
    made = run(Engine.start(TINY_REASONER, load_prompter(TINY_REASONER), config))
    yield made
    made.stop()
    os.environ.clear()
    os.environ.update(before)


def changed(seed):
    """The tiny reasoner's weights, all of them moved a little."""
    torch.manual_seed(seed)
    model = load_reasoner(TINY_REASONER).model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * parameter.abs().mean() * torch.randn_like(parameter))
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


async def put(engine, weights, version):
    """The receipt of weights by way of host memory, in three buckets."""
    names = list(weights)

    async def buckets():
        for i in range(3):
            yield pack({name: weights[name] for name in names[i::3]})

    return await engine.update_weights(buckets(), version)


def picture(seed):
    return np.random.default_rng(seed).integers(0, 256, (112, 112, 3), dtype=np.uint8)


async def said(engine):
    (completion,) = (await engine.generate(picture(0), "Where?", GREEDY)).completions
    return completion.token_ids, completion.logprobs


def test_an_engine_takes_weights_directly_and_by_host_memory_as_it_comes(engine, run):
    """With the same checksum, the same live parameters compared, and the same answer afterwards."""
    weights, other = changed(1), changed(2)
    first = run(put(engine, weights, 1))
    expected = run(said(engine))
    run(put(engine, other, 2))
    assert run(said(engine)) != expected
    directly = run(sent_directly(engine, weights, "stand-in", 3))
    assert asdict(directly) == asdict(first) and directly.checksum == checksum_of([weights])
    assert directly.compared > 0 and directly.unlike == ()
    assert run(said(engine)) == expected
    assert asdict(run(put(engine, other, 4))).keys() == asdict(first).keys()
    assert asdict(run(put(engine, weights, 5))) == asdict(first)
    assert run(said(engine)) == expected


def test_updates_while_images_are_in_flight_lose_no_group_and_say_which_weights_wrote_which_tokens(engine, run):
    """Old images, new ones and the same one again, asked about while three updates come."""
    weights = [changed(seed) for seed in (3, 4, 5)]

    async def under_load():
        async def ask(i):
            sampling = SamplingParams(n=4, temperature=1.5, max_tokens=96, seed=100 * i)
            await asyncio.sleep(i * 0.05)
            return await engine.generate(picture(i % 7), "Where is it?", sampling)

        asked = [asyncio.create_task(ask(i)) for i in range(48)]
        for version, each in enumerate(weights, 10):
            await asyncio.sleep(0.7)
            await put(engine, each, version)
        return await asyncio.gather(*asked)

    groups = run(under_load())
    completions = [completion for group in groups for completion in group.completions]
    assert len(completions) == 48 * 4
    interrupted = [each for each in completions if each.versions]
    assert interrupted, "no completion was in flight during an update"
    for each in interrupted:
        versions = [version for version, _ in each.versions]
        assert sum(tokens for _, tokens in each.versions) == len(each.token_ids)
        assert versions == sorted(set(versions)) and each.policy_version == versions[0]
    assert max(each.policy_version for each in completions) == 12
