"""The rollout actor: a vLLM engine that turns groups into sampled answers."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from actors.config import RolloutConfig
from actors.engine_report import EngineReport, UpdateReceipt
from actors.failures import Broken
from actors.gpus import ALONE, Lodging, Place, this_place
from actors.threads import share_cores
from actors.weight_files import Bucket
from reasoner.prompter import load_prompter
from umrg.group import Group, GroupSamples, SamplingParams
from umrg.mistake import Mistake
from umrg.prompts import PromptSpec

if TYPE_CHECKING:
    import ray

    from actors.engine import Engine


T = TypeVar("T")
LOOKED_AT_S = 1.0
"""Seconds between two looks at whether the engine's processes live, while one of its own calls is awaited."""


class Rollout:
    """Runs in a process of its own, started with `RolloutConfig.process_environment`. `start` must have returned before
    any other method is called."""

    def __init__(self, model: Path, config: RolloutConfig, spec: PromptSpec) -> None:
        self._model, self._config, self._spec = model, config, spec
        self._engine: Engine | None = None

    async def place(self) -> Place:
        """Where it is; may be called before `start`."""
        return this_place({"model": self._model})

    async def start(self, lodging: Lodging = ALONE) -> EngineReport:
        """Load the engine; what it says of itself. Raises ValueError if the folder holds no model."""
        share_cores(self._config.threads, lodging.sharers)
        model = lodging.local(self._model)
        prompter = load_prompter(model, self._spec)
        from actors.engine import Engine

        self._engine = await Engine.start(model, prompter, self._config)
        return self._engine.report

    async def sample(self, group: Group, sampling: SamplingParams) -> GroupSamples:
        """Sample the completions of a group's prompt. Seeded by the group, they are the same on any actor. Raises
        ValueError, with the row's name, for a prompt that is too long."""
        sample = group.sample
        try:
            with _engine_alive():
                return await self._running().generate(sample.image(), sample.query, group.seeded(sampling))
        except Mistake as error:
            raise Mistake(f"{sample.name}: {error}") from error

    async def sampled(self, group: Group, sampling: SamplingParams) -> tuple[float, GroupSamples]:
        """`sample`, and before it what the driver is told: the seconds that it took."""
        began = time.monotonic()
        samples = await self.sample(group, sampling)
        return time.monotonic() - began, samples

    async def update_weights(self, version: int, buckets: "Sequence[ray.ObjectRef[Bucket]]") -> UpdateReceipt:
        """Take over weights of a version. buckets: references, of which one at a time is fetched and released."""
        with _engine_alive():
            engine = self._running()
            return await while_alive(engine.update_weights(_fetched(buckets), version), engine.check_health)

    async def stop(self) -> None:
        """End the engine's processes."""
        if self._engine is not None:
            self._engine.stop()
            self._engine = None

    def _running(self) -> "Engine":
        assert self._engine is not None, "the rollout was not started"
        return self._engine


@contextmanager
def _engine_alive() -> Iterator[None]:
    """Raises Broken where the engine's processes have died."""
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except EngineDeadError as error:
        raise Broken(f"its engine has died: {error}") from None


async def while_alive(
    call: Coroutine[None, None, T], check: Callable[[], Awaitable[None]], *, every: float = LOOKED_AT_S
) -> T:
    """What a call of the engine returns. vLLM fails the requests of an engine that dies, and leaves its other calls, of
    which an update of weights consists, without an answer for ever. check: raises if the engine has died."""
    task = asyncio.ensure_future(call)
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=every)
            if not task.done():
                await check()
    finally:
        task.cancel()
    return task.result()


async def _fetched(buckets: "Sequence[ray.ObjectRef[Bucket]]") -> AsyncIterator[Bucket]:
    for ref in buckets:
        yield await ref
