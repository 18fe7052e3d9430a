"""The segmenter's replica: it draws masks for the reasoner's answers and for callers' own prompts.

    event loop  ── images by their ids, prompts ──► the desk: embeddings kept, under way, or new ──► mask, score, runs

All that the expert computes runs in one thread (`actors.experts.desk`), so that the event loop meanwhile takes requests
and answers health checks. What is drawn is what training draws: the expert is loaded and asked as the segmenter of
training does. An id holds whose picture it is, so that nobody finds the embedding of another's.
"""

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from actors.experts.cache import open_cache
from actors.experts.desk import Desk
from actors.experts.protocol import NotFinite, Prompts
from serving.config import ServeConfig
from serving.consensus import vote
from serving.messages import Drawn, Prompt, UnknownImage
from umrg.answers import Answer
from umrg.frames import Size
from umrg.masks import encode_rle
from umrg.mistake import Mistake

if TYPE_CHECKING:
    from concurrent.futures import Future

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
    """Images that were looked up and found."""
    misses: int
    """Those that were not. A request for an image that is being embedded for another is in neither."""
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
    NotFinite for an expert whose numbers are not finite. All methods belong to one event loop.
    """

    def __init__(
        self, config: ServeConfig, load: "Callable[[ServeConfig], Expert]" = load_configured, *, patience: float = 20.0
    ) -> None:
        self._expert = load(config)
        self._patience = patience
        self._cache = open_cache(config.segmenter.embeddings, self._expert)
        self._desk = Desk(self._expert, self._cache, at_once=self._expert.images_at_once)
        # In the thread of all later work, since torch keeps its helper threads and buffers for each.
        self._tiny = self._desk.do(lambda: self._expert.embed(_tiny_image())).result()
        self._expected = self._desk.do(self._warm_up).result()

    async def embed(self, image_id: str, pixels: NDArray[np.uint8]) -> None:
        """Embed an image, uint8 [H, W, 3], and keep its embedding."""
        await _awaited(self._desk.embed(image_id, pixels))

    async def draw(self, image_id: str, pixels: NDArray[np.uint8], answers: Sequence[Answer]) -> Drawn | None:
        """The mask of an answer, or the consensus of several, all in original pixels; None where none has a usable box
        and points. pixels: uint8 [H, W, 3]."""
        from actors.experts.drawing import prompts_of

        usable = {i: answer for i, answer in enumerate(answers) if answer.promptable}
        if not usable:
            return None
        embedding = await _awaited(self._desk.embed(image_id, pixels))
        prompts = prompts_of(self._expert, embedding, list(usable.values()))
        read = partial(_consensus, list(usable), len(answers))
        return await _awaited(self._desk.decode(prompts, read))

    async def segment(self, image_id: str, pixels: NDArray[np.uint8] | None, prompt: Prompt) -> Drawn:
        """The mask of a caller's prompt. pixels: uint8 [H, W, 3]; None for an image whose embedding is kept. Raises
        UnknownImage where it is not, and ValueError for a prompt that cannot be drawn."""
        _check_prompt(prompt, self._expert)
        if pixels is not None:
            _check_within(prompt, Size(width=pixels.shape[1], height=pixels.shape[0]))
        found = self._desk.kept(image_id) if pixels is None else self._desk.embed(image_id, pixels)
        if found is None:
            raise UnknownImage("no image is kept by this id, or no longer; send the image itself")
        embedding = await _awaited(found)
        _check_within(prompt, embedding.original)
        return await _awaited(self._desk.decode(_prompts(embedding, prompt), partial(_drawn, 0)))

    async def check_health(self) -> None:
        """Raise an error if the expert no longer draws what it drew at the start, or if its thread is stuck. A
        thread that is busy, but finishes its work, is well."""
        before = self._desk.finished
        probe = asyncio.wrap_future(self._desk.do(self._draw_tiny))
        await asyncio.wait([probe], timeout=self._patience)
        if not probe.done():
            probe.cancel()
            if self._desk.finished == before:
                raise RuntimeError(f"the expert has finished nothing within {self._patience:g} s")
            return
        if not _alike(probe.result(), self._expected):
            raise RuntimeError("the expert no longer draws the mask that it drew at its start")

    def stats(self) -> Stats:
        """What was done so far."""
        return Stats(
            hits=self._cache.hits,
            misses=self._cache.misses,
            embedded=self._desk.embedded,
            decoded=self._desk.decoded,
            kept=len(self._cache),
            kept_bytes=self._cache.bytes,
        )

    def close(self) -> None:
        """End the thread after what it is doing; what waits for it is cancelled."""
        self._desk.close()

    def _warm_up(self) -> "Decoded":
        """Run every shape of the encoder and every kind of prompt once; what the expert draws on a tiny image."""
        for doublings in range(1, self._expert.images_at_once.bit_length()):
            self._expert.embed_all([_tiny_image()] * (1 << doublings))
        self._expert.decode(self._tiny, boxes=np.array([_TINY_BOX]))
        if self._expert.takes_points:
            self._expert.decode(self._tiny, points=np.array([_TINY_POINTS]))
        decoded = self._draw_tiny()
        _drawn(0, decoded)
        return decoded

    def _draw_tiny(self) -> "Decoded":
        points = np.array([_TINY_POINTS]) if self._expert.takes_points else None
        return self._expert.decode(self._tiny, boxes=np.array([_TINY_BOX]), points=points)


async def _awaited(found: "Future[T]") -> T:
    try:
        return await asyncio.wrap_future(found)
    except NotFinite as error:
        raise RuntimeError(str(error)) from error  # no mistake of the caller's, to whom a ValueError would be told


def _tiny_image() -> NDArray[np.uint8]:
    """A bright square on black, uint8 [64, 64, 3]."""
    image = np.zeros((_TINY_SIDE, _TINY_SIDE, 3), dtype=np.uint8)
    image[16:48, 16:48] = 255
    return image


def _prompts(embedding: "Embedding", prompt: Prompt) -> Prompts:
    return Prompts(
        embedding=embedding,
        boxes=None if prompt.box is None else np.array([prompt.box]),
        points=np.array([prompt.points]) if prompt.points else None,
        labels=np.array([prompt.labels]) if prompt.labels else None,
    )


def _drawn(row: int, decoded: "Decoded") -> Drawn:
    from actors.experts.measuring import encoded

    (runs,) = encoded(decoded.drawn[row : row + 1])
    height, width = decoded.drawn.shape[1:]
    return Drawn(mask=runs, width=width, height=height, score=float(decoded.scores[row]))


def _consensus(usable: Sequence[int], answers: int, decoded: "Decoded") -> Drawn:
    """usable: which of so many answers were decoded, in order."""
    if answers == 1:
        return _drawn(0, decoded)
    rows = {i: row for row, i in enumerate(usable)}
    chosen = vote([decoded.masks[rows[i]] if i in rows else None for i in range(answers)])
    assert chosen is not None, "one at least is usable"
    return Drawn(
        mask=encode_rle(chosen.mask),
        width=chosen.mask.shape[1],
        height=chosen.mask.shape[0],
        score=float(decoded.scores[rows[chosen.chosen]]),
        chosen=chosen.chosen,
        confidence=chosen.confidence,
    )


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
