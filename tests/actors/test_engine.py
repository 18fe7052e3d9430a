"""An engine and its weight updates: who waits for whom, and what becomes of an engine whose update fails. With a
hand-written vLLM, which keeps a record; the real one is in tests/serving/test_reasoner.py."""

import asyncio
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from actors.config import RolloutConfig
from actors.engine import Engine, Question
from actors.failures import Broken
from actors.weight_files import pack
from reasoner.prompter import load_prompter
from tests.conftest import TINY_REASONER
from umrg.group import SamplingParams

GREEDY = SamplingParams(n=1, temperature=0.0, max_tokens=8)
IMAGE = np.zeros((56, 56, 3), dtype=np.uint8)
SECONDS = 30
"""Deadline of a wait."""


class Recorded:
    """vLLM's part. A request is sent once `sending` is set, and answered once `answering` is. gives_up: how many
    requests it gives up first."""

    def __init__(self, gives_up: int = 0) -> None:
        self.record: list[str] = []
        self.sending, self.answering = asyncio.Event(), asyncio.Event()
        self.sending.set()
        self.sent: Callable[[str], None] = lambda request: None
        self.version = "0"
        self._gives_up = gives_up

    async def generate(self, prompt: Any, parameters: Any, request_id: str) -> Any:
        self.record.append("asked")
        await self.sending.wait()
        self.sent(request_id)
        await self.answering.wait()
        if self._gives_up:
            self._gives_up -= 1
            yield output([], self.version, "error")
            return
        self.record.append("answered")
        yield output([16, 1012], self.version, "stop")

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        self.record.append(f"pause: {mode}")

    async def resume_generation(self) -> None:
        self.record.append("resume")

    async def start_weight_update(self) -> None:
        pass

    async def update_weights(self, request: Any) -> None:
        self.record.append("weights")

    async def finish_weight_update(self, *, weight_version: str | None = None) -> None:
        self.version = weight_version or self.version

    async def collective_rpc(self, method: str) -> list[tuple[str, int, list[str]]]:
        return [("checksum", 1, [])]

    async def check_health(self) -> None:
        pass

    async def sleep(self, *, level: int, mode: str) -> None:
        self.record.append(f"sleep: {level}, {mode}")

    async def wake_up(self, *, tags: list[str]) -> bool:
        self.record.append(f"wake: {', '.join(tags)}")
        return tags == ["kv_cache"]


def output(token_ids: list[int], version: str, reason: str) -> Any:
    completion = SimpleNamespace(
        index=0,
        token_ids=token_ids,
        logprobs=SimpleNamespace(logprobs=[0.0] * len(token_ids)),
        weight_versions=[SimpleNamespace(version=version, start=0, end=len(token_ids))],
        finish_reason=reason,
    )
    return SimpleNamespace(outputs=[completion], prompt_token_ids=[1, 2], num_cached_tokens=0, finished=True)


def engine(llm: Any) -> Engine:
    report: Any = None
    return Engine(llm, load_prompter(TINY_REASONER), RolloutConfig(), report)


async def buckets(count: int, error: Exception | None = None) -> Any:
    """So many buckets, and then an error."""
    for _ in range(count):
        yield pack({"a": torch.zeros(3)})
    if error:
        raise error


async def within_deadline(*tasks: Any) -> Sequence[Any]:
    return await asyncio.wait_for(asyncio.gather(*tasks), SECONDS)


async def seen(llm: Recorded, what: str) -> None:
    while what not in llm.record:
        await asyncio.sleep(0.01)


