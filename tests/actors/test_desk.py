"""An expert that works for many callers: what is shared, what is decoded together, and what an error or a caller that
goes away takes from others. The expert is the tests' own, and works only when it is given turns."""

import asyncio
import gc
import threading
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from actors.experts import desk as desks
from actors.experts.cache import EmbeddingCache
from actors.experts.desk import CacheUse, Desk
from actors.experts.protocol import Decoded, Embedding, Preprocess, Prompts
from umrg.frames import Size

SECONDS = 60
"""Nothing here takes as long, on any machine."""


class Scripted:
    """An expert whose embeddings hold an image's first value, and whose masks are of no use."""

    name = "scripted"
    preprocess: Preprocess = "published"
    takes_points = takes_masks = True

    def __init__(self, images_at_once: int = 1) -> None:
        self.images_at_once = images_at_once
        self.did: list[str] = []
        """Each pass: images by their values, or prompts by those of their images."""
        self.threads: set[int] = set()
        self.turns: threading.Semaphore | None = None
        self.begun = threading.Semaphore(0)
        """Released by each pass that begins, those included that wait for their turn."""

    def embed(self, image: NDArray[np.uint8]) -> Embedding:
        return self.embed_all([image])[0]

    def embed_all(self, images: Sequence[NDArray[np.uint8]]) -> list[Embedding]:
        values = [int(image.flat[0]) for image in images]
        self._take_turn("embed", values)
        return [
            Embedding(features=(torch.full((1, 1, 2, 2), float(value)),), original=Size(4, 3), content=Size(4, 3))
            for value in values
        ]

    def decode(self, embedding: Embedding, **prompts: Any) -> Decoded:
        return self.decode_all([Prompts(embedding=embedding, **prompts)])[0]

    def decode_all(self, requests: Sequence[Prompts]) -> list[Decoded]:
        self._take_turn("decode", [value(request.embedding) for request in requests])
        return [self._decoded(request) for request in requests]

    def digest(self) -> str:
        return "digest"

    def fingerprint(self) -> str:
        return "fingerprint"

    def _decoded(self, request: Prompts) -> Decoded:
        assert request.boxes is not None
        n = len(request.boxes)
        scores = np.full(n, value(request.embedding), dtype=np.float32)
        return Decoded(
            drawn=torch.zeros(n, 3, 4, dtype=torch.bool), scores=scores, logits=np.zeros((n, 1, 1), np.float32)
        )

    def _take_turn(self, what: str, values: list[int]) -> None:
        self.did.append(f"{what} {' '.join(map(str, values))}")
        self.threads.add(threading.get_ident())
        self.begun.release()
        if self.turns is not None:
            assert self.turns.acquire(timeout=SECONDS)
        if 13 in values:
            raise ValueError("thirteen")


def value(embedding: Embedding) -> int:
    return int(embedding.features[0].flatten()[0])


def image(number: int) -> NDArray[np.uint8]:
    return np.full((3, 4, 3), number, dtype=np.uint8)


def prompts(number: int, n: int = 1) -> Prompts:
    features = (torch.full((1, 1, 2, 2), float(number)),)
    embedding = Embedding(features=features, original=Size(4, 3), content=Size(4, 3))
    return Prompts(embedding=embedding, boxes=np.zeros((n, 4)))


def score(decoded: Decoded) -> float:
    return float(decoded.scores[0])


@contextmanager
def opened(expert: Scripted, **settings: Any) -> Iterator[Desk]:
    desk = Desk(expert, EmbeddingCache(limit=1 << 20), **settings)
    try:
        yield desk
    finally:
        desk.close()


@contextmanager
def held(expert: Scripted, desk: Desk) -> Iterator[Future[Embedding]]:
    """While the expert is busy with an image of value 0; at the end it may do all that waits."""
    expert.turns = threading.Semaphore(0)
    busy = desk.embed("busy", image(0))
    assert expert.begun.acquire(timeout=SECONDS)
    yield busy
    expert.turns.release(1000)


def test_requests_for_one_image_share_one_embedding_and_one_decoding_of_its_file() -> None:
    expert, read = Scripted(), []

    def decoded() -> NDArray[np.uint8]:
        read.append(threading.get_ident())
        return image(7)

    with opened(expert) as desk:
        with held(expert, desk):
            shared = [desk.embed("seven", decoded) for _ in range(3)]
        assert [value(each.result(SECONDS)) for each in shared] == [7] * 3
        assert desk.embed("seven", decoded).result(SECONDS) is shared[0].result()
        assert expert.did == ["embed 0", "embed 7"] and read == [threading.get_ident()]
        assert desk.use() == CacheUse(hits=1, misses=2, embedded=2, kept=2, bytes=32)


