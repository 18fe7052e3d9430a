"""A call to an engine that dies meanwhile."""

import asyncio

import pytest

from actors.rollout import while_alive


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
