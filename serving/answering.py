"""From a request to its answer, with the models behind `serving.messages.Models`.

image file ──Decoders──► Picture ──reasoner──► completions ──parse──► answers ──segmenter──► mask
                            └───────── embedded meanwhile ──────────────────────┘
"""

import asyncio
import base64
import hashlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from serving.api import (
    AnswerEvent,
    GroundOptions,
    GroundResponse,
    MaskFormat,
    ReasoningEvent,
    Rle,
    SegmentOptions,
    SegmentResponse,
    Timings,
)
from serving.config import ServeConfig
from serving.grounder import check_query
from serving.messages import Ask, Drawn, Models, Picture, Prompt, TimedOut
from serving.metrics import Metrics, Stage
from umrg.answers import Answer, parse_answer
from umrg.group import GroupSamples, SamplingParams
from umrg.images import encode_png
from umrg.masks import decode_rle
from umrg.mistake import Mistake
from umrg.pictures import overlay
from umrg.prompts import PromptSpec

_READY_SECONDS, _PROBE_SECONDS = 2.0, 10.0
"""How long the models count as ready once they were, and how long they may take to show it."""


@dataclass(frozen=True, kw_only=True)
class Served:
    """What the answers say of the models, and how the reasoner is prompted."""

    name: str
    expert: str
    licence: str
    spec: PromptSpec


class Decoder(Protocol):
    """Decodes image files, as `serving.decoding.Decoders` does."""

    async def decode(self, data: bytes, *, window: str | None, frame: int | None) -> NDArray[np.uint8]:
        """uint8 [H, W, 3], upright. Raises ValueError for what is no image, or takes too much to decode."""
        ...


@dataclass(frozen=True, kw_only=True)
class Earlier:
    """An image that an earlier request brought."""

    id: str
    """32 hex digits, as the earlier answer told them."""
    owner: str
    """Whose key asks now."""

    @property
    def kept_as(self) -> str:
        """Its id in the caches of the models. Whoever has the file can compute `id`, and `owner` is no secret: only
        with the key that comes with a request does an id lead to what was kept."""
        return _digest(f"{self.owner}\0{self.id}".encode())


@dataclass(frozen=True, kw_only=True)
class Upload:
    """An image as a request brought it."""

    data: bytes
    """The file."""
    owner: str
    """Whose key came with it."""
    window: str | None = None
    frame: int | None = None

    @cached_property
    def id(self) -> str:
        """32 hex digits, which name the file as it was decoded."""
        told = f"{self.window}\0{self.frame}\0".encode()
        return _digest(told + hashlib.sha256(self.data).digest())

    @property
    def kept_as(self) -> str:
        """Its id in the caches of the models."""
        return Earlier(id=self.id, owner=self.owner).kept_as


@dataclass(frozen=True, kw_only=True)
class Found:
    """An answered query, before it takes the form that the client asked for."""

    response: GroundResponse
    answer: Answer
    picture: Picture
    drawn: Drawn | None

    @property
    def mask(self) -> NDArray[np.bool_] | None:
        """bool [H, W]; None where the answer has no usable box and points."""
        return None if self.drawn is None else decode_rle(self.drawn.mask)

    def mask_png(self) -> bytes | None:
        mask = self.mask
        return None if mask is None else encode_png(mask)

    def overlay_png(self) -> bytes:
        """The image with what was found drawn on it."""
        found = self.answer
        return encode_png(overlay(self.picture.pixels, mask=self.mask, box=found.box, points=found.points))


