"""A service's client in Python:

    from serving.client import Client

    with Client("http://127.0.0.1:8000") as client:  # the key, where one is needed, from MEDREASONER_KEY
        found = client.ground("image.png", "Which organ pumps the blood?")
        print(found.reasoning, found.box, found.mask_array.sum())
        found.save("answers", "image")

`AsyncClient` has the same methods for asyncio. What is sent, what a reply means and what is sent again is the same for
both: generators that yield what to do next (`_Flow`), which either client drives.

Importing this module imports neither torch, Ray nor transformers.
"""

import asyncio
import base64
import codecs
import io
import json
import math
import os
import random
import time
from collections.abc import AsyncGenerator, Generator, Iterator, Mapping, Sequence
from contextlib import aclosing, closing, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cached_property
from http import HTTPStatus
from pathlib import Path
from typing import Any, Self, TypedDict, TypeVar, Unpack

import httpx
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, PrivateAttr, ValidationError, model_validator

from serving.api import (
    AnswerEvent,
    GroundOptions,
    GroundResponse,
    MaskAnswer,
    MaskFormat,
    Problem,
    ReasoningEvent,
    SegmentRequest,
    SegmentResponse,
)
from serving.grounder import Grounding, check_pixels, check_query, png_of_pil, read_file
from umrg.answers import parse_answer
from umrg.images import decode_image, decode_mask, encode_png
from umrg.masks import decode_rle, encode_rle
from umrg.mistake import Mistake
from umrg.pictures import overlay
from umrg.windowing import Window

__all__ = [
    "AnswerEvent",
    "AsyncClient",
    "Client",
    "Event",
    "EventParser",
    "Grounded",
    "Options",
    "ReasoningEvent",
    "RequestRefused",
    "Segmented",
    "ServiceBusy",
    "ServiceError",
    "ServiceFault",
    "Unreachable",
]

KEY_VARIABLE = "MEDREASONER_KEY"
"""The environment variable that holds a client's key."""
TIMEOUT = 180.0
"""Longest time of a call by default, in seconds: a service's own limits for sending and answering a request, and some
to try again."""
RETRIES = 3
"""How often a request is sent again by default."""

ImageLike = str | Path | bytes | Image.Image | NDArray[np.uint8]
"""A file's path, its bytes, a PIL image, or uint8 [H, W, 3] in RGB. Files are sent as they are, without their name;
the others as PNG."""

_EVENTS = "text/event-stream"
_CONNECT_SECONDS = 10.0
_PAUSE, _LONGEST_PAUSE = 0.5, 8.0
_LARGEST_REPLY = 256 << 20
_RETRIED = (429, 503, 504)
_LATER = (*_RETRIED, HTTPStatus.REQUEST_TIMEOUT)
_LATER_TYPES = ("overloaded", "unavailable", "timed_out")
_REFUSED_TYPES = ("bad_request", "invalid", "too_large")
_FOREIGN = "not_understood"

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")


class Options(TypedDict, total=False):
    """How a query is answered: the fields of `serving.api.GroundOptions`, which says what they are."""

    think: bool | None
    samples: int
    seed: int
    mask: MaskFormat
    window: str | None
    frame: int | None