def test_an_update_that_waits_lets_a_request_pass_that_is_on_its_way_and_stops_later_ones():
    async def run():
        llm = Recorded()
        tried = engine(llm)
        first = asyncio.create_task(tried.generate(IMAGE, "Where?", GREEDY))
        await asyncio.wait_for(seen(llm, "asked"), SECONDS)
        update = asyncio.create_task(tried.update_weights(buckets(1), 1, mode="wait"))
        await asyncio.sleep(0)
        later = asyncio.create_task(tried.generate(IMAGE, "Where?", GREEDY))
        await asyncio.sleep(0.1)
        assert llm.record == ["asked"], "neither paused nor asked again"
        llm.answering.set()
        return llm.record, await within_deadline(first, update, later)

    record, (first, _, later) = asyncio.run(run())
    assert record == ["asked", "answered", "pause: wait", "weights", "resume", "asked", "answered"]
    assert [each.completions[0].policy_version for each in (first, later)] == [0, 1]


def test_training_s_update_waits_for_nobody():
    async def run():
        llm = Recorded()
        tried = engine(llm)
        first = asyncio.create_task(tried.generate(IMAGE, "Where?", GREEDY))
        await asyncio.wait_for(seen(llm, "asked"), SECONDS)
        await within_deadline(tried.update_weights(buckets(2), 1))
        llm.answering.set()
        await within_deadline(first)
        return llm.record

    assert asyncio.run(run()) == ["asked", "pause: keep", "weights", "weights", "resume", "answered"]


def test_whoever_is_on_the_way_when_an_update_begins_is_sent_before_caches_are_emptied_and_later_ones_after_it():
    """vLLM's notes of images would else name some that are gone. Neither waits for the end of the update."""

    async def run():
        llm = Recorded()
        llm.sending.clear()
        tried = engine(llm)
        first = asyncio.create_task(tried.generate(IMAGE, "Where?", GREEDY))
        await asyncio.wait_for(seen(llm, "asked"), SECONDS)
        update = asyncio.create_task(tried.begin_update("keep"))
        await asyncio.sleep(0)
        later = asyncio.create_task(tried.generate(IMAGE, "Where?", GREEDY))
        await asyncio.sleep(0.1)
        assert llm.record == ["asked"], "neither paused nor asked again"
        llm.sending.set()
        await within_deadline(update)
        await asyncio.wait_for(asked_twice(llm), SECONDS)
        await within_deadline(tried.receive({"path": "", "entries": [], "exact": False}), tried.end_update(1))
        llm.answering.set()
        await within_deadline(first, later)
        return llm.record

    assert asyncio.run(run()) == ["asked", "pause: keep", "asked", "weights", "resume", "answered", "answered"]


async def asked_twice(llm: Recorded) -> None:
    while llm.record.count("asked") < 2:
        await asyncio.sleep(0.01)


def test_a_completion_says_which_weights_wrote_which_of_its_tokens():
    spans = [SimpleNamespace(version="3", start=0, end=2), SimpleNamespace(version="4", start=2, end=7)]
    written: Any = output([16] * 7, "", "stop").outputs[0]
    tried = engine(Recorded())
    interrupted = tried._completion(SimpleNamespace(**{**vars(written), "weight_versions": spans}), [16] * 7, [0.0] * 7)
    assert interrupted.versions == ((3, 2), (4, 5)) and interrupted.policy_version == 3
    whole = tried._completion(SimpleNamespace(**{**vars(written), "weight_versions": spans[1:]}), [16] * 5, [0.0] * 5)
    assert whole.versions == () and whole.policy_version == 4


def test_an_update_that_is_given_up_leaves_an_engine_whole_or_mixed():
    async def run(*infos):
        llm = Recorded()
        llm.answering.set()
        tried = engine(llm)
        await tried.begin_update("keep")
        with pytest.raises(RuntimeError, match="while another is under way"):
            await tried.begin_update("keep")
        for info in infos:
            await tried.receive(info)
        await tried.abandon_update()
        await tried.abandon_update()  # as whoever does not know whether one has begun
        return await within_deadline(tried.generate(IMAGE, "Where?", GREEDY))

    asyncio.run(run())
    with pytest.raises(Broken, match="weights of two versions"):
        asyncio.run(run({"direct": ""}))


