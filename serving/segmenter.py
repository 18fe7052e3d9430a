"""The segmenter's replica: it draws masks for the reasoner's answers and for callers' own prompts.

    event loop  ── embeddings by id: kept, under way, or new ──┐
    one thread  ◄── all work of torch, one after another ──────┘──► mask, score ──► run lengths

All that the expert computes runs in one thread, so that the event loop meanwhile takes requests and answers health
checks. What is drawn is what training draws: the expert is loaded and asked as the segmenter of training does.
"""

import asyncio
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from actors.experts.cache import EmbeddingCache
from serving.config import ServeConfig
from serving.consensus import vote
from serving.embeddings import Embeddings
from serving.messages import Drawn, Prompt, UnknownImage
from umrg.answers import Answer
from umrg.frames import Size
from umrg.masks import encode_rle
from umrg.mistake import Mistake

if TYPE_CHECKING:
    from actors.experts.protocol import Decoded, Embedding, Expert

T = TypeVar("T")

_TINY_SIDE = 64
_TINY_BOX = (16.0, 16.0, 47.0, 47.0)
_TINY_POINTS = ((26.0, 26.0), (37.0, 37.0))
_TOLERANCE = 0.01
"""Of the spread of the logits: above what a GPU's rounding changes from one time to the next."""


def load_configured(config: ServeConfig) -> "Expert":
    """The expert that a service's configuration selects, with this replica's share of the cores. Raises ValueError as
    `load_expert` does."""
    # Seconds of imports, which the service's other replicas do without.
    from actors.experts.drawing import load_frozen
    from actors.threads import share_cores

    share_cores(config.segmenter.threads, config.segmenter.actors)
    return load_frozen(config.expert, config.segmenter)


@dataclass(frozen=True, kw_only=True)
class Stats:
    """What a replica has done since it started."""

    hits: int
    """Requests whose embedding was kept."""
    misses: int
    """Requests whose embedding was not, those included that waited for the same image as another."""
    embedded: int
    """Images that the expert embedded."""
    decoded: int
    """Prompts that it decoded, without those of health checks."""
    kept: int
    """Embeddings that are kept now."""
    kept_bytes: int
    """Their size."""


class Segmenter:
    """An expert and the embeddings of the images that were asked about lately.

    load: makes the expert. patience: seconds after which a thread that has finished nothing counts as stuck. The
    constructor returns when the expert is warm: every kind of kernel that requests need has run once. Raises
    RuntimeError for an expert whose numbers are not finite. All methods belong to one event loop.
    """

    def __init__(
        self, config: ServeConfig, load: "Callable[[ServeConfig], Expert]" = load_configured, *, patience: float = 20.0
    ) -> None:
        self._expert = load(config)
        self._patience = patience
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="expert")
        self._cache = EmbeddingCache(limit=config.segmenter.embeddings.memory_mib << 20)
        self._embeddings = Embeddings(self._embed_all, self._cache, at_once=self._expert.images_at_once)
        self._finished = self._decoded = 0
        # In the thread of all later work, since torch keeps its helper threads and buffers for each.
        (self._tiny,) = self._thread.submit(self._embedded, [_tiny_image()]).result()
        self._expected = self._thread.submit(self._warm_up).result()

    async def embed(self, image_id: str, pixels: NDArray[np.uint8]) -> None:
        """Embed an image, uint8 [H, W, 3], and keep its embedding."""
        await self._embeddings.of(image_id, pixels)

    async def draw(self, image_id: str, pixels: NDArray[np.uint8], answers: Sequence[Answer]) -> Drawn | None:
        """The mask of an answer, or the consensus of several, all in original pixels; None where none has a usable box
        and points. pixels: uint8 [H, W, 3]."""
        if not any(answer.promptable for answer in answers):
            return None
        embedding = await self._embeddings.of(image_id, pixels)
        return await self._run(partial(self._answered, embedding, answers))

    async def segment(self, image_id: str, pixels: NDArray[np.uint8] | None, prompt: Prompt) -> Drawn:
        """The mask of a caller's prompt. pixels: uint8 [H, W, 3]; None for an image whose embedding is kept. Raises
        UnknownImage where it is not, and ValueError for a prompt that cannot be drawn."""
        _check_prompt(prompt, self._expert)
        if pixels is not None:
            _check_within(prompt, Size(width=pixels.shape[1], height=pixels.shape[0]))
            embedding = await self._embeddings.of(image_id, pixels)
        else:
            kept = await self._embeddings.kept(image_id)
            if kept is None:
                raise UnknownImage("no image is kept by this id, or no longer; send the image itself")
            embedding = kept
            _check_within(prompt, embedding.original)
        return await self._run(partial(self._prompted, embedding, prompt))

    async def check_health(self) -> None:
        """Raise RuntimeError if the expert no longer draws what it drew at the start, or if its thread is stuck. A
        thread that is busy, but finishes its work, is well."""
        before = self._finished
        probe = self._run(self._draw_tiny)
        await asyncio.wait([probe], timeout=self._patience)
        if not probe.done():
            probe.cancel()
            if self._finished == before:
                raise RuntimeError(f"the expert has finished nothing within {self._patience:g} s")
            return
        if not _alike(probe.result(), self._expected):
            raise RuntimeError("the expert no longer draws the mask that it drew at its start")

    def stats(self) -> Stats:
        """What was done so far."""
        return Stats(
            hits=self._cache.hits,
            misses=self._cache.misses,
            embedded=self._embeddings.embedded,
            decoded=self._decoded,
            kept=len(self._cache),
            kept_bytes=self._cache.bytes,
        )

    def close(self) -> None:
        """End the thread after what it is doing; what waits for it is cancelled."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _run(self, work: Callable[[], T]) -> asyncio.Future[T]:
        """Have the expert's thread do some work."""
        return asyncio.get_running_loop().run_in_executor(self._thread, self._counted, work)

    def _counted(self, work: Callable[[], T]) -> T:
        try:
            return work()
        finally:
            self._finished += 1

    def _embed_all(self, images: Sequence[NDArray[np.uint8]]) -> "asyncio.Future[Sequence[Embedding]]":
        return self._run(partial(self._embedded, images))

    def _embedded(self, images: Sequence[NDArray[np.uint8]]) -> "Sequence[Embedding]":
        """In the main memory, whose use a GPU's other tenants do not feel; `decode` takes it back in a millisecond."""
        return [replace(each, features=each.features.cpu()) for each in self._expert.embed_all(images)]

    def _answered(self, embedding: "Embedding", answers: Sequence[Answer]) -> Drawn | None:
        from actors.experts.drawing import draw_masks

        drawn = draw_masks(self._expert, embedding, answers)
        self._decoded += len(drawn)
        if len(answers) == 1:
            return _drawn(*drawn[0])
        chosen = vote([drawn[i][0] if i in drawn else None for i in range(len(answers))])
        if chosen is None:
            return None
        score = drawn[chosen.chosen][1]
        return replace(_drawn(chosen.mask, score), chosen=chosen.chosen, confidence=chosen.confidence)

    def _prompted(self, embedding: "Embedding", prompt: Prompt) -> Drawn:
        decoded = self._expert.decode(
            embedding,
            boxes=None if prompt.box is None else np.array([prompt.box]),
            points=np.array([prompt.points]) if prompt.points else None,
            labels=np.array([prompt.labels]) if prompt.labels else None,
        )
        self._decoded += 1
        return _drawn(decoded.masks[0], float(decoded.scores[0]))

    def _warm_up(self) -> "Decoded":
        """Run every shape of the encoder and every kind of prompt once; what the expert draws on a tiny image."""
        for doublings in range(1, self._expert.images_at_once.bit_length()):
            self._embedded([_tiny_image()] * (1 << doublings))
        self._expert.decode(self._tiny, boxes=np.array([_TINY_BOX]))
        if self._expert.takes_points:
            self._expert.decode(self._tiny, points=np.array([_TINY_POINTS]))
        decoded = self._draw_tiny()
        encode_rle(decoded.masks[0])
        if not (np.isfinite(decoded.logits).all() and np.isfinite(decoded.scores).all()):
            raise RuntimeError(f"the expert {self._expert.name} computes numbers that are not finite; try float32")
        return decoded

    def _draw_tiny(self) -> "Decoded":
        points = np.array([_TINY_POINTS]) if self._expert.takes_points else None
        return self._expert.decode(self._tiny, boxes=np.array([_TINY_BOX]), points=points)


