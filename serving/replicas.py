"""The two models as Ray Serve runs them: what they raise leaves without its words (`serving.privacy`), and what they do
is counted (`serving.metrics`)."""

from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.config import ServeConfig
from serving.messages import Ask, Drawn, Prompt
from serving.metrics import Metrics
from serving.privacy import log_discreetly, sealed
from serving.reasoner import Reasoner
from serving.segmenter import Segmenter
from umrg.answers import Answer
from umrg.group import GroupSamples


class ReasonerReplica:
    """The deployment `Reasoner`. Methods are those of `serving.reasoner.Reasoner`."""

    async def __init__(self, config: ServeConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        log_discreetly()
        self._metrics = Metrics("Reasoner")
        self._reasoner = await Reasoner.start(config)

    async def sample(self, image_id: str, pixels: NDArray[np.uint8], ask: Ask) -> GroupSamples:
        with sealed(), self._metrics.under_way():
            return await self._reasoner.sample(image_id, pixels, ask)

    async def stream(
        self, image_id: str, pixels: NDArray[np.uint8], ask: Ask
    ) -> AsyncGenerator[str | GroupSamples, None]:
        with sealed(), self._metrics.under_way():
            async with aclosing(self._reasoner.stream(image_id, pixels, ask)) as pieces:
                async for piece in pieces:
                    yield piece

    async def check_health(self) -> None:
        await self._reasoner.check_health()

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        await self._reasoner.reconfigure(user_config)

    def __del__(self) -> None:
        """Serve calls it before it ends the process."""
        if reasoner := getattr(self, "_reasoner", None):
            reasoner.stop()


class SegmenterReplica:
    """The deployment `Segmenter`. Methods are those of `serving.segmenter.Segmenter`."""

    def __init__(self, config: ServeConfig) -> None:
        log_discreetly()
        self._metrics, self._hits, self._misses = Metrics("Segmenter"), 0, 0
        self._segmenter = Segmenter(config)

    async def embed(self, image_id: str, pixels: NDArray[np.uint8]) -> None:
        with self._counted():
            await self._segmenter.embed(image_id, pixels)

    async def draw(self, image_id: str, pixels: NDArray[np.uint8], answers: Sequence[Answer]) -> Drawn | None:
        with self._counted():
            return await self._segmenter.draw(image_id, pixels, answers)

    async def segment(self, image_id: str, pixels: NDArray[np.uint8] | None, prompt: Prompt) -> Drawn:
        with self._counted():
            return await self._segmenter.segment(image_id, pixels, prompt)

    async def check_health(self) -> None:
        await self._segmenter.check_health()

    @contextmanager
    def _counted(self) -> Iterator[None]:
        try:
            with sealed(), self._metrics.under_way():
                yield
        finally:
            stats = self._segmenter.stats()
            self._metrics.looked_up("embeddings", hits=stats.hits - self._hits, misses=stats.misses - self._misses)
            self._hits, self._misses = stats.hits, stats.misses