class Clock:
    """The seconds of a request, by stage."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._began = self._last = time.monotonic()
        self.seconds: dict[Stage, float] = {}

    def lap(self, stage: Stage) -> None:
        """End a stage."""
        now = time.monotonic()
        self.seconds[stage] = now - self._last
        self._metrics.stage(stage, self.seconds[stage])
        self._last = now

    def timings(self) -> Timings:
        total = time.monotonic() - self._began
        self._metrics.stage("total", total)
        seconds = {"decode": 0.0, "reason": 0.0, "segment": 0.0, **self.seconds}
        return Timings(**seconds, total=total)


class Answering:
    """Answers queries, prompts and chats about images, each within `limits.request_seconds`."""

    def __init__(self, config: ServeConfig, served: Served, models: Models, decoder: Decoder, metrics: Metrics) -> None:
        self.config, self.served, self.models, self.metrics = config, served, models, metrics
        self._decoder = decoder
        self._seconds = config.limits.request_seconds
        self._probe: asyncio.Task[None] | None = None
        self._ready_until = 0.0

    async def ground(self, upload: Upload, query: str, options: GroundOptions, request_id: str) -> Found:
        """Answer a query. Raises ValueError for what is wrong with it, and `Failed` for what is not."""
        ask, clock = self._ask(query, options), Clock(self.metrics)
        async with _within(self._seconds):
            picture = await self._picture(upload, clock)
            async with _ahead(self.models, picture):
                samples = await self.models.sample(picture, ask)
                clock.lap("reason")
                return await self._found(upload, picture, samples, query, options, clock, request_id)

    async def ground_stream(
        self, upload: Upload, query: str, options: GroundOptions, request_id: str
    ) -> AsyncIterator[ReasoningEvent | AnswerEvent | GroundResponse]:
        """The completion as it is written (of several samples nothing), then box and points, then the whole answer."""
        ask, clock = self._ask(query, options), Clock(self.metrics)
        async with _within(self._seconds):
            picture = await self._picture(upload, clock)
            async with _ahead(self.models, picture):
                samples = None
                if ask.sampling.n > 1:
                    samples = await self.models.sample(picture, ask)
                else:
                    async for piece in self.models.stream(picture, ask):
                        if isinstance(piece, str):
                            yield ReasoningEvent(text=piece)
                        else:
                            samples = piece
                assert samples is not None, "a stream ends with the samples"
                clock.lap("reason")
                if len(samples.completions) == 1:
                    (answer,) = self._answers(samples)
                    yield self._answer_event(answer, ask)
                found = await self._found(upload, picture, samples, query, options, clock, request_id)
                if len(samples.completions) > 1:
                    yield self._answer_event(found.answer, ask)
                yield found.response

    async def segment(
        self, image: Upload | Earlier, options: SegmentOptions, request_id: str
    ) -> tuple[SegmentResponse, Drawn]:
        """The expert's mask for a caller's box or points, about an image or about one that was sent before with the
        same key."""
        prompt, clock = _prompt(options), Clock(self.metrics)
        async with _within(self._seconds):
            picture = None if isinstance(image, Earlier) else await self._picture(image, clock)
            drawn = await self.models.segment(image.kept_as, picture, prompt)
            clock.lap("segment")
            size = drawn.width, drawn.height
            fields = await self._mask_fields(drawn, size, options.mask, clock, image.id, request_id)
        return SegmentResponse(**fields), drawn

    async def chat(self, upload: Upload, ask: Ask) -> GroupSamples:
        """The completions of a chat's one message."""
        clock = Clock(self.metrics)
        async with _within(self._seconds):
            samples = await self.models.sample(await self._picture(upload, clock), ask)
            clock.lap("reason")
            self.metrics.tokens(samples)
            return samples

    async def chat_stream(self, upload: Upload, ask: Ask) -> AsyncIterator[str | GroupSamples]:
        """One completion as it is written, and then the whole."""
        clock = Clock(self.metrics)
        async with _within(self._seconds):
            async for piece in self.models.stream(await self._picture(upload, clock), ask):
                if not isinstance(piece, str):
                    clock.lap("reason")
                    self.metrics.tokens(piece)
                yield piece

    async def ready(self) -> None:
        """Raises where the models cannot ground a tiny image. They are asked once in a while, whoever calls. That needs
        no key, so all who call meanwhile share one answer."""
        if time.monotonic() < self._ready_until:
            return
        if self._probe is None or self._probe.done():
            self._probe = asyncio.create_task(self._probed())
        await asyncio.shield(self._probe)

    async def _probed(self) -> None:
        async with _within(min(_PROBE_SECONDS, self._seconds)):
            await self.models.ready()
        self._ready_until = time.monotonic() + _READY_SECONDS

    def _ask(self, query: str, options: GroundOptions) -> Ask:
        limits, rollout = self.config.limits, self.config.rollout
        # Before anything looks through the query: to find special tokens within special tokens takes long.
        if len(query) > limits.query_characters:
            raise Mistake(
                f"the query has {len(query)} characters, and {limits.query_characters} are allowed; shorten it"
            )
        check_query(query)
        if options.samples > limits.samples:
            raise Mistake(f"{options.samples} samples were asked for, and {limits.samples} are allowed; lower samples")
        several = options.samples > 1
        return Ask(
            text=query,
            think=options.think,
            sampling=SamplingParams(
                n=options.samples,
                temperature=rollout.temperature if several else 0.0,
                max_tokens=rollout.max_tokens,
                seed=options.seed if several else None,
            ),
        )

    async def _picture(self, upload: Upload, clock: Clock) -> Picture:
        pixels = await self._decoder.decode(upload.data, window=upload.window, frame=upload.frame)
        clock.lap("decode")
        return Picture(id=upload.kept_as, pixels=pixels)

    def _answers(self, samples: GroupSamples) -> list[Answer]:
        """In original pixels."""
        frame = self.served.spec.frame
        return [parse_answer(each.text).to_original(samples.frames, frame) for each in samples.completions]

    def _answer_event(self, answer: Answer, ask: Ask) -> AnswerEvent:
        return AnswerEvent(
            reasoning=answer.think,
            well_formed=answer.well_formed(think=self._thinks(ask.think)),
            box=answer.box,
            points=answer.points,
        )

    def _thinks(self, asked: bool | None) -> bool:
        return self.served.spec.think if asked is None else asked

    async def _found(
        self,
        upload: Upload,
        picture: Picture,
        samples: GroupSamples,
        query: str,
        options: GroundOptions,
        clock: Clock,
        request_id: str,
    ) -> Found:
        self.metrics.tokens(samples)
        answers = self._answers(samples)
        usable = any(answer.promptable for answer in answers)
        drawn = await self.models.draw(picture, answers) if usable else None
        clock.lap("segment")
        chosen = 0 if drawn is None else drawn.chosen
        answer, completion = answers[chosen], samples.completions[chosen]
        height, width = picture.pixels.shape[:2]
        response = GroundResponse(
            query=query,
            reasoning=answer.think,
            well_formed=answer.well_formed(think=self._thinks(options.think)),
            box=answer.box,
            points=answer.points,
            confidence=_confidence(drawn, options.samples),
            completion=completion.text,
            model=self.served.name,
            policy_version=completion.policy_version,
            **await self._mask_fields(drawn, (width, height), options.mask, clock, upload.id, request_id),
        )
        return Found(response=response, answer=answer, picture=picture, drawn=drawn)

    async def _mask_fields(
        self,
        drawn: Drawn | None,
        size: tuple[int, int],
        form: MaskFormat,
        clock: Clock,
        image_id: str,
        request_id: str,
    ) -> dict[str, Any]:
        """size: width and height of the image."""
        # A large mask takes long to decode and encode: not on the event loop, where others would wait.
        png = await asyncio.to_thread(_png, drawn) if drawn and form == "png" else None
        return {
            "mask": Rle.model_validate(drawn.mask) if drawn and form == "rle" else None,
            "mask_png": png,
            "score": drawn.score if drawn else None,
            "width": size[0],
            "height": size[1],
            "image_id": image_id,
            "expert": self.served.expert,
            "expert_licence": self.served.licence,
            "timings": clock.timings(),
            "request_id": request_id,
        }