def _tiny_image() -> NDArray[np.uint8]:
    """A bright square on black, uint8 [64, 64, 3]."""
    image = np.zeros((_TINY_SIDE, _TINY_SIDE, 3), dtype=np.uint8)
    image[16:48, 16:48] = 255
    return image


def _drawn(mask: NDArray[np.bool_], score: float) -> Drawn:
    return Drawn(mask=encode_rle(mask), width=mask.shape[1], height=mask.shape[0], score=score)


def _alike(now: "Decoded", expected: "Decoded") -> bool:
    """Whether logits and score are the same, but for rounding."""
    spread = float(np.ptp(expected.logits))
    logits = np.allclose(now.logits, expected.logits, rtol=0.0, atol=_TOLERANCE * spread)
    return logits and np.allclose(now.scores, expected.scores, rtol=0.0, atol=_TOLERANCE)


def _check_prompt(prompt: Prompt, expert: "Expert") -> None:
    """Raise ValueError for a prompt that cannot be drawn whatever the image."""
    if prompt.box is None and not prompt.points:
        raise Mistake("there is nothing to segment; give a box, points, or both")
    if prompt.points and not expert.takes_points:
        raise Mistake(f"the expert {expert.name} takes no points; give a box alone")
    if prompt.labels and len(prompt.labels) != len(prompt.points):
        raise Mistake(f"there are {len(prompt.points)} points and {len(prompt.labels)} labels; give one for each point")
    if not set(prompt.labels) <= {0, 1}:
        raise Mistake("a point's label is 1 inside the mask or 0 outside it")
    if not all(map(math.isfinite, (*(prompt.box or ()), *(each for point in prompt.points for each in point)))):
        raise Mistake("box and points must be finite numbers")
    if prompt.box is not None and not (prompt.box[0] <= prompt.box[2] and prompt.box[1] <= prompt.box[3]):
        raise Mistake("a box is x1, y1, x2, y2 with x1 <= x2 and y1 <= y2")


def _check_within(prompt: Prompt, image: Size) -> None:
    """Raise ValueError for coordinates outside an image."""
    corners = [] if prompt.box is None else [prompt.box[:2], prompt.box[2:]]
    for x, y in (*corners, *prompt.points):
        if not (0 <= x <= image.width and 0 <= y <= image.height):
            extent = f"x from 0 to {image.width}, y from 0 to {image.height}"
            raise Mistake(f"box and points must lie within the image, {extent}; {x:g}, {y:g} does not")
