"""A frozen expert at work for many callers: the segmenter of training and the replica of a service.

    callers' threads   ──embed──► the cache, or a flight ──┐
                       ──decode──────────────────────────┐ │
                       ──do────────────────────────────┐ │ │
    one thread                          work, prompts, images ──► futures
    another, where there is a disk                     └──► the cache

All that the expert computes runs in one thread, which does not wait for a disk. A round of it does what is to be done
besides, decodes all prompts that wait, and embeds one pass of images: so prompts wait for one pass at most, however
many images are embedded ahead, and images for one batch of prompts. Nothing here imports torch.
"""

import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from actors.experts.cache import EmbeddingCache, in_memory
from actors.experts.protocol import Decoded, Embedding, Expert, Prompts

T = TypeVar("T")
U = TypeVar("U")

Pixels = NDArray[np.uint8]
"""An image, uint8 [H, W, 3] RGB."""

PIXELS_AT_ONCE = 2**27
"""Of all masks that are decoded together, a byte each: requests may be about images of a hundred megapixels."""


@dataclass(frozen=True, kw_only=True)
class CacheUse:
    """How images' embeddings were come by."""

    hits: int = 0
    """Images that were looked up and found, in memory or on disk."""
    misses: int = 0
    """Those that were not."""
    read: int = 0
    """Of the hits, those that were found on disk."""
    embedded: int = 0
    """Images that the expert embedded."""
    kept: int = 0
    """Embeddings that are in memory now."""
    bytes: int = 0
    """Of these."""

    def __add__(self, other: "CacheUse") -> "CacheUse":
        return CacheUse(
            hits=self.hits + other.hits,
            misses=self.misses + other.misses,
            read=self.read + other.read,
            embedded=self.embedded + other.embedded,
            kept=self.kept + other.kept,
            bytes=self.bytes + other.bytes,
        )

    def since(self, before: "CacheUse") -> "CacheUse":
        """What has come since then."""
        return CacheUse(
            hits=self.hits - before.hits,
            misses=self.misses - before.misses,
            read=self.read - before.read,
            embedded=self.embedded - before.embedded,
            kept=self.kept,
            bytes=self.bytes,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Asked:
    given: Future[Any] = field(default_factory=Future)
    """What the caller waits for."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Work(_Asked):
    """Work to be done in the expert's thread."""

    do: Callable[[], Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Request(_Asked):
    """Prompts to be decoded."""

    prompts: Prompts
    read: Callable[[Decoded], Any]
    pixels: int
    """Of the masks."""


A = TypeVar("A", bound=_Asked)


class Desk:
    """An expert, the thread that it works in, and the embeddings that are kept. All methods may be called from any
    thread, and none waits for the expert; an asyncio caller awaits `asyncio.wrap_future` of what they return.

    An error of one request reaches those who asked for it, and nobody else. One that is cancelled takes nothing from
    others.
    """

    def __init__(self, expert: Expert, cache: EmbeddingCache, *, at_once: int = 1) -> None:
        """at_once: images that are embedded in one pass where as many wait. Embeddings of a pass of several are equal
        to those of images embedded alone only up to rounding."""
        self._expert, self._cache, self._at_once = expert, cache, at_once
        self.embedded = 0
        """Images that the expert embedded."""
        self.decoded = 0
        """Prompts that it decoded."""
        self.finished = 0
        """Pieces of work that ended, whatever in."""
        self._changed = threading.Condition()
        self._closed = False
        self._work: deque[_Work] = deque()
        self._requests: deque[_Request] = deque()
        self._images: deque[tuple[str, Pixels]] = deque()
        self._flights: dict[str, list[Future[Embedding]]] = {}
        # Without a disk there is nothing to wait for.
        self._keeping = ThreadPoolExecutor(1, thread_name_prefix="embeddings") if cache.on_disk else None
        threading.Thread(target=self._run, name="expert", daemon=True).start()

    def embed(self, key: str, image: Pixels | Callable[[], Pixels]) -> Future[Embedding]:
        """The embedding of an image: from the cache, from a flight that is under way for the same key, or by the
        expert. image: what decodes it is called, in the caller's thread, only if the expert must embed it."""
        mine: Future[Embedding] = Future()
        with self._changed:
            if self._closed:
                mine.cancel()
                return mine
            waiting = self._flights.setdefault(key, [])
            waiting.append(mine)
            if len(waiting) > 1:
                return mine
        found = _attempt(partial(self._found, key, image))
        pixels = None if found.exception() else found.result()
        if pixels is None or isinstance(pixels, Embedding):
            self._land(key, found)
        else:
            with self._changed:
                self._images.append((key, pixels))
                self._changed.notify()
        return mine

    def kept(self, key: str) -> Future[Embedding] | None:
        """The embedding of an image that is kept or on its way; None if there is none."""
        with self._changed:
            if (waiting := self._flights.get(key)) is not None:
                mine: Future[Embedding] = Future()
                waiting.append(mine)
                if self._closed:
                    mine.cancel()
                return mine
        embedding = self._cache.get(key)
        return None if embedding is None else _attempt(lambda: embedding)

    def room(self, embedding: Embedding) -> int:
        """How many embeddings of its size are kept in memory at the same time."""
        return self._cache.limit // embedding.nbytes

    def decode(self, prompts: Prompts, read: Callable[[Decoded], T]) -> Future[T]:
        """What `read` makes of the decoded prompts. It runs in the expert's thread, and what it does not keep of the
        masks is gone when the next prompts are decoded. All prompts that wait are decoded together."""
        n = max(len(each) for each in (prompts.boxes, prompts.points, prompts.masks, ()) if each is not None)
        size = prompts.embedding.original
        request = _Request(prompts=prompts, read=read, pixels=n * size.width * size.height)
        return self._enqueue(self._requests, request)

    def do(self, work: Callable[[], T]) -> Future[T]:
        """Have the expert's thread do some work, before all else that waits."""
        return self._enqueue(self._work, _Work(do=work))

    def use(self) -> CacheUse:
        """Since the beginning."""
        cache = self._cache
        return CacheUse(
            hits=cache.hits,
            misses=cache.misses,
            read=cache.read,
            embedded=self.embedded,
            kept=len(cache),
            bytes=cache.bytes,
        )

    def close(self) -> None:
        """End the threads after what they are doing. What waits for them is cancelled, and what is asked for later
        too."""
        with self._changed:
            self._closed = True
            waiting = [each.given for each in (*self._work, *self._requests)]
            waiting += [each for flight in self._flights.values() for each in flight]
            self._changed.notify()
        for each in waiting:
            each.cancel()

    def _enqueue(self, queue: deque[A], asked: A) -> Future[Any]:
        with self._changed:
            queue.append(asked)
            self._changed.notify()
            if self._closed:
                asked.given.cancel()
        return asked.given

    def _found(self, key: str, image: Pixels | Callable[[], Pixels]) -> Embedding | Pixels:
        embedding = self._cache.get(key)
        if embedding is not None:
            return embedding
        return image() if callable(image) else image

    def _land(self, key: str, embedding: Future[Any]) -> None:
        """Hand what has come of an image to all who wait for it."""
        with self._changed:
            waiting = self._flights.pop(key)
        for each in waiting:
            _give(each, embedding)

    def _run(self) -> None:
        while self._awaited():
            for work in _wanted(self._taken(self._work)):
                _give(work.given, _attempt(work.do))
                self.finished += 1
            self._decode(_wanted(self._some_requests()))
            self._embed(self._taken(self._images, self._at_once))
        if self._keeping:
            self._keeping.shutdown(wait=False)

    def _awaited(self) -> bool:
        """Wait until there is something to do; False once the desk is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._work or self._requests or self._images)
            return not self._closed

    def _taken(self, queue: deque[T], most: int | None = None) -> list[T]:
        with self._changed:
            return [queue.popleft() for _ in range(len(queue) if most is None else min(most, len(queue)))]

    def _some_requests(self) -> list[_Request]:
        """Those that wait, as far as their masks have room at the same time."""
        taken: list[_Request] = []
        pixels = 0
        with self._changed:
            while self._requests and (not taken or pixels + self._requests[0].pixels <= PIXELS_AT_ONCE):
                pixels += self._requests[0].pixels
                taken.append(self._requests.popleft())
        return taken

    def _decode(self, requests: Sequence[_Request]) -> None:
        found = _each([request.prompts for request in requests], lambda prompts: self._expert.decode_all(prompts))
        for request, decoded in zip(requests, found, strict=True):
            if decoded.exception():
                _give(request.given, decoded)
            else:
                _give(request.given, _attempt(partial(self._read, request, decoded.result())))
        self.finished += len(requests)

    def _read(self, request: _Request, decoded: Decoded) -> Any:
        self.decoded += len(decoded.scores)
        return request.read(decoded)

    def _embed(self, images: Sequence[tuple[str, Pixels]]) -> None:
        # In main memory, because a GPU's is not to wait for a disk.
        found = _each([pixels for _, pixels in images], lambda some: list(map(in_memory, self._expert.embed_all(some))))
        for (key, _), embedding in zip(images, found, strict=True):
            if embedding.exception():
                self._land(key, embedding)
            else:
                self.embedded += 1
                keep = partial(self._keep, key, embedding.result())
                self._keeping.submit(keep) if self._keeping else keep()
        self.finished += len(images)

    def _keep(self, key: str, embedding: Embedding) -> None:
        self._land(key, _attempt(partial(self._cache.put, key, embedding)))


def _wanted(asked: Sequence[A]) -> list[A]:
    """Those that somebody still waits for."""
    return [each for each in asked if not each.given.cancelled()]


def _attempt(work: Callable[[], T]) -> Future[T]:
    """What came of some work, as a future that is done."""
    outcome: Future[T] = Future()
    try:
        outcome.set_result(work())
    except BaseException as error:  # noqa: BLE001  # whatever it is, it belongs to those who asked for the work
        # An error keeps the frames that it came through: a failed pass's tensors, whose room the next attempt needs.
        traceback.clear_frames(error.__traceback__)
        outcome.set_exception(error)
    return outcome


def _each(asked: Sequence[T], together: Callable[[Sequence[T]], Sequence[U]]) -> list[Future[U]]:
    """What came of each of several; if they fail together, each is tried alone, for the fault may be another's."""
    if not asked:
        return []
    outcome = _attempt(lambda: [each for _, each in zip(asked, together(asked), strict=True)])
    if (error := outcome.exception()) is None:
        return [_attempt(partial(_same, each)) for each in outcome.result()]
    if len(asked) > 1:
        return [found for each in asked for found in _each([each], together)]
    failed: Future[U] = Future()
    failed.set_exception(error)
    return [failed]


def _give(waiting: Future[T], outcome: Future[T]) -> None:
    """Hand over what came of some work, unless nobody waits for it any more."""
    if not waiting.set_running_or_notify_cancel():
        return
    if (error := outcome.exception()) is not None:
        waiting.set_exception(error)
    else:
        waiting.set_result(outcome.result())


def _same(value: T) -> T:
    return value