def _digest(told: bytes) -> str:
    """32 hex digits."""
    return hashlib.sha256(told).hexdigest()[:32]


def _png(drawn: Drawn) -> str:
    """A mask as a PNG in base64."""
    return base64.b64encode(encode_png(decode_rle(drawn.mask))).decode()


@asynccontextmanager
async def _ahead(models: Models, picture: Picture) -> AsyncIterator[None]:
    """Have an image embedded while the reasoner writes. Whoever draws on it embeds it otherwise, so what goes wrong
    here is of no consequence."""
    task = asyncio.ensure_future(models.embed(picture))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def _within(seconds: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds) as limit:
            yield
    except TimeoutError:
        if not limit.expired():
            raise
        raise TimedOut(f"no answer within {seconds:g} s; try again later") from None


def _prompt(options: SegmentOptions) -> Prompt:
    if options.box is None and not options.points:
        raise Mistake("there is neither a box nor a point to draw a mask for; give at least one")
    labels = options.labels or (1,) * len(options.points)
    if len(labels) != len(options.points):
        raise Mistake(f"there are {len(labels)} labels of {len(options.points)} points; give one for each, or none")
    return Prompt(box=options.box, points=options.points, labels=labels)


def _confidence(drawn: Drawn | None, samples: int) -> float | None:
    """Of several answers of which none can be drawn, none agrees with another."""
    if samples == 1:
        return None
    return drawn.confidence if drawn else 0.0
