"""The HTTP interface: what each route takes, and the forms in which it answers."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from pydantic import BaseModel
from starlette._utils import get_route_path
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse

from serving import chat, documentation, errors
from serving.answering import Answering, Earlier, Upload
from serving.api import (
    AnswerEvent,
    GroundOptions,
    GroundRequest,
    GroundResponse,
    ReasoningEvent,
    SegmentOptions,
    SegmentRequest,
    SegmentResponse,
)
from serving.chat import ChatRequest, ChatResponse, ModelList
from serving.documentation import EVENT, PICTURE
from serving.forms import media_type, read, read_json
from serving.streams import in_one_task, server_sent
from umrg.images import encode_png
from umrg.masks import decode_rle
from umrg.mistake import Mistake

MASK, OVERLAY, EVENTS, JSON = "image/png", "image/vnd.medreasoner.overlay+png", "text/event-stream", "application/json"
"""The media types of an answer."""
T = TypeVar("T")
_NUMBERS = frozenset({"box", "points", "labels"})
_ASKED = documentation.problems(401, 403, 429)
"""Of a route that needs a key and takes nothing."""
_EVENTS = {ReasoningEvent: "reasoning", AnswerEvent: "answer", GroundResponse: "mask"}
_NAMED = {
    **EVENT,
    "properties": {**EVENT["properties"], "event": {"enum": [*_EVENTS.values(), "error"]}},
    "required": ["event", "data"],
}


class GroundForm(GroundOptions):
    """A form's fields, beside its file."""

    query: str


def build_api(answering: Answering, exposition: Callable[[], Any]) -> FastAPI:
    """The application. exposition: a coroutine function that gives the metrics as Prometheus' text."""
    api = FastAPI(
        title="MedReasoner",
        version="1",
        summary="Ask a medical image an implicit question.",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        # The address would be made of the client's own Host header.
        redirect_slashes=False,
    )
    errors.install(api)
    _add_grounding(api, answering)
    _add_segmenting(api, answering)
    _add_chat(api, answering)
    _add_operation(api, answering, exposition)
    _add_documentation(api)
    return api


def _add_grounding(api: FastAPI, answering: Answering) -> None:
    @api.post(
        "/v1/ground",
        summary="Ground a query in an image",
        response_model=GroundResponse,
        openapi_extra=documentation.body(GroundRequest, GroundForm, documentation.GROUND),
        responses=documentation.responses({MASK: PICTURE, OVERLAY: PICTURE, EVENTS: _NAMED}, missing={404}),
    )
    async def ground(request: Request) -> Response:
        form = accepted(request.headers.get("accept"), (JSON, MASK, OVERLAY, EVENTS))
        model: type[GroundRequest | GroundForm] = GroundRequest if media_type(request) == JSON else GroundForm
        data, fields = await read(request, model)
        if data is None:
            raise Mistake("there is no image; send its file as the form's field image")
        options = GroundOptions(**{name: getattr(fields, name) for name in GroundOptions.model_fields})
        upload = _upload(request, data, options)
        if form == EVENTS:
            events = answering.ground_stream(upload, fields.query, options, _id(request))
            return await _streamed(_ground_events(events), request)
        found = await answering.ground(upload, fields.query, options, _id(request))
        if form == JSON:
            return _json(found.response)
        return await _picture(found.overlay_png if form == OVERLAY else found.mask_png, form)


def _add_segmenting(api: FastAPI, answering: Answering) -> None:
    @api.post(
        "/v1/segment",
        summary="Draw the mask of a box or of points",
        response_model=SegmentResponse,
        openapi_extra=documentation.body(SegmentRequest, SegmentRequest, documentation.SEGMENT),
        responses=documentation.responses({MASK: PICTURE}, missing={204}),
    )
    async def segment(request: Request) -> Response:
        form = accepted(request.headers.get("accept"), (JSON, MASK))
        data, fields = await read(request, SegmentRequest, parts=_NUMBERS)
        if (data is None) == (fields.image_id is None):
            raise Mistake("give either an image or the image_id of one that was sent before")
        image: Upload | Earlier
        if data is None:
            image = Earlier(id=str(fields.image_id), owner=_owner(request))
        else:
            image = _upload(request, data, fields)
        response, drawn = await answering.segment(image, fields, _id(request))
        if form == JSON:
            return _json(response)
        return await _picture(lambda: encode_png(decode_rle(drawn.mask)), MASK)


