"""Every error of a route as a status and a `Problem`."""

import asyncio
import json
import logging
from typing import Annotated, Any

import httpx
import pytest
from fastapi import FastAPI, File, Form, HTTPException, Query, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from pydantic import TypeAdapter, ValidationError

from serving.api import GroundRequest, Problem, SegmentRequest
from serving.config import Limits
from serving.errors import install, problem, problem_of
from serving.guard import Guard
from serving.keys import Doorkeeper
from serving.messages import Failed, Overloaded, TimedOut, Unavailable, UnknownImage
from serving.privacy import Sealed
from umrg.mistake import Mistake
from umrg.windowing import Window

CANARY = "canary-7f3a"
"""What a client sent, and nobody else may see."""


def raising(error: Exception | type[Exception]) -> FastAPI:
    api = FastAPI()
    install(api)

    @api.post("/")
    async def route() -> None:
        raise error

    return api


def ask(api: FastAPI, method: str = "POST", path: str = "/", **request: Any) -> httpx.Response:
    """Ask the guarded application."""

    async def asked() -> httpx.Response:
        transport = httpx.ASGITransport(Guard(api, Doorkeeper(None), Limits()))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path, **request)

    return asyncio.run(asked())


def told(response: httpx.Response) -> Problem:
    found = Problem.model_validate_json(response.content, strict=True)
    assert found.request_id == response.headers["x-request-id"]
    return found


FAILURES = [
    (Mistake("the query is empty; ask something"), 400, "bad_request", "the query is empty; ask something"),
    (Overloaded(), 429, "overloaded", "try again later"),
    (Overloaded("the queue is full; try again"), 429, "overloaded", "the queue is full; try again"),
    (Unavailable(), 503, "unavailable", "try again later"),
    (TimedOut("no answer within 120 s"), 504, "timed_out", "no answer within 120 s"),
    (UnknownImage(), 404, "unknown_image", "send the image again"),
    (HTTPException(415, "send JSON or a form"), 415, "unsupported_media_type", "send JSON or a form"),
]


@pytest.mark.parametrize(("error", "status", "type", "detail"), FAILURES)
def test_each_error_has_its_status_and_tells_its_sentence(error, status, type, detail):
    response = ask(raising(error))
    found = told(response)
    assert (response.status_code, found.type) == (status, type)
    assert found.detail.endswith(detail) and "Traceback" not in found.detail
    assert ("retry-after" in response.headers) == (status in (429, 503, 504))
    assert int(response.headers.get("retry-after", "1")) >= 1


@pytest.mark.parametrize(
    "error", [ValueError(CANARY), KeyError(CANARY), RuntimeError(CANARY), Failed(CANARY), OSError(2, CANARY)]
)
def test_a_librarys_error_is_a_fault_of_ours_and_only_its_kind_is_logged(error, caplog):
    response = ask(raising(error))
    found = told(response)
    assert (response.status_code, found.type) == (500, "internal") and found.request_id in found.detail
    (record,) = caplog.records
    assert record.levelno == logging.ERROR and record.exc_info is None
    assert found.request_id in record.getMessage() and type(error).__name__ in record.getMessage()
    assert CANARY not in response.text and CANARY not in caplog.text


def test_a_librarys_validation_error_is_no_mistake_of_the_client():
    api = FastAPI()
    install(api)

    @api.post("/")
    async def route() -> int:
        return TypeAdapter(int).validate_python(CANARY)

    @api.post("/answer")
    async def answer() -> int:
        return CANARY  # type: ignore[return-value]  # which FastAPI finds out

    for path in ("/", "/answer"):
        response = ask(api, path=path)
        assert response.status_code == 500 and CANARY not in response.text


def test_what_is_logged_names_the_place_in_our_code(caplog):
    api = FastAPI()

    @api.post("/")
    async def route() -> None:
        Window.parse(CANARY)

    assert ask(api).status_code == 500
    assert (
        "umrg.mistake.Mistake at " in caplog.text and "umrg/windowing.py:" in caplog.text and CANARY not in caplog.text
    )


def test_what_is_logged_of_a_replicas_error_names_it_in_the_replicas_log(caplog):
    response = ask(raising(Sealed(None, "f00d")))
    assert response.status_code == 500 and "fault f00d of a replica" in caplog.text


def test_a_path_or_method_that_is_not_there_says_where_to_look():
    api = raising(Mistake(""))
    missing, method = ask(api, path="/nothing"), ask(api, "GET")
    assert (missing.status_code, told(missing).type) == (404, "not_found") and "/docs" in told(missing).detail
    assert (method.status_code, told(method).type) == (405, "method_not_allowed")
    assert method.headers["allow"] == "POST"


def fields() -> FastAPI:
    api = FastAPI()
    install(api)

    @api.post("/ground")
    async def ground(request: GroundRequest) -> None: ...

    @api.post("/segment")
    async def segment(request: SegmentRequest) -> None: ...

    @api.post("/form")
    async def form(image: Annotated[UploadFile, File()], samples: Annotated[int, Form()]) -> None: ...

    @api.post("/query")
    async def query(when: Annotated[int, Query(ge=1)]) -> None: ...

    return api