class ServiceError(Exception):
    """A request that was not answered."""

    def __init__(
        self,
        detail: str,
        *,
        status: int | None = None,
        type: str = "unknown",
        request_id: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        """A sentence."""
        self.status = status
        """HTTP's; None where there was no reply, or where a stream that had begun ended with the problem."""
        self.type = type
        """The kind of problem, for programs (`serving.api.Problem`)."""
        self.request_id = request_id
        """Names the request in the service's log."""
        self.retry_after = retry_after
        """Seconds after which to try again, where the service says so."""

    def __str__(self) -> str:
        return self.detail if self.request_id is None else f"{self.detail} (request {self.request_id})"


class RequestRefused(ServiceError, Mistake):
    """The request itself is wrong: the image, the query, the options, the key, or the address. A ValueError."""

    def __str__(self) -> str:
        # No log is needed to mend it.
        return self.detail


class ServiceBusy(ServiceError):
    """The service cannot answer now, or not in time: try again later."""


class ServiceFault(ServiceError):
    """The service failed, or what answers is not a MedReasoner service."""


class Unreachable(ServiceError):
    """Nothing answers at the address, the connection broke off, or no answer came in time."""


class _Shown(MaskAnswer):
    """An answer with its mask, and the image where it is at hand."""

    _picture: "_Picture | None" = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _of_the_image(self) -> Self:
        if self.mask is not None and self.mask.size != (self.height, self.width):
            raise ValueError("the mask is not of the image's size")
        return self

    @property
    def mask_array(self) -> NDArray[np.bool_] | None:
        """The mask, bool [H, W]; None where there is none or it was not asked for. Raises ServiceFault where what came
        is no mask of the image's size."""
        try:
            if self.mask is not None:
                return self._from_rle(self.mask.model_dump())
            if self.mask_png is not None:
                return self._from_png(self.mask_png)
        except ValueError as error:
            raise ServiceFault(f"the service sent a damaged mask ({error}); ask again", type=_FOREIGN) from error
        return None

    @property
    def image(self) -> NDArray[np.uint8]:
        """The image [H, W, 3] that was asked about. Raises ValueError where only its id was sent."""
        if self._picture is None:
            raise Mistake("the image is not at hand, because only its id was sent; draw the mask on your own copy")
        return self._picture.pixels

    def _from_rle(self, encoded: dict[str, Any]) -> NDArray[np.bool_]:
        mask = decode_rle(encoded)
        # pycocotools leaves what no run covers as it finds it in memory.
        if encode_rle(mask)["counts"] != encoded["counts"]:
            raise ValueError("its runs do not cover the image")
        return mask

    def _from_png(self, encoded: str) -> NDArray[np.bool_]:
        mask = decode_mask(base64.b64decode(encoded, validate=True), "the mask")
        if mask.shape != (self.height, self.width):
            raise ValueError("it is not of the image's size")
        return mask


class Grounded(GroundResponse, _Shown):
    """The answer to a query. Its fields are those of `serving.api.GroundResponse`."""

    def grounding(self) -> Grounding:
        """The same as `serving.Grounder` gives it, with the decoded image."""
        written = parse_answer(self.completion)
        return Grounding(
            answer=replace(written, think=self.reasoning, box=self.box, points=self.points),
            completion=self.completion,
            image=self.image,
            mask=self.mask_array,
            score=self.score,
        )

    def overlay(self) -> NDArray[np.uint8]:
        """The image with mask, box and points drawn on it, uint8 [h, w, 3]."""
        return self.grounding().overlay()

    def save(self, folder: str | Path, name: str) -> list[Path]:
        """Write the files that `Grounding.save` writes: `<name>.overlay.png`, `<name>.json` and, where there is a mask,
        `<name>.mask.png`."""
        return self.grounding().save(folder, name)


class Segmented(SegmentResponse, _Shown):
    """The mask of a prompt. Its fields are those of `serving.api.SegmentResponse`."""

    _box: tuple[float, float, float, float] | None = PrivateAttr(default=None)

    def overlay(self) -> NDArray[np.uint8]:
        """The image with the mask and the prompt's box drawn on it, uint8 [h, w, 3]. Raises ValueError where only the
        image's id was sent."""
        return overlay(self.image, mask=self.mask_array, box=self._box)


Event = ReasoningEvent | AnswerEvent | Grounded
"""What `ground_stream` gives: pieces of the completion, then box and points, then the whole answer with its mask."""


class Client:
    """Asks a service, one call after another or from several threads. Close it, or use it in a `with`.

    Every call is made again where the service is busy (429, 503, 504, after the time that it asks for) or the
    connection fails: nothing that a call does changes the service. Every call raises ServiceError: RequestRefused,
    which is a ValueError, for what is wrong with the request, ServiceBusy, ServiceFault, or Unreachable.
    """

    def __init__(self, url: str, *, key: str | None = None, timeout: float = TIMEOUT, retries: int = RETRIES) -> None:
        """url: http(s)://HOST:PORT, with the path where the service lies beneath one. key: by default that of the
        environment variable MEDREASONER_KEY, if there is one. timeout: longest time of a call in seconds, with all that
        is sent again; of a reply that comes bit by bit up to twice that. retries: how often a request may be sent
        again. The environment variable SSL_CERT_FILE names certificates of an authority of one's own. Raises ValueError
        for what is no address or no key."""
        self._service = _Service(url, key, timeout, retries)
        self._http = httpx.Client(mounts=dict.fromkeys(_THIS_MACHINE))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connections."""
        self._http.close()

    def ground(self, image: ImageLike, query: str, **options: Unpack[Options]) -> Grounded:
        """Answer a query about an image. Raises ValueError, too, for what is no image, an empty query, and options that
        cannot be."""
        return self._drive(self._service.grounded(_grounding(image, query, options)))

    def ground_stream(self, image: ImageLike, query: str, **options: Unpack[Options]) -> Generator[Event, None, None]:
        """Answer a query about an image while it is answered: `ReasoningEvent`s, an `AnswerEvent`, and a `Grounded`. A
        request whose stream has begun is not made again."""
        call = _grounding(image, query, options, accept=_EVENTS)
        with closing(self._drive(self._service.opened(call))) as stream, stream.told():
            for chunk in stream.response.iter_bytes():
                yield from stream.heard(chunk)
            yield from stream.ended()

    def segment(
        self,
        image: ImageLike | None = None,
        *,
        image_id: str | None = None,
        box: Sequence[float] | None = None,
        points: Sequence[Sequence[float]] = (),
        labels: Sequence[int] = (),
        window: str | None = None,
        frame: int | None = None,
    ) -> Segmented:
        """The expert's mask for a box, points, or both, in pixels of the upright image.

        image, image_id: one of both; the id is that of an earlier answer, and the service forgets it after a while
        (RequestRefused of the type `unknown_image`). box: XYXY, inclusive maximum. points: XY. labels: of each point, 1
        within the mask and 0 outside it; all 1 where left out. window, frame: as in `GroundOptions`.
        """
        call = _segmenting(image, image_id, box, points, labels, window, frame)
        return self._drive(self._service.segmented(call))

    def health(self) -> bool:
        """Whether the service is up. Raises ServiceError where something else answers."""
        return self._drive(self._service.standing("/healthz"))

    def ready(self) -> bool:
        """Whether it can ground an image. Raises ServiceError where something else answers."""
        return self._drive(self._service.standing("/readyz"))

    def _drive(self, flow: "_Flow[T]") -> T:
        try:
            step = next(flow)
            while True:
                try:
                    done = self._do(step)
                except httpx.RequestError as error:
                    step = flow.throw(error)
                else:
                    step = flow.send(done)
        except StopIteration as end:
            result: T = end.value
            return result

    def _do(self, step: "_Send | float") -> "_Reply":
        if isinstance(step, float):
            time.sleep(step)
            return _NOTHING
        response = self._http.send(step.request, stream=True)
        if step.streamed and response.is_success:
            return _Reply(response)
        with closing(response):
            return _Reply(response, b"".join(step.bound.kept(chunk) for chunk in response.iter_bytes()))


class AsyncClient:
    """`Client` for asyncio: the same arguments, methods and errors. Files are read and encoded in a thread."""

    def __init__(self, url: str, *, key: str | None = None, timeout: float = TIMEOUT, retries: int = RETRIES) -> None:
        """As `Client` takes them."""
        self._service = _Service(url, key, timeout, retries)
        self._http = httpx.AsyncClient(mounts=dict.fromkeys(_THIS_MACHINE))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End the connections."""
        await self._http.aclose()

    async def ground(self, image: ImageLike, query: str, **options: Unpack[Options]) -> Grounded:
        """As `Client.ground`."""
        return await self._drive(self._service.grounded(await asyncio.to_thread(_grounding, image, query, options)))

    async def ground_stream(
        self, image: ImageLike, query: str, **options: Unpack[Options]
    ) -> AsyncGenerator[Event, None]:
        """As `Client.ground_stream`."""
        call = await asyncio.to_thread(_grounding, image, query, options, accept=_EVENTS)
        stream = await self._drive(self._service.opened(call))
        async with aclosing(stream.response):
            with stream.told():
                async for chunk in stream.response.aiter_bytes():
                    for event in stream.heard(chunk):
                        yield event
                for event in stream.ended():
                    yield event

    async def segment(
        self,
        image: ImageLike | None = None,
        *,
        image_id: str | None = None,
        box: Sequence[float] | None = None,
        points: Sequence[Sequence[float]] = (),
        labels: Sequence[int] = (),
        window: str | None = None,
        frame: int | None = None,
    ) -> Segmented:
        """As `Client.segment`."""
        call = await asyncio.to_thread(_segmenting, image, image_id, box, points, labels, window, frame)
        return await self._drive(self._service.segmented(call))

    async def health(self) -> bool:
        """As `Client.health`."""
        return await self._drive(self._service.standing("/healthz"))

    async def ready(self) -> bool:
        """As `Client.ready`."""
        return await self._drive(self._service.standing("/readyz"))

    async def _drive(self, flow: "_Flow[T]") -> T:
        try:
            step = next(flow)
            while True:
                try:
                    done = await self._do(step)
                except httpx.RequestError as error:
                    step = flow.throw(error)
                else:
                    step = flow.send(done)
        except StopIteration as end:
            result: T = end.value
            return result

    async def _do(self, step: "_Send | float") -> "_Reply":
        if isinstance(step, float):
            await asyncio.sleep(step)
            return _NOTHING
        response = await self._http.send(step.request, stream=True)
        if step.streamed and response.is_success:
            return _Reply(response)
        async with aclosing(response):
            return _Reply(response, b"".join([step.bound.kept(chunk) async for chunk in response.aiter_bytes()]))


class EventParser:
    """Server-sent events (WHATWG HTML, 9.2), from bytes cut anywhere.

    Of an event's fields its name and data are given; ids and times to reconnect serve a browser's reconnection, which
    an answer does not have. An event that a carriage return alone ends is given with the bytes that follow.
    """

    def __init__(self) -> None:
        utf8 = codecs.getincrementaldecoder("utf-8-sig")("replace")
        # All three kinds of line ends become line feeds.
        self._text = io.IncrementalNewlineDecoder(utf8, translate=True)
        self._line: list[str] = []
        self._name, self._data = "", list[str]()

    def feed(self, chunk: bytes, *, final: bool = False) -> list[tuple[str, str]]:
        """The events, as name and data, that end within a chunk. final: whether it is the last one; an event that it
        leaves open never happened."""
        *ended, rest = self._text.decode(chunk, final).split("\n")
        found = []
        for part in ended:
            line = "".join((*self._line, part))
            self._line = []
            if line:
                self._take(line)
            else:
                found += [(self._name or "message", "\n".join(self._data))] if self._data else []
                self._name, self._data = "", []
        self._line.append(rest)
        return found

    def _take(self, line: str) -> None:
        # A comment has a name of no characters.
        name, _, value = line.partition(":")
        if name == "event":
            self._name = value.removeprefix(" ")
        elif name == "data":
            self._data.append(value.removeprefix(" "))


@dataclass(frozen=True, kw_only=True)
class _Picture:
    """An image file, as it is sent."""

    data: bytes = field(repr=False)
    name: str
    window: str | None
    page: int | None

    @cached_property
    def pixels(self) -> NDArray[np.uint8]:
        """uint8 [H, W, 3], as the service decodes it."""
        window = None if self.window is None else Window.parse(self.window)
        return decode_image(self.data, self.name, window=window, frame=self.page)


@dataclass(frozen=True, kw_only=True)
class _Call:
    """A request before it is addressed."""

    method: str
    path: str
    accept: str = "application/json"
    body: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """httpx' arguments of the content."""
    picture: _Picture | None = None
    box: tuple[float, float, float, float] | None = None


class _Bound:
    """How long a reply may take and how large it may be."""

    def __init__(self, seconds: float) -> None:
        self.ends, self._bytes = time.monotonic() + seconds, 0

    @property
    def left(self) -> float:
        return self.ends - time.monotonic()

    def kept(self, chunk: bytes) -> bytes:
        """The chunk. Raises httpx.ReadTimeout after the end, and ServiceFault for more than any answer has."""
        self._bytes += len(chunk)
        if self._bytes > _LARGEST_REPLY:
            raise ServiceFault(f"the reply is larger than {_LARGEST_REPLY >> 20} MiB", type=_FOREIGN)
        if self.left < 0:
            raise httpx.ReadTimeout("the reply came too slowly")
        return chunk


@dataclass(frozen=True)
class _Send:
    """A request to send now."""

    request: httpx.Request
    bound: _Bound
    streamed: bool


@dataclass(frozen=True)
class _Reply:
    """What came back: all of it, or a stream that has just begun."""

    response: httpx.Response
    body: bytes = b""


_NOTHING = _Reply(httpx.Response(204))
"""What comes of a pause."""
_Flow = Generator[_Send | float, _Reply, T]
"""A call as its steps: requests to send and pauses in seconds. Gets each reply, or the httpx.RequestError in its place,
and returns what the call found."""
_THIS_MACHINE = ("all://127.0.0.1", "all://localhost", "all://[::1]")
"""Addresses that are not asked for through a proxy, whatever the environment says."""


class _Service:
    """What is sent to a service, what its replies mean, and what is sent again. Sends nothing itself."""

    def __init__(self, url: str, key: str | None, timeout: float, retries: int) -> None:
        if not (timeout > 0 and math.isfinite(timeout)) or retries < 0:
            raise Mistake(f"timeout is a time above 0 in seconds and retries at least 0, not {timeout} and {retries}")
        self.url, self._timeout, self._retries = _address(url), timeout, retries
        key = _checked_key(key if key is not None else os.environ.get(KEY_VARIABLE, ""))
        self._headers = {"User-Agent": "medreasoner"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def grounded(self, call: _Call) -> "_Flow[Grounded]":
        reply = yield from self._exchange(call)
        return self.shown(reply.body, call)

    def shown(self, body: bytes | str, call: _Call) -> Grounded:
        found = self._parsed(Grounded, body)
        found._picture = call.picture
        return found

    def segmented(self, call: _Call) -> "_Flow[Segmented]":
        reply = yield from self._exchange(call)
        found = self._parsed(Segmented, reply.body)
        found._picture, found._box = call.picture, call.box
        return found

    def opened(self, call: _Call) -> "_Flow[_Stream]":
        bound = _Bound(self._timeout)
        reply = yield from self._exchange(call, bound)
        return _Stream(self, call, reply.response, bound)

    def standing(self, path: str) -> "_Flow[bool]":
        """Whether it answers there. A service that is about to start is none yet, and so nothing is sent again."""
        try:
            reply = yield from self._exchange(_Call(method="GET", path=path), retries=0)
        except (ServiceBusy, Unreachable):
            return False
        if not isinstance(_json(reply.body), dict):
            raise self._foreign(reply.response)
        return True

    def _exchange(self, call: _Call, bound: _Bound | None = None, retries: int | None = None) -> "_Flow[_Reply]":
        """Send a request until it is answered with success, or raise ServiceError."""
        bound = bound or _Bound(self._timeout)
        left, pauses = self._retries if retries is None else retries, _pauses()
        while True:
            failure: ServiceError
            try:
                reply = yield _Send(self._request(call, bound), bound, call.accept == _EVENTS)
            except httpx.RequestError as error:
                failure = self.lost(error)
                failure.__cause__ = error
            else:
                if reply.response.is_success:
                    return reply
                failure = self._problem(reply)
            pause = next(pauses) if failure.retry_after is None else failure.retry_after
            # Not at the moment at which all others send theirs again.
            pause *= random.uniform(1.0, 1.25)
            if not left or not _passing(failure) or pause >= bound.left:
                raise failure
            left -= 1
            yield pause

    def _request(self, call: _Call, bound: _Bound) -> httpx.Request:
        left = max(bound.left, 0.001)
        timeout = httpx.Timeout(left, connect=min(left, _CONNECT_SECONDS))
        return httpx.Request(
            call.method,
            self.url + call.path,
            headers={"Accept": call.accept, **self._headers},
            extensions={"timeout": timeout.as_dict()},
            **call.body,
        )

    def lost(self, error: httpx.RequestError) -> Unreachable:
        """What a failed connection means."""
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout)):
            detail = f"nothing answers at {self.url} ({reason}); check the address, and that the service runs"
        elif isinstance(error, httpx.TimeoutException):
            detail = f"{self.url} did not answer within {self._timeout:g} s; try again later, or allow more time"
        else:
            detail = f"the connection to {self.url} broke off ({reason}); try again, or check the address"
        return Unreachable(detail, type="unreachable")

    def _problem(self, reply: _Reply) -> ServiceError:
        """What a reply without success means."""
        response = reply.response
        try:
            told = Problem.model_validate_json(reply.body)
        except ValidationError:
            return self._foreign(response)
        return _kind(response.status_code)(
            told.detail,
            status=response.status_code,
            type=told.type,
            request_id=told.request_id,
            retry_after=_retry_after(response),
        )

    def _foreign(self, response: httpx.Response) -> ServiceError:
        """What a reply means that is none of the service's own: of a proxy, or of something else at the address."""
        status = response.status_code
        if response.has_redirect_location:
            detail = (
                f"{self.url} redirects ({status}) to {response.headers['Location']!r}; give the service's own address"
            )
        else:
            phrase = HTTPStatus(status).phrase if status in {*HTTPStatus} else "unknown"
            detail = (
                f"{self.url} answered {status} ({phrase}), and not as a MedReasoner service does; check the address"
            )
        return _kind(status)(detail, status=status, type=_FOREIGN, retry_after=_retry_after(response))

    def _parsed(self, model: type[M], body: bytes | str) -> M:
        try:
            return model.model_validate_json(body)
        except ValidationError as error:
            fault = error.errors()[0]
            place = ".".join(map(str, fault["loc"])) or "the whole"
            raise ServiceFault(
                f"{self.url} did not answer as a MedReasoner service of this version does ({place}: {fault['msg']}); "
                "check the address and both versions",
                type=_FOREIGN,
            ) from error

    def event(self, name: str, data: str, call: _Call) -> Event | None:
        """An event of a stream; None for one that this version does not know. Raises ServiceError for a problem."""
        if name == "reasoning":
            return self._parsed(ReasoningEvent, data)
        if name == "answer":
            return self._parsed(AnswerEvent, data)
        if name == "mask":
            return self.shown(data, call)
        if name == "error":
            told = self._parsed(Problem, data)
            raise _kind_of_type(told.type)(told.detail, type=told.type, request_id=told.request_id)
        return None


