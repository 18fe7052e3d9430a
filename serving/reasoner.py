"""The reasoner's replica: a vLLM engine that answers questions, streams, and takes newer weights while it does so."""

import asyncio
import json
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import NonNegativeInt
from transformers import AutoConfig

from actors.engine_report import UpdateReceipt
from actors.failures import Broken
from reasoner.prompter import Prompter, load_prompter
from serving.config import ServeConfig
from serving.messages import Ask, Unavailable
from umrg.config import Config, ModelFolder
from umrg.frames import Size
from umrg.group import GroupSamples, SamplingParams
from umrg.mistake import Mistake
from umrg.prompts import PromptSpec
from umrg.reasoner_folder import read_object

if TYPE_CHECKING:
    from actors.engine import Engine, Question

_SECONDS = 1.0
"""Between two looks at the engine, and between the sight of a dead one and the end of the process, within which those
who wait for an answer are told."""

_SIDES = (56, 280, 504)
"""Of the images that the replica warms up with, in pixels."""


class Weights(Config):
    """Which weights a replica answers with: the `user_config` of its deployment."""

    model: ModelFolder
    """Folder of a model of the shape, with the processor and the prompt, of the one that the service was started
    with."""
    policy_version: NonNegativeInt = 0
    """The training step of its weights, for the answers to tell."""
    written: NonNegativeInt = 0
    """When its weights were written last: Serve hands on only what has changed, and a folder may be written anew."""


class WeightsDiffer(RuntimeError):
    """An engine does not hold the weights that it was sent."""


class Reasoner:
    """Answers questions with one engine, in a process that was started with `RolloutConfig.process_environment`.

    A replica whose engine has died, or holds the weights of two versions because an update failed half way, answers
    `Unavailable` and ends its process within seconds, so that Serve replaces it without waiting for failed checks.
    """

    def __init__(self, config: ServeConfig, engine: "Engine", end: Callable[[], None] = lambda: os._exit(1)) -> None:
        """engine: of the configuration's model, with its prompt. end: ends this process."""
        self._config, self.engine, self._end = config, engine, end
        self._weights = Weights(model=config.model)
        self._configured = False
        self._changing = asyncio.Lock()
        self._watching = asyncio.create_task(self._watch())

    @classmethod
    async def start(cls, config: ServeConfig, end: Callable[[], None] = lambda: os._exit(1)) -> Self:
        """Load the model and warm up. Raises ValueError if the folder holds no model, or if a CPU's cache is too
        small."""
        from actors.engine import Engine
        from actors.threads import share_cores

        share_cores(config.rollout.threads, config.rollout.actors)
        prompter = load_prompter(config.model, config.spec())
        reasoner = cls(config, await Engine.start(config.model, prompter, config.rollout), end)
        await reasoner._warm_up()
        return reasoner

    async def sample(self, image_id: str, pixels: NDArray[np.uint8], ask: Ask) -> GroupSamples:
        """The completions to a question about an image uint8 [H, W, 3]. Raises ValueError for a prompt or a completion
        that would be too long, or that the chat template does not take, and Unavailable if the engine has died."""
        question = self._question(image_id, pixels, ask)
        async with self._alive():
            return await self.engine.answer(question, ask.sampling)

    async def stream(
        self, image_id: str, pixels: NDArray[np.uint8], ask: Ask
    ) -> AsyncGenerator[str | GroupSamples, None]:
        """The pieces of one completion as it is written, and at last the whole as `sample` returns it. Closing the
        generator ends the request. Raises as `sample` does."""
        question = self._question(image_id, pixels, ask)
        if ask.sampling.n != 1:
            raise Mistake(f"one answer can be streamed, and {ask.sampling.n} are asked for; ask for one")
        async with self._alive():
            pieces = self.engine.stream(question, ask.sampling)
            try:
                async for piece in pieces:
                    yield piece
            finally:
                await pieces.aclose()

    async def check_health(self) -> None:
        """Raises Unavailable if the engine cannot answer any more."""
        async with self._alive():
            await self.engine.check_health()

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take over the weights that a deployment's `user_config` names (`Weights`); those that are here already are
        not loaded again. Requests in flight end with the weights that they began with, later ones wait, and none is
        refused. Raises ValueError, and goes on with the weights of before, if the folder holds no model of this
        service's shape, and WeightsDiffer if other weights arrive than were sent."""
        wanted = Weights.model_validate(user_config)
        async with self._changing:
            here = wanted.model.resolve() == self._weights.model.resolve()
            # Of another version or time, the folder was written anew, unless they are told for the first time.
            if here and not self._configured:
                await self.engine.set_version(wanted.policy_version)
            elif wanted != self._weights:
                await self._load(wanted)
            self._weights, self._configured = wanted, True

    def stop(self) -> None:
        """End the engine's processes."""
        self._watching.cancel()
        self.engine.stop()

    async def _load(self, wanted: Weights) -> None:
        from actors.weight_files import FolderWeights

        await asyncio.to_thread(refuse_other_shape, self._config, self.engine.prompter, wanted.model)
        weights = FolderWeights(wanted.model)

        def check(receipt: UpdateReceipt) -> None:
            if receipt.checksum != weights.checksum():
                raise WeightsDiffer(f"the weights of {wanted.model} arrived with another checksum than they were read")
            if receipt.unlike:
                raise WeightsDiffer(f"after the update {receipt.unlike[0]} holds other weights than were sent")

        async with self._alive():
            await self.engine.update_weights(weights.buckets(), wanted.policy_version, mode="wait", check=check)

    def _question(self, image_id: str, pixels: NDArray[np.uint8], ask: Ask) -> "Question":
        from actors.engine import Question

        if ask.sampling.max_tokens > (most := self._config.rollout.max_tokens):
            raise Mistake(f"{ask.sampling.max_tokens} tokens are more than an answer may have; ask for at most {most}")
        return Question(image=pixels, text=ask.text, think=ask.think, raw=ask.raw, system=ask.system, image_id=image_id)

    @asynccontextmanager
    async def _alive(self) -> AsyncIterator[None]:
        """Raises Unavailable where the engine cannot answer any more."""
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        gone = "the engine that was asked has died or holds no whole weights any more"
        try:
            yield
        except (EngineDeadError, Broken):
            raise Unavailable(gone) from None
        except EngineGenerateError:
            # What a request meets while the engine dies is not always told apart from a fault of the request's own.
            try:
                await self.engine.check_health()
            except EngineDeadError:
                raise Unavailable(gone) from None
            raise

    async def _watch(self) -> None:
        """End the process once the engine cannot answer any more."""
        while True:
            await asyncio.sleep(_SECONDS)
            try:
                await self.check_health()
            except Unavailable:
                await asyncio.sleep(_SECONDS)
                self._end()
                return

    async def _warm_up(self) -> None:
        """Answer until each path has been taken more than once: images of several sizes, one and several completions,
        greedy and sampled, whole and in pieces. Caches of the processor and of kernels are filled by it."""
        room = self._config.rollout.max_prompt_tokens - self.engine.prompter.prompt_tokens("?", Size(56, 56))
        sides = [side for side in _SIDES if self.engine.prompter.image_tokens(Size(side, side)) <= room]
        tokens = min(4, self._config.rollout.max_tokens)
        one = SamplingParams(n=1, temperature=0.0, max_tokens=tokens)
        several = SamplingParams(n=2, temperature=1.0, max_tokens=tokens, seed=0)
        for i in range(2):
            for side in sides:
                name, image = f"warm-{side}-{i}", np.full((side, side, 3), i, dtype=np.uint8)
                for sampling in (one, several):
                    await self.sample(name, image, Ask(text="?", sampling=sampling))
                async for _ in self.stream(name, image, Ask(text="?", sampling=one)):
                    pass