def test_all_prompts_that_wait_are_decoded_together_and_before_images() -> None:
    expert = Scripted()
    with opened(expert) as desk:
        with held(expert, desk):
            images = [desk.embed(str(i), image(i)) for i in (1, 2)]
            drawn = [desk.decode(prompts(i, n=2), score) for i in (3, 4, 5)]
        assert [each.result(SECONDS) for each in drawn] == [3, 4, 5]
        assert [value(each.result(SECONDS)) for each in images] == [1, 2]
        assert expert.did == ["embed 0", "decode 3 4 5", "embed 1", "embed 2"]
        assert (desk.decoded, desk.embedded) == (6, 3)


def test_prompts_wait_for_one_pass_of_images_and_images_for_one_batch_of_prompts() -> None:
    expert = Scripted()
    with opened(expert) as desk:
        with held(expert, desk):
            first = desk.decode(prompts(3), lambda decoded: desk.decode(prompts(4), score))
            images = [desk.embed(str(i), image(i)) for i in (1, 2)]
        first.result(SECONDS).result(SECONDS)
        for each in images:
            each.result(SECONDS)
        assert expert.did == ["embed 0", "decode 3", "embed 1", "decode 4", "embed 2"]


@pytest.mark.parametrize(("at_once", "passes"), [(1, ["1", "2", "3"]), (2, ["1 2", "3"])])
def test_images_are_embedded_together_only_where_the_owner_allows_it(at_once: int, passes: list[str]) -> None:
    expert = Scripted(images_at_once=8)
    with opened(expert, at_once=at_once) as desk:
        with held(expert, desk):
            images = [desk.embed(str(i), image(i)) for i in (1, 2, 3)]
        for each in images:
            each.result(SECONDS)
    assert expert.did[1:] == [f"embed {each}" for each in passes]


def test_masks_that_have_no_room_at_the_same_time_are_decoded_one_after_another(monkeypatch) -> None:
    monkeypatch.setattr(desks, "PIXELS_AT_ONCE", 3 * 12)
    expert = Scripted()
    with opened(expert) as desk:
        with held(expert, desk):
            drawn = [desk.decode(prompts(i, n), score) for i, n in ((1, 2), (2, 1), (3, 5), (4, 1))]
        assert [each.result(SECONDS) for each in drawn] == [1, 2, 3, 4]
    assert expert.did[1:] == ["decode 1 2", "decode 3", "decode 4"]