WHOLE = {"image": CANARY, "query": CANARY}


@pytest.mark.parametrize(
    ("path", "request_", "said"),
    [
        ("/ground", {"json": {}}, "image: Field required; query: Field required"),
        ("/ground", {"json": WHOLE | {"samples": CANARY}}, "samples: Input should be a valid integer"),
        ("/ground", {"json": WHOLE | {"samples": 999}}, "samples: Input should be less than or equal to 64"),
        ("/ground", {"json": WHOLE | {"mask": CANARY}}, "mask: Input should be 'rle', 'png' or 'none'"),
        ("/ground", {"json": WHOLE | {"window": CANARY * 9}}, "window: String should have at most 64 characters"),
        ("/ground", {"json": WHOLE | {"thnik": CANARY}}, "thnik: Extra inputs are not permitted"),
        ("/ground", {"json": WHOLE | {"query": {"a": CANARY}}}, "query: Input should be a valid string"),
        ("/ground", {"json": CANARY}, "body: Input should be"),
        ("/ground", {"content": f'{{"{CANARY}', "headers": {"content-type": "application/json"}}, "body: JSON decode"),
        ("/segment", {"json": {"image_id": CANARY}}, "image_id: String should match pattern"),
        ("/segment", {"json": {"box": [1, 2, CANARY, 4]}}, "box.2: Input should be a valid number"),
        ("/segment", {"json": {"points": [[1, CANARY]]}}, "points.0.1: Input should be a valid number"),
        ("/form", {"data": {"samples": CANARY}}, "image: Field required; samples: Input should be a valid integer"),
        ("/query", {"params": {"when": CANARY}}, "when: Input should be a valid integer"),
    ],
)
def test_an_invalid_field_is_named_with_the_reason_and_without_its_value(path, request_, said, caplog):
    response = ask(fields(), path=path, **request_)
    assert (response.status_code, told(response).type) == (422, "invalid")
    assert said in told(response).detail
    assert CANARY not in response.text and CANARY not in caplog.text


def test_a_fault_that_a_route_found_itself_is_named_like_the_frameworks():
    api = FastAPI()
    install(api)

    @api.post("/")
    async def route(request: Request) -> None:
        try:
            SegmentRequest.model_validate_json(await request.body())
        except ValidationError as error:
            raise RequestValidationError(error.errors(include_url=False, include_input=False)) from None

    assert "box.3: Field required" in told(ask(api, json={"box": [1, 2, 3]})).detail
    broken = told(ask(api, content=f'{{"{CANARY}')).detail
    assert broken.startswith("body: Invalid JSON") and CANARY not in broken
    assert "body: Input should be an object" in told(ask(api, json=[CANARY])).detail


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/models"])
@pytest.mark.parametrize("error", [Mistake("ask something"), RuntimeError(CANARY)])
def test_clients_of_openais_interface_find_the_sentence_where_they_look_for_it(path, error):
    api = FastAPI()
    install(api)

    @api.post(path)
    async def route() -> None:
        raise error

    foreign = {"origin": "null"}  # which the guard refuses
    for response in (ask(api, path=path), ask(api, path=path, headers=foreign), ask(api, path=f"{path}/nothing")):
        found = told(response)
        assert response.json()["error"]["message"] == found.detail and response.json()["error"]["type"] == found.type
    assert "error" not in ask(api, path="/v1/ground").json()


def test_an_unknown_fields_name_is_shown_shortened():
    detail = told(ask(fields(), path="/ground", json=WHOLE | {"x" * 10000: 1, "a\nb": 1})).detail
    assert len(detail) < 300 and "a?b: Extra inputs" in detail


def test_a_form_that_cannot_be_parsed_is_the_clients_mistake():
    response = ask(fields(), path="/form", content=b"junk", headers={"content-type": "multipart/form-data"})
    assert response.status_code == 400 and told(response).type == "bad_request"


def test_in_the_middle_of_an_answer_the_problem_is_told_without_a_status(caplog):
    assert problem_of(Mistake("ask something"), "an-id").type == "bad_request"
    assert problem_of(Unavailable(), "an-id").type == "unavailable" and caplog.records == []
    failed = problem_of(ValueError(CANARY), "an-id")
    assert failed.type == "internal" and failed.request_id == "an-id" and CANARY not in failed.detail
    assert "request an-id failed: builtins.ValueError" in caplog.text and CANARY not in caplog.text


def test_retry_after_is_a_whole_number_of_seconds_of_at_least_one():
    for seconds, header in ((0.01, "1"), (1.2, "2"), (5.0, "5")):
        response = problem(429, "overloaded", "try again", "an-id", seconds)
        assert response.headers["retry-after"] == header
    plain = problem(400, "bad_request", "change it", "an-id")
    assert "retry-after" not in plain.headers
    assert json.loads(bytes(plain.body)) == {"detail": "change it", "type": "bad_request", "request_id": "an-id"}