def refuse_other_shape(config: ServeConfig, served: Prompter, folder: Path) -> None:
    """Raise ValueError unless a folder differs in nothing but its weights from the one that a service was started with.
    config, served: of that service."""
    found = load_prompter(folder, config.asked(PromptSpec.of_model(folder)))
    before, now = (_told_apart_by(*each) for each in ((config.model, served), (folder, found)))
    if others := [name for name in before if before[name] != now[name]]:
        raise Mistake(
            f"{folder} has another {' and '.join(others)} than the model that is served; restart the service for it"
        )


def _told_apart_by(folder: Path, prompter: Prompter) -> dict[str, object]:
    """What two folders must have in common for one to take the other's place in a running engine."""
    tokenizer = json.loads(prompter.processor.tokenizer.backend_tokenizer.to_str())
    ends = folder / "generation_config.json"
    return {
        "architecture": _without(AutoConfig.from_pretrained(folder).to_dict(), _NO_SHAPE),
        "chat template": prompter.processor.chat_template,
        "prompt": prompter.prompt,
        "image processor": _without(prompter.processor.image_processor.to_dict(), _NO_SHAPE),
        "tokenizer": _without(tokenizer, {"truncation", "padding"}) | {"end": prompter.end_token_id},
        "end of answers": read_object(ends).get("eos_token_id") if ends.exists() else None,
    }


_NO_SHAPE = {"dtype", "torch_dtype", "transformers_version", "_name_or_path", "use_cache", "name_or_path"}
"""Keys that say how a folder was written, not what is in it."""


def _without(tree: Any, keys: set[str]) -> Any:
    """A JSON tree without some of its keys, wherever they are."""
    if isinstance(tree, dict):
        return {name: _without(value, keys) for name, value in tree.items() if name not in keys}
    return tree