def test_an_error_reaches_those_who_asked_for_it_and_nobody_else() -> None:
    expert = Scripted(images_at_once=4)

    def unreadable() -> NDArray[np.uint8]:
        raise ValueError("no PNG")

    with opened(expert, at_once=4) as desk:
        with held(expert, desk):
            drawn = [desk.decode(prompts(i), score) for i in (1, 13, 2)]
            images = [desk.embed(str(i), image(i)) for i in (4, 13, 5)]
            again = desk.embed("13", image(13))
            misread = desk.decode(prompts(6), lambda decoded: 1 // 0)
            wrong = desk.do(lambda: 1 // 0)
            unread = desk.embed("unreadable", unreadable)
        assert [drawn[0].result(SECONDS), drawn[2].result(SECONDS)] == [1, 2]
        assert [value(images[0].result(SECONDS)), value(images[2].result(SECONDS))] == [4, 5]
        failures: list[Future[Any]] = [drawn[1], images[1], again]
        for failed in failures:
            with pytest.raises(ValueError, match="thirteen"):
                failed.result(SECONDS)
        for failed in [misread, wrong]:
            with pytest.raises(ZeroDivisionError):
                failed.result(SECONDS)
        with pytest.raises(ValueError, match="no PNG"):
            unread.result(SECONDS)
        assert value(desk.embed("unreadable", image(9)).result(SECONDS)) == 9, "it is tried again"


def test_a_failed_pass_leaves_no_memory_behind_while_each_is_tried_alone() -> None:
    """A GPU may have room for one, but not beside what a pass of two left in its frames."""
    left: list[weakref.ref[torch.Tensor]] = []

    class Greedy(Scripted):
        def decode_all(self, requests: Sequence[Prompts]) -> list[Decoded]:
            activations = torch.zeros(len(requests))
            assert not any(each() is not None for each in left), "it is still there"
            left.append(weakref.ref(activations))
            super().decode_all(requests)
            raise torch.OutOfMemoryError("no room for all of them")

    gc.disable()
    try:
        with opened(expert := Greedy()) as desk:
            with held(expert, desk):
                drawn = [desk.decode(prompts(i), score) for i in (1, 2)]
            for each in drawn:
                assert isinstance(each.exception(SECONDS), torch.OutOfMemoryError)
        assert len(left) == 3 and not any(each() is not None for each in left)
    finally:
        gc.enable()


def test_an_expert_that_answers_too_little_is_an_error_and_no_endless_wait() -> None:
    class Short(Scripted):
        def decode_all(self, requests: Sequence[Prompts]) -> list[Decoded]:
            return super().decode_all(requests)[1:]

    with opened(Short()) as desk:
        with pytest.raises(ValueError, match="shorter"):
            desk.decode(prompts(1), score).result(SECONDS)
        assert value(desk.embed("two", image(2)).result(SECONDS)) == 2


def test_no_prompt_waits_for_a_disk() -> None:
    writing, written = threading.Event(), threading.Event()

    class Slow(EmbeddingCache):
        on_disk = True

        def put(self, key: str, embedding: Embedding) -> Embedding:
            writing.set()
            assert written.wait(SECONDS)
            return super().put(key, embedding)

    desk = Desk(Scripted(), Slow(limit=1 << 20))
    embedding = desk.embed("one", image(1))
    assert writing.wait(SECONDS)
    assert desk.decode(prompts(2), score).result(SECONDS) == 2
    assert not embedding.done()
    written.set()
    assert value(embedding.result(SECONDS)) == 1
    desk.close()


def test_a_caller_that_goes_away_takes_nothing_from_others() -> None:
    expert = Scripted()
    with opened(expert) as desk:
        with held(expert, desk):
            leaving, staying = (desk.embed("a", image(1)) for _ in range(2))
            dropped, kept = (desk.decode(prompts(i), score) for i in (2, 3))
            assert leaving.cancel() and dropped.cancel()
        assert value(staying.result(SECONDS)) == 1 and kept.result(SECONDS) == 3
        assert expert.did == ["embed 0", "decode 3", "embed 1"], "what nobody waits for is not decoded"


def test_what_is_kept_or_on_its_way_is_found_without_the_image() -> None:
    expert = Scripted()
    with opened(expert) as desk:
        with held(expert, desk):
            desk.embed("a", image(1))
            coming = desk.kept("a")
            assert coming is not None and not coming.done() and desk.kept("b") is None
        assert value(coming.result(SECONDS)) == 1
        found = desk.kept("a")
        assert found is not None and value(found.result(SECONDS)) == 1


def test_work_besides_goes_first_and_all_of_it_runs_in_one_thread() -> None:
    expert = Scripted()
    with opened(expert) as desk:
        with held(expert, desk):
            drawn = desk.decode(prompts(1), lambda decoded: (threading.get_ident(), list(expert.did)))
            before = desk.do(lambda: (threading.get_ident(), list(expert.did)))
        (here, did), (there, _) = before.result(SECONDS), drawn.result(SECONDS)
        assert did == ["embed 0"] and {here, there} == expert.threads and here != threading.get_ident()


def test_what_waits_is_cancelled_when_the_desk_is_closed() -> None:
    expert = Scripted()
    with opened(expert) as desk:
        with held(expert, desk):
            waiting: list[Future[Any]] = [desk.embed("a", image(1)), desk.decode(prompts(2), score)]
            waiting += [desk.embed("a", image(1)), desk.do(lambda: None)]
            desk.close()
            later: list[Future[Any]] = [desk.embed("b", image(3)), desk.decode(prompts(4), score)]
        for each in (*waiting, *later):
            with pytest.raises(CancelledError):
                each.result(SECONDS)


def test_an_event_loop_asks_too() -> None:
    expert = Scripted()

    async def several(desk: Desk) -> list[float]:
        first, *_ = await asyncio.gather(*(asyncio.wrap_future(desk.embed("a", image(5))) for _ in range(3)))
        asked = (Prompts(embedding=first, boxes=np.zeros((1, 4))) for _ in range(3))
        return await asyncio.gather(*(asyncio.wrap_future(desk.decode(each, score)) for each in asked))

    with opened(expert) as desk:
        assert asyncio.run(asyncio.wait_for(several(desk), SECONDS)) == [5, 5, 5]
        assert desk.embedded == 1


def test_many_threads_at_once_get_each_their_own() -> None:
    """Eight callers about five images in an order of their own, with a cache that has room for three."""
    expert = Scripted()
    desk = Desk(expert, EmbeddingCache(limit=3 * 16))

    def asks(seed: int) -> None:
        for number in np.random.default_rng(seed).integers(1, 6, 40):
            embedding = desk.embed(str(number), partial(image, number)).result(SECONDS)
            asked = Prompts(embedding=embedding, boxes=np.zeros((2, 4)))
            assert desk.decode(asked, score).result(SECONDS) == number

    with ThreadPoolExecutor(8) as callers:
        for each in [callers.submit(asks, seed) for seed in range(8)]:
            each.result(SECONDS)
    use = desk.use()
    assert desk.decoded == 8 * 40 * 2 and use.bytes == 48 and use.misses == use.embedded
    desk.close()
