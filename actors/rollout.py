"""The rollout actor: a vLLM engine that turns groups into sampled answers."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from ray.exceptions import ObjectLostError

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
        """Take over weights of a version. buckets: references, of which one at a time is fetched and released. Where
        one is lost, raises ObjectLostError if the engine holds what it held, and Broken if it holds parts of both."""
        try:
            return await self._awaited(lambda engine: engine.update_weights(_fetched(buckets), version))
        except ObjectLostError:
            with _engine_alive():
                await self._running().check_health()
            raise

    async def connect(self, direct: str | None, arguments: Mapping[str, Any]) -> None:
        """Take weights directly from the learner's process too; a collective with it. Of this call and those of an
        update (`actors.weight_sender`) more is said in `Engine`."""
        await self._awaited(lambda engine: engine.connect(direct, arguments))

    async def begin_update(self, mode: Literal["keep", "wait"]) -> None:
        """Begin to take weights that are sent directly."""
        await self._awaited(lambda engine: engine.begin_update(mode))

    async def receive(self, info: Mapping[str, Any]) -> None:
        """Take some of them."""
        await self._awaited(lambda engine: engine.receive(info))

    async def end_update(self, version: int) -> UpdateReceipt:
        """They are all there, and of this version."""
        return await self._awaited(lambda engine: engine.end_update(version))

    async def abandon_update(self) -> None:
        """End an update that failed, if one has begun. Raises Broken if weights were replaced."""
        await self._awaited(lambda engine: engine.abandon_update())
        with _engine_alive():
            await self._running().check_health()

    async def stop(self) -> None:
        """End the engine's processes."""
        if self._engine is not None:
            self._engine.stop()
            self._engine = None

    async def _awaited(self, call: "Callable[[Engine], Coroutine[None, None, T]]") -> T:
        """What a call of the engine returns. Raises Broken if the engine dies meanwhile."""
        engine = self._running()
        with _engine_alive():
            return await while_alive(call(engine), engine.check_health)

    def _running(self) -> "Engine":
        assert self._engine is not None, "the rollout was not started"
        return self._engine

    async def sleep(self) -> None:
        """Give the GPU to a rank of the learner, as `Engine.sleep`."""
        await self._awaited(lambda engine: engine.sleep())

    async def wake_weights(self) -> None:
        """Take the memory of the weights back, which must then all be sent."""
        await self._awaited(lambda engine: engine.wake_weights())

    async def wake(self) -> None:
        """Go on sampling."""
        await self._awaited(lambda engine: engine.wake())


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
