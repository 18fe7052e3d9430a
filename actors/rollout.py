"""The rollout actor: a vLLM engine that turns groups into sampled answers."""

from pathlib import Path
from typing import TYPE_CHECKING

from actors.config import RolloutConfig
from actors.threads import share_cores
from learner.reasoner import load_prompter
from umrg.group import Group, GroupSamples
from umrg.prompts import PromptSpec

if TYPE_CHECKING:
    from actors.engine import Engine


class Rollout:
    """Runs in a process of its own, whose environment has `engine_environment`. `start` must have returned before
    anything else is called."""

    def __init__(self, model: Path, config: RolloutConfig, spec: PromptSpec) -> None:
        self._model, self._config, self._spec = model, config, spec
        self._engine: Engine | None = None

    async def start(self) -> None:
        """Load the engine. Raises ValueError where the folder is no model."""
        share_cores(self._config.threads, self._config.actors)
        prompter = load_prompter(self._model, self._spec)
        from actors.engine import Engine

        self._engine = await Engine.start(self._model, prompter, self._config)

    async def sample(self, group: Group, *, n: int, temperature: float, max_tokens: int, run_seed: int) -> GroupSamples:
        """n answers to a group's prompt. The group's seed makes them the same whichever actor draws them. Raises
        ValueError, with the row's name, for a prompt that is too long."""
        from actors.engine import Sampling

        sampling = Sampling(n=n, temperature=temperature, max_tokens=max_tokens, seed=group.seed(run_seed, 0))
        engine = self._running()
        try:
            generated = await engine.generate(group.sample.image(), group.sample.query, sampling)
        except ValueError as error:
            raise ValueError(f"{group.sample.name}: {error}") from error
        return GroupSamples(
            group=group.id,
            prompt_ids=generated.prompt_ids,
            frames=engine.prompter.frames(group.sample.size),
            completions=generated.completions,
            cached=generated.cached,
        )

    async def update_weights(self, version: int, *buckets: bytes) -> str:
        """Take weights of a version; digest of the tensors that arrived."""
        return await self._running().update_weights(buckets, version)

    async def stop(self) -> None:
        """End the engine's processes."""
        if self._engine is not None:
            self._engine.stop()
            self._engine = None

    def _running(self) -> "Engine":
        assert self._engine is not None, "the rollout was not started"
        return self._engine