@pytest.mark.parametrize("mode", ["keep", "wait"])
def test_an_engine_of_two_versions_answers_nobody_who_waited_for_it_or_comes_later(mode):
    async def run():
        llm = Recorded()
        llm.answering.set()
        tried = engine(llm)
        with pytest.raises(OSError, match="the disk is gone"):
            await tried.update_weights(buckets(1, OSError("the disk is gone")), 1, mode=mode)
        with pytest.raises(Broken, match="weights of two versions"):
            await tried.check_health()
        with pytest.raises(Broken, match="weights of two versions"):
            await within_deadline(tried.generate(IMAGE, "Where?", GREEDY))
        with pytest.raises(Broken, match="weights of two versions"):
            await anext(tried.stream(Question(image=IMAGE, text="Where?"), GREEDY))
        return llm.record

    assert asyncio.run(run()) == [f"pause: {mode}", "weights", "resume"]


def test_whoever_checks_the_receipt_does_so_before_anybody_is_answered():
    async def run():
        llm = Recorded()
        tried = engine(llm)

        def check(receipt):
            assert receipt.checksum == "checksum" and llm.record[-1] == "weights"
            raise RuntimeError("not what was sent")

        with pytest.raises(RuntimeError, match="not what was sent"):
            await tried.update_weights(buckets(1), 1, mode="wait", check=check)
        with pytest.raises(Broken):
            await tried.check_health()

    asyncio.run(run())


def test_an_update_that_fails_before_a_weight_was_replaced_does_no_harm():
    async def run():
        llm = Recorded()
        llm.answering.set()
        tried = engine(llm)
        with pytest.raises(OSError, match="not there"):
            await tried.update_weights(buckets(0, OSError("not there")), 1, mode="wait")
        await tried.check_health()
        return await within_deadline(tried.generate(IMAGE, "Where?", GREEDY))

    (answer,) = asyncio.run(run())
    assert answer.completions[0].policy_version == 0


def test_a_request_that_vllm_gives_up_is_asked_once_more():
    async def run(gives_up):
        llm = Recorded(gives_up)
        llm.answering.set()
        return await within_deadline(engine(llm).generate(IMAGE, "Where?", GREEDY))

    (answer,) = asyncio.run(run(1))
    assert answer.completions[0].finished
    with pytest.raises(RuntimeError, match="vLLM has given a request up"):
        asyncio.run(run(2))


def test_an_engine_that_sleeps_lets_nobody_in_until_it_has_all_its_memory_and_weights():
    async def run():
        llm = Recorded()
        llm.answering.set()
        tried = engine(llm)
        await within_deadline(tried.sleep())
        later = asyncio.create_task(tried.generate(IMAGE, "Where?", GREEDY))
        await within_deadline(tried.wake_weights())
        await within_deadline(tried.update_weights(buckets(1), 1))
        assert "asked" not in llm.record
        await within_deadline(tried.wake())
        return llm.record, *await within_deadline(later)

    record, answer = asyncio.run(run())
    updated = ["pause: keep", "weights", "resume"]
    assert record == ["sleep: 2, wait", "wake: weights", *updated, "wake: kv_cache", "asked", "answered"]
    assert answer.completions[0].policy_version == 1


def test_an_engine_sleeps_again_where_its_waking_was_broken_off():
    """As when the learner dies before its weights were sent."""

    async def run():
        llm = Recorded()
        llm.answering.set()
        tried = engine(llm)
        await within_deadline(tried.sleep())
        await within_deadline(tried.wake_weights())
        await within_deadline(tried.sleep())
        await within_deadline(tried.wake_weights())
        await within_deadline(tried.wake())
        await within_deadline(tried.generate(IMAGE, "Where?", GREEDY))
        return llm.record

    assert asyncio.run(run())[-3:] == ["wake: kv_cache", "asked", "answered"]