def _add_chat(api: FastAPI, answering: Answering) -> None:
    @api.post(
        "/v1/chat/completions",
        summary="OpenAI's chat completions: one question about one image",
        response_model=ChatResponse,
        responses=documentation.responses({EVENTS: EVENT}, missing={204, 404, 406}),
        openapi_extra=documentation.CHAT,
    )
    async def chat_completions(request: Request) -> Response:
        asked = await read_json(request, ChatRequest)
        data, ask = await asked.parsed(answering.config)
        upload, name = Upload(data=data, owner=_owner(request)), answering.served.name
        if not asked.stream:
            return _json(chat.completion(_id(request), name, await answering.chat(upload, ask)))
        pieces = answering.chat_stream(upload, ask) if asked.n == 1 else _one(answering.chat(upload, ask))
        chunks = chat.chunks(_id(request), name, pieces, with_usage=asked.with_usage)
        return await _streamed(chunks, request)

    @api.get("/v1/models", summary="OpenAI's list of models, which is one", responses=_ASKED)
    async def models() -> ModelList:
        return chat.models(answering.served.name)


def _add_operation(api: FastAPI, answering: Answering, exposition: Callable[[], Any]) -> None:
    @api.get(
        "/healthz",
        summary="Whether the service is up",
        responses=documentation.problems(403),
        openapi_extra=documentation.OPEN,
    )
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @api.get(
        "/readyz",
        summary="Whether it can ground an image: a tiny one is grounded",
        responses=documentation.problems(403, 429, 500, 503, 504),
        openapi_extra=documentation.OPEN,
    )
    async def ready() -> dict[str, str]:
        await answering.ready()
        return {"status": "ready"}

    @api.get(
        "/metrics",
        summary="Prometheus' metrics of the whole service",
        response_class=Response,
        responses={
            200: {"content": {"text/plain": {"schema": {"type": "string"}}}},
            **_ASKED,
            **documentation.problems(500),
        },
    )
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(await exposition(), media_type="text/plain; version=0.0.4")


def _add_documentation(api: FastAPI) -> None:
    @api.get("/openapi.json", include_in_schema=False)
    async def openapi() -> JSONResponse:
        return JSONResponse(documentation.document(api))

    @api.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(documentation.page(documentation.document(api)))

    @api.get("/docs/style.css", include_in_schema=False)
    async def style() -> Response:
        return Response(documentation.STYLE, media_type="text/css")


def accepted(header: str | None, offered: tuple[str, ...]) -> str:
    """The media type, of those that are offered, that an Accept header likes most; the first one where it likes all.
    Raises HTTPException (406) where it likes none."""
    wishes = []
    for wish in (header or "*/*").split(","):
        kind, *parameters = (part.strip().lower() for part in wish.split(";"))
        quality = next((part[2:] for part in parameters if part.startswith("q=")), "1")
        try:
            wishes.append((-float(quality), kind))
        except ValueError:
            continue
    for refused, kind in sorted(wishes, key=lambda wish: wish[0]):
        for media in offered:
            if refused < 0 and kind in (media, "*/*", f"{media.partition('/')[0]}/*"):
                return media
    raise HTTPException(406, f"this is answered as {', '.join(offered)}")


def _upload(request: Request, data: bytes, options: GroundOptions | SegmentOptions) -> Upload:
    return Upload(data=data, owner=_owner(request), window=options.window, frame=options.frame)


def _id(request: Request) -> str:
    """As the guard has given it."""
    return str(request.state.request_id)


def _owner(request: Request) -> str:
    return str(request.state.owner)


def _json(response: BaseModel) -> Response:
    return Response(response.model_dump_json(), media_type=JSON)


async def _picture(encoded: Callable[[], bytes | None], media: str) -> Response:
    """A picture, drawn and encoded off the event loop; no content where there is none to draw."""
    content = await asyncio.to_thread(encoded)
    return Response(status_code=204) if content is None else Response(content, media_type=media)


async def _one(answer: Awaitable[T]) -> AsyncIterator[T]:
    yield await answer


async def _ground_events(events: AsyncIterator[ReasoningEvent | AnswerEvent | GroundResponse]) -> AsyncIterator[str]:
    async for event in events:
        yield server_sent(_EVENTS[type(event)], event)


async def _streamed(events: AsyncIterator[str], request: Request) -> StreamingResponse:
    """Server-sent events. The first is awaited here, so that what goes wrong before it has a status of its own."""
    running = in_one_task(events)
    first = await anext(running)
    return StreamingResponse(_to_the_end(first, running, request), media_type=EVENTS)


async def _to_the_end(first: str, events: AsyncGenerator[str, None], request: Request) -> AsyncIterator[str]:
    async with aclosing(events):
        yield first
        try:
            async for event in events:
                yield event
        except Exception as error:  # noqa: BLE001  # the status is sent already: whatever it is, it is told here
            told = errors.problem_of(error, _id(request))
            yield server_sent("error", errors.written(told, get_route_path(request.scope)))
