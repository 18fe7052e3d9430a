"""The two models as the ingress asks them: through handles of Ray Serve, with an image in the object store once."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import ray
from ray.exceptions import ActorUnavailableError, ObjectStoreFullError, RayActorError, RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from serving.messages import Ask, Drawn, Failed, Overloaded, Picture, Prompt, Unavailable
from serving.privacy import unsealed
from umrg.answers import Answer
from umrg.group import GroupSamples, SamplingParams
from umrg.mistake import Mistake

_PAUSES = (0.5, 1.5, 4.0)
"""Seconds before a request whose replica died is sent again: by then the router knows that it is gone."""
_GONE = (RayActorError, ActorUnavailableError, ReplicaUnavailableError, DeploymentUnavailableError)


class Replicas:
    """`serving.messages.Models` over the deployments' handles.

    Requests about one image go to one replica, which has it in its caches (the deployments' router hashes the image's
    id). Completions are greedy or seeded, and experts are deterministic, so a request whose replica died is sent again.
    """

    def __init__(self, reasoner: DeploymentHandle, segmenter: DeploymentHandle) -> None:
        self._reasoner, self._segmenter = reasoner, segmenter
        self._placed: WeakKeyDictionary[Picture, asyncio.Future[Any]] = WeakKeyDictionary()

    async def sample(self, picture: Picture, ask: Ask) -> GroupSamples:
        pixels = await self._pixels(picture)
        found: GroupSamples = await _again(lambda: self._ask(picture).sample.remote(picture.id, pixels, ask))
        return found

    async def stream(self, picture: Picture, ask: Ask) -> AsyncIterator[str | GroupSamples]:
        written, pixels = False, await self._pixels(picture)
        for pause in (*_PAUSES, None):
            pieces = self._ask(picture, stream=True).stream.remote(picture.id, pixels, ask)
            try:
                with _told():
                    async for piece in pieces:
                        written = True
                        yield piece
                return
            except Unavailable:
                # What was read cannot be taken back.
                if written or pause is None:
                    raise
                await asyncio.sleep(pause)
            finally:
                pieces.cancel()

    async def embed(self, picture: Picture) -> None:
        pixels = await self._pixels(picture)
        await _again(lambda: self._draw(picture.id).embed.remote(picture.id, pixels))

    async def draw(self, picture: Picture, answers: Sequence[Answer]) -> Drawn | None:
        pixels = await self._pixels(picture)
        found: Drawn | None = await _again(
            lambda: self._draw(picture.id).draw.remote(picture.id, pixels, list(answers)),
            # The reasoner's work is done, and worth a short wait.
            (Unavailable, Overloaded),
        )
        return found

    async def segment(self, image_id: str, picture: Picture | None, prompt: Prompt) -> Drawn:
        pixels = None if picture is None else await self._pixels(picture)
        found: Drawn = await _again(lambda: self._draw(image_id).segment.remote(image_id, pixels, prompt))
        return found

    async def ready(self) -> None:
        picture = Picture(id="0" * 32, pixels=np.full((32, 32, 3), 128, dtype=np.uint8))
        one_token = Ask(text="ready?", sampling=SamplingParams(n=1, temperature=0.0, max_tokens=1))
        prompt = Prompt(box=(8.0, 8.0, 24.0, 24.0))
        await asyncio.gather(self.sample(picture, one_token), self.segment(picture.id, picture, prompt))

    def _ask(self, picture: Picture, *, stream: bool = False) -> Any:
        return self._reasoner.options(session_id=picture.id, stream=stream)

    def _draw(self, image_id: str) -> Any:
        return self._segmenter.options(session_id=image_id)

    async def _pixels(self, picture: Picture) -> Any:
        """A reference to the pixels in the object store, from where both models read them without a copy; they leave it
        with the picture. They are put there once, off the event loop, which large ones would hold up."""
        if picture not in self._placed:
            self._placed[picture] = asyncio.ensure_future(asyncio.to_thread(ray.put, picture.pixels))
        with _told():
            # One of those who wait may go; the others need it.
            return await asyncio.shield(self._placed[picture])


async def _again(call: Callable[[], Any], failures: tuple[type[Failed], ...] = (Unavailable,)) -> Any:
    """Await a call, and again after each death of the replica that it had gone to, or after other failures."""
    for pause in _PAUSES:
        try:
            return await _awaited(call())
        except failures:
            await asyncio.sleep(pause)
    return await _awaited(call())


async def _awaited(response: Any) -> Any:
    with _told():
        try:
            return await response
        except asyncio.CancelledError:
            # The caller has gone or waited long enough: the replica need not go on.
            response.cancel()
            raise


@contextmanager
def _told() -> Iterator[None]:
    """Errors of Ray, and those that it wraps, as the kinds that the routes know. What is no kind of ours stays what it
    is, and becomes a 500."""
    try:
        yield
    except BackPressureError as error:
        raise Overloaded("all queues are full") from error
    except ObjectStoreFullError as error:
        raise Overloaded("the memory for images is full") from error
    except _GONE as error:
        raise Unavailable("a replica ended while it worked on the request") from error
    except RayError as error:
        found = unsealed(error)
        if isinstance(found, (Mistake, Failed)):
            raise found from None
        if isinstance(getattr(error, "cause", None), _GONE):
            raise Unavailable("a replica ended while it worked on the request") from error
        raise