class _Stream:
    """The events of a reply that has begun."""

    def __init__(self, service: _Service, call: _Call, response: httpx.Response, bound: _Bound) -> None:
        self.response = response
        self._service, self._call, self._bound = service, call, bound
        self._parser, self._whole = EventParser(), False

    def close(self) -> None:
        self.response.close()

    @contextmanager
    def told(self) -> Iterator[None]:
        """Tell of a connection that breaks off in the words of every other call."""
        try:
            yield
        except httpx.RequestError as error:
            raise self._service.lost(error) from error

    def heard(self, chunk: bytes, *, final: bool = False) -> list[Event]:
        """The events that end within a chunk."""
        self._bound.kept(chunk)
        told = [self._service.event(*event, self._call) for event in self._parser.feed(chunk, final=final)]
        events = [event for event in told if event is not None]
        self._whole = self._whole or any(isinstance(event, Grounded) for event in events)
        return events

    def ended(self) -> list[Event]:
        """The last events. Raises Unreachable where the answer is not whole."""
        events = self.heard(b"", final=True)
        if not self._whole:
            raise Unreachable(f"{self._service.url} ended its answer before the mask; ask again", type="unreachable")
        return events


def _grounding(image: ImageLike, query: str, options: Options, accept: str = "application/json") -> _Call:
    """A query as a form. Raises ValueError for an empty one, for what is no image, and for unknown options."""
    check_query(query)
    chosen = GroundOptions.model_validate(options)
    picture = _picture(image, chosen.window, chosen.frame)
    fields = chosen.model_dump(exclude_unset=True, exclude_none=True)
    return _Call(
        method="POST",
        path="/v1/ground",
        accept=accept,
        body={"files": _files(picture), "data": {"query": query, **fields}},
        picture=picture,
    )


