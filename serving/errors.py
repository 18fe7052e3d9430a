"""Every error as an HTTP status and a `Problem`. A client learns what to change, or when to try again; of a fault of
ours it learns the request's id alone. What a client sent is neither repeated here nor logged."""

import logging
import math
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette._utils import get_route_path
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serving.api import Problem
from serving.messages import Failed, Overloaded, TimedOut, Unavailable, UnknownImage
from serving.privacy import Sealed, described, unsealed
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

_OPENAI = ("/v1/chat/", "/v1/models")
"""Where paths of OpenAI's interface begin."""

_OUR_FAULT = "the service failed; its log has the error under the id {}"

_REPEATING = {"union_tag_invalid", "get_attribute_error", "mapping_type", "date_parsing", "datetime_parsing"}
_REPEATING |= {"time_parsing", "time_delta_parsing", "date_from_datetime_parsing", "url_parsing", "uuid_parsing"}
"""Faults whose message may hold a part of the value."""

_PARTS = {"body", "query", "path", "header", "cookie"}

_FAULTS = 16
"""Faults of a request that are told."""

_NAME = 64
"""Characters of a field's name that are shown: an unknown field has the name that the client gave it."""

_log = logging.getLogger(__name__)


def problem(
    status: int, type: str, detail: str, request_id: str, retry_after: float | None = None, *, path: str = ""
) -> JSONResponse:
    """The response that tells a problem. type: its kind, for programs. detail: a sentence. request_id: names the
    request in the log. retry_after: seconds after which to try again, as a header rounded up. path: what was asked;
    clients of OpenAI's interface find the sentence also where they look for it."""
    content = written(Problem(detail=detail, type=type, request_id=request_id), path)
    headers = {} if retry_after is None else {"Retry-After": str(max(1, math.ceil(retry_after)))}
    return JSONResponse(content, status_code=status, headers=headers)


def written(told: Problem, path: str) -> dict[str, Any]:
    """A problem as JSON. path: as `problem` takes it."""
    content: dict[str, Any] = told.model_dump()
    if path.startswith(_OPENAI):
        content["error"] = {"message": told.detail, "type": told.type, "param": None, "code": told.type}
    return content


def internal(request_id: str, *, path: str = "") -> JSONResponse:
    """The response for a fault of ours."""
    return problem(500, "internal", _OUR_FAULT.format(request_id), request_id, path=path)


def install(api: FastAPI) -> None:
    """Register the handlers that make a `Problem` of each error of a route. `serving.guard.Guard` goes around the
    application: it names requests, and catches what escapes."""
    kinds: tuple[type[Exception], ...] = (Mistake, *_FAILURES, RequestValidationError, HTTPException, Exception)
    for kind in kinds:
        api.add_exception_handler(kind, _answer)


def problem_of(error: Exception, request_id: str) -> Problem:
    """An error as a Problem, for an answer whose status is sent already. A fault of ours is logged."""
    status, type, detail, _ = _told(error, request_id)
    if status == 500:
        log_failure(request_id, error)
    return Problem(detail=detail, type=type, request_id=request_id)


def log_failure(request_id: str, error: Exception) -> None:
    """Log an error's kind and place; its message might hold what a client sent. Of a replica's the name is logged that
    it has in the replica's log."""
    found = unsealed(error)
    fault = f"fault {found.fault} of a replica: " if isinstance(found, Sealed) else ""
    _log.error("request %s failed: %s%s", request_id, fault, described(error))


def _told(error: Exception, request_id: str) -> tuple[int, str, str, float | None]:
    """Status, type, sentence and, where it may be tried again, after how many seconds."""
    if isinstance(error, Mistake):
        return 400, "bad_request", str(error), None
    for failure, (status, type, sentence, retry_after) in _FAILURES.items():
        if isinstance(error, failure):
            return status, type, str(error) or sentence, retry_after
    if isinstance(error, RequestValidationError):
        return 422, "invalid", _in_words(error.errors()), None
    if isinstance(error, HTTPException):
        phrase = HTTPStatus(error.status_code).phrase
        type = _TYPES.get(error.status_code, phrase.lower().replace(" ", "_"))
        detail = _SENTENCES.get(error.status_code, phrase) if error.detail == phrase else str(error.detail)
        return error.status_code, type, detail, None
    return 500, "internal", _OUR_FAULT.format(request_id), None


async def _answer(request: Request, error: Exception) -> Response:
    # Of a fault of ours Starlette raises the error again after this answer, and the guard logs it.
    state: Mapping[str, Any] = request.scope.get("state", {})
    request_id = str(state.get("request_id", "none"))
    status, type, detail, retry_after = _told(error, request_id)
    response = problem(status, type, detail, request_id, retry_after, path=get_route_path(request.scope))
    if isinstance(error, HTTPException):
        response.headers.update(error.headers or {})
    return response


def _in_words(faults: Sequence[Mapping[str, Any]]) -> str:
    more = [f"and {len(faults) - _FAULTS} more"] if len(faults) > _FAULTS else []
    return "; ".join([*map(_fault_in_words, faults[:_FAULTS]), *more])


def _fault_in_words(fault: Mapping[str, Any]) -> str:
    """The field and what is wrong with it, without its value."""
    # FastAPI says first of which part of the request it is; of broken JSON the rest is a position.
    parts = ["body"] if fault["type"] == "json_invalid" else list(fault["loc"]) or ["body"]
    place = ".".join(_shown(part) for part in (parts[1:] if len(parts) > 1 and parts[0] in _PARTS else parts))
    message = str(fault["msg"]).removeprefix("Value error, ")
    return f"{place}: {'the value cannot be read' if fault['type'] in _REPEATING else message}"


def _shown(part: str | int) -> str:
    text = "".join(character if character.isprintable() else "?" for character in str(part))
    return text if len(text) <= _NAME else f"{text[:_NAME]}…"
