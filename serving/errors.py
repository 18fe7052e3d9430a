"""Every error as an HTTP status and a `Problem`. A client learns what to change, or when to try again; of a fault of
ours it learns the request's id alone. What a client sent is neither repeated here nor logged."""

import math
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serving.api import Problem
from serving.messages import Failed, Overloaded, TimedOut, Unavailable, UnknownImage
from umrg.mistake import Mistake

_FAILURES: dict[type[Failed], tuple[int, str, str, float | None]] = {
    Overloaded: (429, "overloaded", "the service has as many requests as it can take; try again later", 1.0),
    Unavailable: (503, "unavailable", "a part of the service is being replaced; try again later", 5.0),
    TimedOut: (504, "timed_out", "the request lasted longer than a request may; try again later", 5.0),
    UnknownImage: (404, "unknown_image", "no image is kept under this id; send the image again", None),
}
"""Status, type, the sentence where the error has none, and after how many seconds to try again."""

_TYPES = {408: "timed_out", 413: "too_large", 422: "invalid", 429: "overloaded", 500: "internal", 503: "unavailable"}
_TYPES |= {504: "timed_out"}
"""Of statuses whose type is not their phrase."""

_SENTENCES = {
    404: "there is nothing at this path; see /docs",
    405: "this path is not asked with this method; see /docs",
}
"""In place of a bare phrase."""

_REPEATING = {"union_tag_invalid", "get_attribute_error", "mapping_type", "date_parsing", "datetime_parsing"}
_REPEATING |= {"time_parsing", "time_delta_parsing", "date_from_datetime_parsing", "url_parsing", "uuid_parsing"}
"""Faults whose message may hold a part of the value."""

_NAME = 64
"""Characters of a field's name that are shown: an unknown field has the name that the client gave it."""


def problem(status: int, type: str, detail: str, request_id: str, retry_after: float | None = None) -> JSONResponse:
    """The response that tells a problem. type: its kind, for programs. detail: a sentence. request_id: names the
    request in the log. retry_after: seconds after which to try again, as a header rounded up."""
    told = Problem(detail=detail, type=type, request_id=request_id)
    headers = {} if retry_after is None else {"Retry-After": str(max(1, math.ceil(retry_after)))}
    return JSONResponse(told.model_dump(), status_code=status, headers=headers)


def internal(request_id: str) -> JSONResponse:
    """The response for a fault of ours."""
    detail = f"the service failed; its log has the error under the id {request_id}"
    return problem(500, "internal", detail, request_id)


def install(api: FastAPI) -> None:
    """Register the handlers that make a `Problem` of each error of a route. `serving.guard.Guard` goes around the
    application: it names requests, and catches what escapes."""
    api.add_exception_handler(Mistake, _mistake)
    for failure in _FAILURES:
        api.add_exception_handler(failure, _failure)
    api.add_exception_handler(RequestValidationError, _invalid)
    api.add_exception_handler(HTTPException, _http)
    api.add_exception_handler(Exception, _fault)


def bare(error: BaseException) -> BaseException:
    """The error itself: Ray wraps what a replica raises, and puts the whole traceback into the message."""
    cause = getattr(error, "cause", error)
    return cause if isinstance(cause, BaseException) else error


async def _mistake(request: Request, error: Exception) -> Response:
    return problem(400, "bad_request", str(bare(error)), _id(request))


async def _failure(request: Request, error: Exception) -> Response:
    found = bare(error)
    status, type, sentence, retry_after = next(told for kind, told in _FAILURES.items() if isinstance(error, kind))
    return problem(status, type, str(found) or sentence, _id(request), retry_after)


async def _invalid(request: Request, error: Exception) -> Response:
    faults: Sequence[Any] = error.errors() if isinstance(error, RequestValidationError) else ()
    return problem(422, "invalid", "; ".join(map(_fault_in_words, faults)), _id(request))


async def _http(request: Request, error: Exception) -> Response:
    found = bare(error)
    if not isinstance(found, HTTPException):
        return internal(_id(request))
    status, detail = found.status_code, str(found.detail)
    phrase = HTTPStatus(status).phrase
    type = _TYPES.get(status, phrase.lower().replace(" ", "_"))
    response = problem(status, type, _SENTENCES.get(status, detail) if detail == phrase else detail, _id(request))
    response.headers.update(found.headers or {})
    return response


async def _fault(request: Request, _: Exception) -> Response:
    # Starlette raises the error again after this answer, and the guard logs it.
    return internal(_id(request))


def _id(request: Request) -> str:
    state: Mapping[str, Any] = request.scope.get("state", {})
    return str(state.get("request_id", "none"))


def _fault_in_words(fault: Mapping[str, Any]) -> str:
    """The field and what is wrong with it, without its value."""
    # The first part says whether it is of the body or of the query; of broken JSON the second is a position.
    whole, *parts = fault["loc"]
    place = ".".join(map(_shown, parts)) if parts and fault["type"] != "json_invalid" else _shown(whole)
    message = str(fault["msg"]).removeprefix("Value error, ")
    return f"{place}: {'the value cannot be read' if fault['type'] in _REPEATING else message}"


def _shown(part: str | int) -> str:
    text = "".join(character if character.isprintable() else "?" for character in str(part))
    return text if len(text) <= _NAME else f"{text[:_NAME]}…"