def _segmenting(
    image: ImageLike | None,
    image_id: str | None,
    box: Sequence[float] | None,
    points: Sequence[Sequence[float]],
    labels: Sequence[int],
    window: str | None,
    frame: int | None,
) -> _Call:
    """A prompt as a form with a file, or as JSON with an id."""
    if (image is None) == (image_id is None):
        raise Mistake("give either an image or the image_id of an earlier answer")
    given = {
        "image_id": image_id,
        "box": None if box is None else tuple(float(edge) for edge in box),
        "points": tuple(tuple(float(place) for place in point) for point in points),
        "labels": tuple(int(label) for label in labels),
        "window": window,
        "frame": frame,
    }
    prompt = SegmentRequest.model_validate(given)
    if prompt.box is None and not prompt.points:
        raise Mistake("the prompt is empty; give a box, points, or both")
    if prompt.labels and len(prompt.labels) != len(prompt.points):
        raise Mistake(f"there are {len(prompt.points)} points and {len(prompt.labels)} labels; give each point one")
    call = _Call(method="POST", path="/v1/segment", box=prompt.box)
    if image is None:
        return replace(call, body={"json": prompt.model_dump(mode="json", exclude_defaults=True)})
    picture = _picture(image, window, frame)
    fields = {
        "box": "" if prompt.box is None else _numbers(prompt.box),
        "points": ";".join(map(_numbers, prompt.points)),
        "labels": _numbers(prompt.labels),
        **({} if window is None else {"window": window}),
        **({} if frame is None else {"frame": frame}),
    }
    written = {name: value for name, value in fields.items() if value != ""}
    return replace(call, body={"files": _files(picture), "data": written}, picture=picture)


