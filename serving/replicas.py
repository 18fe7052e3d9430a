"""The two models as Ray Serve runs them: what they raise leaves without its words (`serving.privacy`), and what they do
is counted (`serving.metrics`)."""

from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager

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


class ReasonerReplica(Reasoner):
    """The deployment `Reasoner`."""

    async def __init__(self, config: ServeConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        log_discreetly()
        self._metrics = Metrics("Reasoner")
        await super().__init__(config)

    async def sample(self, image_id: str, pixels: NDArray[np.uint8], ask: Ask) -> GroupSamples:
        with sealed(), self._metrics.under_way():
            return await super().sample(image_id, pixels, ask)

    async def stream(
        self, image_id: str, pixels: NDArray[np.uint8], ask: Ask
    ) -> AsyncGenerator[str | GroupSamples, None]:
        pieces = super().stream(image_id, pixels, ask)
        try:
            with sealed(), self._metrics.under_way():
                async for piece in pieces:
                    yield piece
        finally:
            await pieces.aclose()


class SegmenterReplica(Segmenter):
    """The deployment `Segmenter`."""

    def __init__(self, config: ServeConfig) -> None:
        log_discreetly()
        self._metrics, self._hits, self._misses = Metrics("Segmenter"), 0, 0
        super().__init__(config)

    async def embed(self, image_id: str, pixels: NDArray[np.uint8]) -> None:
        with self._counted():
            await super().embed(image_id, pixels)

    async def draw(self, image_id: str, pixels: NDArray[np.uint8], answers: Sequence[Answer]) -> Drawn | None:
        with self._counted():
            return await super().draw(image_id, pixels, answers)

    async def segment(self, image_id: str, pixels: NDArray[np.uint8] | None, prompt: Prompt) -> Drawn:
        with self._counted():
            return await super().segment(image_id, pixels, prompt)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        try:
            with sealed(), self._metrics.under_way():
                yield
        finally:
            stats = self.stats()
            self._metrics.looked_up("embeddings", hits=stats.hits - self._hits, misses=stats.misses - self._misses)
            self._hits, self._misses = stats.hits, stats.misses
