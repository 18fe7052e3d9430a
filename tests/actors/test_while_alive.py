"""A call to an engine that dies meanwhile, or that loses what it was to fetch."""

import asyncio
from typing import Any

import pytest
from ray.exceptions import ObjectLostError

from actors.failures import Broken
from actors.rollout import Rollout, while_alive


class Engine:
    """Answers no call; it is found dead at the third look."""

    def __init__(self):
        self.looks, self.left = 0, False

    async def call(self):
        try:
            await asyncio.Event().wait()
        finally:
            self.left = True

    async def check(self):
        self.looks += 1
        if self.looks == 3:
            raise RuntimeError("dead")


def test_a_call_ends_with_the_engine_that_it_waits_for():
    engine = Engine()

    async def awaited():
        with pytest.raises(RuntimeError, match="dead"):
            await while_alive(engine.call(), engine.check, every=0.001)
        await asyncio.sleep(0)

    asyncio.run(awaited())
    assert engine.left, "what the call holds is let go"


def test_a_call_that_is_answered_returns_and_raises_as_it_would_alone():
    async def seven():
        return 7

    async def wrong():
        raise ValueError("wrong")

    assert asyncio.run(while_alive(seven(), Engine().check)) == 7
    with pytest.raises(ValueError, match="wrong"):
        asyncio.run(while_alive(wrong(), Engine().check))


class Taking:
    """An engine that replaces its weights bucket by bucket."""

    def __init__(self):
        self.replaced = 0

    async def update_weights(self, buckets, version):
        async for _ in buckets:
            self.replaced += 1

    async def check_health(self):
        if self.replaced:
            raise Broken("it holds weights of two versions")


@pytest.mark.parametrize(("there", "error"), [(0, ObjectLostError), (1, Broken)])
def test_an_engine_stays_whole_where_the_first_of_its_new_weights_was_lost_already(there, error):
    """And counts as dead where a later one was, for it holds parts of two versions."""

    async def bucket(number):
        if number >= there:
            raise ObjectLostError("a0", None, "")

    rollout: Any = object.__new__(Rollout)
    rollout._engine = Taking()
    with pytest.raises(error):
        asyncio.run(rollout.update_weights(1, [bucket(number) for number in range(there + 1)]))