def _picture(image: ImageLike, window: str | None, page: int | None) -> _Picture:
    name = str(image) if isinstance(image, (str, Path)) else "the image"
    return _Picture(data=_encoded(image), name=name, window=window, page=page)


def _encoded(image: ImageLike) -> bytes:
    """The file to send. Raises ValueError for what is no file or cannot be an image."""
    if isinstance(image, (str, Path)):
        return read_file(Path(image))
    if isinstance(image, bytes):
        return image
    if isinstance(image, Image.Image):
        return png_of_pil(image)
    if not isinstance(image, np.ndarray):
        raise TypeError(f"an image is a path, bytes, a PIL image or an array, not {type(image).__name__}")
    check_pixels(image)
    return encode_png(image)


def _files(picture: _Picture) -> dict[str, tuple[str, bytes, str]]:
    """httpx' files. The name stays here: it may be a patient's."""
    return {"image": ("image", picture.data, "application/octet-stream")}


def _numbers(values: Sequence[float]) -> str:
    return ",".join(map(str, values))


def _address(url: str) -> str:
    """Without a slash at its end. Raises ValueError for what is no address."""
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, TypeError):
        parsed = httpx.URL("")
    if parsed.userinfo:
        raise Mistake(f"the service's address has a user or password in it; give the key in {KEY_VARIABLE} instead")
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.query or parsed.fragment:
        raise Mistake(f"{url!r} is no service's address; give http://HOST:PORT or https://HOST:PORT")
    return str(parsed).rstrip("/")


