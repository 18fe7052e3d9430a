"""Embeddings of images for the segmenter's replica: each is made once, however many ask for it, and kept as long as
there is room.

Nothing here imports torch, and all of it is called from one event loop.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from actors.experts.cache import EmbeddingCache

if TYPE_CHECKING:
    from actors.experts.protocol import Embedding

EmbedAll = Callable[[Sequence[NDArray[np.uint8]]], "asyncio.Future[Sequence[Embedding]]"]
"""Begins to embed images, each uint8 [H, W, 3]; their embeddings, in the same order."""


class Embeddings:
    """Embeddings by the image's id, from the cache or from the expert.

    Requests for the same image share one embedding. Images that arrive while the expert is busy with others wait, and
    are then embedded together, `at_once` of them; none waits for others to arrive. (`serve.batch` closes a batch when
    its first item arrives, even if an earlier one is still being worked on, so that without a wait it gathers nothing.)
    """

    def __init__(self, embed_all: EmbedAll, cache: EmbeddingCache, *, at_once: int) -> None:
        self._embed_all, self._cache, self._at_once = embed_all, cache, at_once
        self._flights: dict[str, asyncio.Future[Embedding]] = {}
        self._waiting: list[tuple[str, NDArray[np.uint8]]] = []
        self._encoding: asyncio.Task[None] | None = None
        self.embedded = 0
        """Images that the expert embedded."""

    async def of(self, image_id: str, pixels: NDArray[np.uint8]) -> "Embedding":
        """The embedding of an image, uint8 [H, W, 3]. Raises what the expert raised."""
        found = await self.kept(image_id)
        if found is not None:
            return found
        flight = self._flights[image_id] = asyncio.get_running_loop().create_future()
        self._waiting.append((image_id, pixels))
        if self._encoding is None or self._encoding.done():
            self._encoding = asyncio.create_task(self._encode())
        # A client that goes away takes nothing from the others that wait for the same image.
        return await asyncio.shield(flight)

    async def kept(self, image_id: str) -> "Embedding | None":
        """The embedding of an image that was embedded before, or is being embedded; None if there is none."""
        embedding = self._cache.get(image_id)
        if embedding is None and (flight := self._flights.get(image_id)) is not None:
            return await asyncio.shield(flight)
        return embedding

    async def _encode(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[: self._at_once], self._waiting[self._at_once :]
            work = self._embed_all([pixels for _, pixels in batch])
            await asyncio.wait([work])
            self._land([image_id for image_id, _ in batch], work)

    def _land(self, image_ids: Sequence[str], work: "asyncio.Future[Sequence[Embedding]]") -> None:
        """Keep what has come of some images, and hand it to all who wait for it."""
        flights = [self._flights.pop(image_id) for image_id in image_ids]
        if work.cancelled():  # the thread was closed
            for flight in flights:
                flight.cancel()
        elif (error := work.exception()) is not None:
            for flight in flights:
                flight.set_exception(error)
        else:
            self.embedded += len(flights)
            for image_id, flight, embedding in zip(image_ids, flights, work.result(), strict=True):
                flight.set_result(self._cache.put(image_id, embedding))