def _checked_key(key: str) -> str:
    """Without white space around it. Raises ValueError, which does not repeat it, for what no header can carry."""
    stripped = key.strip()
    if not (stripped.isascii() and stripped.isprintable()) or " " in stripped:
        raise Mistake("the key has characters that no key has; give it as `medreasoner key` printed it")
    return stripped


def _kind(status: int) -> type[ServiceError]:
    if status in _LATER:
        return ServiceBusy
    return RequestRefused if 300 <= status < 500 else ServiceFault


def _kind_of_type(type: str) -> "type[ServiceError]":
    """The kind of a problem that came without a status."""
    if type in _LATER_TYPES:
        return ServiceBusy
    return RequestRefused if type in _REFUSED_TYPES else ServiceFault


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds until the time that the header Retry-After names, in either of its forms; None where it names none."""
    text = response.headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdigit():
        return min(float(text), 1e9)
    try:
        date = parsedate_to_datetime(text)
    except ValueError:
        return None
    return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


def _passing(failure: ServiceError) -> bool:
    """Whether the same request may be answered when it is sent again."""
    return isinstance(failure, Unreachable) or failure.status in _RETRIED


def _pauses() -> Iterator[float]:
    """Seconds until a request is sent again, where the service asks for none: longer each time."""
    pause = _PAUSE
    while True:
        yield pause
        pause = min(2 * pause, _LONGEST_PAUSE)


def _json(body: bytes) -> object:
    """The JSON value; None if the text is not valid JSON."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None
