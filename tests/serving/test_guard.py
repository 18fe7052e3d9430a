"""What goes around the application, asked over HTTP's in-process transport and by hand-driven ASGI messages."""

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Iterable
from typing import Annotated, Any

import httpx
import pytest
from fastapi import FastAPI, File, Request, UploadFile
from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.api import Problem
from serving.config import Key, Limits
from serving.errors import install
from serving.guard import HEADERS, OPEN, BrokenResponse, Guard, is_open
from serving.keys import EVERYBODY, Doorkeeper, new_key

MIB = 1 << 20
CANARY = "canary-7f3a"
DEADLINE = 20.0
"""Seconds after which a test has failed, whatever it waits for."""

SECRET, DIGEST = new_key()
KEY = Key(name="anna", sha256=DIGEST)
AUTHORIZATION = {"authorization": f"Bearer {SECRET}"}


def application() -> FastAPI:
    """Routes that say what they were given, in every way in which a body can be read."""
    api = FastAPI(openapi_url=None)
    install(api)

    @api.api_route("/state", methods=["GET", "POST"])
    async def state(request: Request) -> dict[str, str]:
        return {"request_id": request.state.request_id, "owner": request.state.owner}

    @api.post("/bytes")
    async def count(request: Request) -> int:
        return len(await request.body())

    @api.post("/json")
    async def from_json(text: dict[str, str]) -> int:
        return len(text["image"])

    @api.post("/form")
    async def from_form(image: Annotated[UploadFile, File()]) -> int:
        return len(await image.read())

    @api.get("/headers")
    async def headers() -> StreamingResponse:
        given = {"cache-control": "public", "x-frame-options": "ALLOWALL", "x-own": "kept"}
        return StreamingResponse(iter(["text"]), headers=given)

    @api.get("/fail")
    async def fail() -> None:
        raise RuntimeError(CANARY)

    for path in OPEN:
        api.add_api_route(path, lambda: "open", methods=["GET", "POST"])
    return api


def guarded(
    *, keys: Iterable[Key] | None = None, app: ASGIApp | None = None, local_only: bool = False, **limits: Any
) -> Guard:
    door = Doorkeeper(None if keys is None else tuple(keys))
    return Guard(app or application(), door, Limits(**{"image_mib": 1, **limits}), local_only=local_only)


def ask(guard: Guard, method: str, path: str, **request: Any) -> httpx.Response:
    async def asked() -> httpx.Response:
        transport = httpx.ASGITransport(guard)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
            return await client.request(method, path, **request)

    return run(asked())


def run(waiting: Awaitable[Any]) -> Any:
    async def bounded() -> Any:
        return await asyncio.wait_for(waiting, DEADLINE)

    return asyncio.run(bounded())


def told(response: httpx.Response) -> Problem:
    return Problem.model_validate_json(response.content)


class Client:
    """A client by hand: it sends the messages it is given, then nothing, and keeps what it is answered."""

    def __init__(self, path: str, messages: Iterable[Message] = (), headers: dict[str, str] | None = None) -> None:
        raw = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
        self.scope: Scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": raw}
        self.taken = 0
        """How many of its messages were taken."""
        self.answered: list[Message] = []
        self._messages = list(messages)

    async def receive(self) -> Message:
        if self.taken == len(self._messages):
            await asyncio.Event().wait()
        self.taken += 1
        return self._messages[self.taken - 1]

    async def send(self, message: Message) -> None:
        self.answered.append(message)

    async def ask(self, guard: ASGIApp) -> None:
        await guard(self.scope, self.receive, self.send)

    @property
    def status(self) -> int:
        start, *_ = self.answered
        return int(start["status"])

    @property
    def problem(self) -> Problem:
        return Problem.model_validate_json(b"".join(message.get("body", b"") for message in self.answered))


def piece(size: int, *, more: bool = True) -> Message:
    return {"type": "http.request", "body": b"x" * size, "more_body": more}


GONE: Message = {"type": "http.disconnect"}


# --- Each request has a name ---


def test_each_request_has_an_id_of_its_own_in_its_state_and_in_its_answer():
    guard, seen = guarded(), set()
    for _ in range(3):
        response = ask(guard, "GET", "/state", headers={"x-request-id": CANARY})
        request_id = response.headers["x-request-id"]
        assert re.fullmatch("[0-9a-f]{32}", request_id) and response.json()["request_id"] == request_id
        assert response.headers.get_list("x-request-id") == [request_id]
        seen.add(request_id)
    assert len(seen) == 3


def test_a_problem_names_the_request():
    response = ask(guarded(keys=[KEY]), "GET", "/state")
    assert told(response).request_id == response.headers["x-request-id"]


def test_what_the_servers_lifespan_has_left_in_the_state_stays():
    scope = {**Client("/state").scope, "state": {"of_the_lifespan": 1}}
    seen: dict[str, Any] = {}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.update(scope["state"])

    run(guarded(app=app)(scope, Client("/").receive, Client("/").send))
    assert seen["of_the_lifespan"] == 1 and set(seen) == {"of_the_lifespan", "request_id", "owner"}


# --- Keys ---


def test_the_route_learns_whose_request_it_is():
    assert ask(guarded(keys=[KEY]), "GET", "/state", headers=AUTHORIZATION).json()["owner"] == "anna"
    assert ask(guarded(), "GET", "/state").json()["owner"] == EVERYBODY


def test_the_open_paths_are_these():
    assert frozenset({"/healthz", "/readyz", "/docs", "/openapi.json"}) == OPEN
    assert is_open("/docs/style.css") and is_open("/docs/page-2.min.js")


@pytest.mark.parametrize("path", sorted(OPEN))
def test_an_open_path_needs_no_key(path):
    assert ask(guarded(keys=[KEY]), "GET", path).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/state",
        "/nothing",
        "/healthz/",
        "/healthz/state",
        "//healthz",
        "/HEALTHZ",
        "/docs/",
        "/docs/../state",
        "/docs/..%2fstate",
        "/docs/.hidden",
        "/docs/a/b.js",
        "/docs/oauth2-redirect",
        "/docs/x.js/state",
        "/docs/x.js%0a",
        "/openapi.json/x",
        "/metrics",
    ],
)
def test_every_other_path_needs_one_even_where_there_is_nothing(path):
    for method in ("GET", "POST", "OPTIONS", "HEAD"):
        response = ask(guarded(keys=[KEY]), method, path)
        assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    ("path", "root", "status"),
    [("/mr/state", "/mr", 401), ("/mr/healthz", "/mr", 200), ("/healthz/x", "/healthz", 401)],
)
def test_below_a_prefix_the_path_is_what_the_router_sees(path, root, status):
    client = Client(path, [piece(0, more=False)])
    client.scope["root_path"] = root
    run(client.ask(guarded(keys=[KEY])))
    assert client.status == status


def test_a_wrong_key_is_refused_and_so_are_two():
    guard = guarded(keys=[KEY])
    wrong = ask(guard, "GET", "/state", headers={"authorization": f"Bearer {new_key()[0]}"})
    twice = ask(guard, "GET", "/state", headers=[("authorization", AUTHORIZATION["authorization"])] * 2)
    assert (wrong.status_code, twice.status_code) == (401, 401) and told(wrong).type == "unauthorized"


def test_beyond_a_keys_limits_the_client_is_told_when_to_come_back():
    guard = guarded(keys=[KEY.model_copy(update={"per_minute": 1})])
    assert ask(guard, "GET", "/state", headers=AUTHORIZATION).status_code == 200
    refused = ask(guard, "GET", "/state", headers=AUTHORIZATION)
    assert (refused.status_code, told(refused).type) == (429, "rate_limited")
    assert 1 <= int(refused.headers["retry-after"]) <= 60


def test_a_request_counts_as_under_way_until_its_answer_has_ended():
    ended = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await ended.wait()
        await send({"type": "http.response.body", "body": b"end"})

    async def asked() -> None:
        guard = guarded(keys=[KEY.model_copy(update={"concurrent": 1})], app=app)
        first, second, third = (Client("/", headers=AUTHORIZATION) for _ in range(3))
        under_way = asyncio.create_task(first.ask(guard))
        while not first.answered:
            await asyncio.sleep(0)
        await second.ask(guard)
        ended.set()
        await under_way
        await third.ask(guard)
        assert (first.status, second.status, third.status) == (200, 429, 200)

    run(asked())


async def failing(scope: Scope, receive: Receive, send: Send) -> None:
    raise RuntimeError(CANARY)


async def reading(scope: Scope, receive: Receive, send: Send) -> None:
    await Request(scope, receive).body()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"end"})


async def hanging(scope: Scope, receive: Receive, send: Send) -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("app", "messages"),
    [
        (failing, []),
        (reading, [piece(10), GONE]),
        (reading, [piece(3 * MIB)]),
        (reading, [piece(10)]),  # and then nothing more
        (hanging, []),  # until the server cancels it
    ],
)
def test_however_a_request_ends_it_is_no_longer_under_way(app, messages):
    guard = guarded(keys=[KEY.model_copy(update={"concurrent": 1})], app=app, upload_seconds=0.05)

    async def asked() -> list[Message]:
        for _ in range(3):
            client = Client("/", messages, AUTHORIZATION)
            task = asyncio.create_task(client.ask(guard))
            await asyncio.wait([task], timeout=0.2 if app is hanging else DEADLINE)
            task.cancel()
            await asyncio.wait([task])
            assert [m for m in client.answered if m.get("status") == 429] == []
        return client.answered

    run(asked())


def test_keys_are_exchanged_under_a_running_guard():
    door = Doorkeeper([KEY])
    guard = Guard(application(), door, Limits())
    assert ask(guard, "GET", "/state", headers=AUTHORIZATION).status_code == 200
    secret, digest = new_key()
    door.replace([Key(name="ben", sha256=digest)])
    assert ask(guard, "GET", "/state", headers=AUTHORIZATION).status_code == 401
    assert ask(guard, "GET", "/state", headers={"authorization": f"Bearer {secret}"}).json()["owner"] == "ben"


# --- Pages of other sites ---


@pytest.mark.parametrize(
    "headers",
    [
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"sec-fetch-site": "something new"},
        {"origin": "http://evil.example"},
        {"origin": "http://127.0.0.1:3000"},
        {"origin": "http://127.0.0.1:8000@evil.example"},
        {"origin": "http://127.0.0.1:8000.evil.example"},
        {"origin": "null"},
        {"origin": ""},
        {"origin": "http://["},
    ],
)
def test_without_keys_pages_of_other_sites_are_refused(headers):
    for path in ("/state", "/healthz", "/docs"):
        response = ask(guarded(), "POST", path, headers=headers)
        assert (response.status_code, told(response).type) == (403, "forbidden")
    # With keys they could not send one, and a client's program may have any origin.
    assert ask(guarded(keys=[KEY]), "POST", "/state", headers=headers | AUTHORIZATION).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"sec-fetch-site": "none"},
        {"sec-fetch-site": "same-origin", "origin": "http://127.0.0.1:8000"},
        {"host": "LOCALHOST", "origin": "http://localhost"},
        {"host": "localhost:80", "origin": "http://localhost"},
        {"host": "service.example", "origin": "https://service.example"},
    ],
)
def test_its_own_pages_and_programs_are_answered(headers):
    assert ask(guarded(), "POST", "/state", headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("127.0.0.1:8000", 200),
        ("localhost:8000", 200),
        ("Localhost", 200),
        ("[::1]:8000", 200),
        ("10.0.0.7:8000", 200),
        ("evil.example", 403),
        ("evil.example:8000", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost:8000@evil.example", 403),
        ("[::1]evil.example", 403),
        ("", 403),
    ],
)
def test_a_service_for_ones_own_machine_answers_to_no_other_name(host, status):
    """A page may have made its own name mean this machine (DNS rebinding): the browser takes both for one site."""
    page = {"host": host, "origin": f"http://{host}", "sec-fetch-site": "same-origin"} if host else {"host": host}
    assert ask(guarded(local_only=True), "POST", "/state", headers=page).status_code == status
    assert ask(guarded(local_only=True), "GET", "/healthz", headers={"host": host}).status_code == status
    assert ask(guarded(), "POST", "/state", headers={"host": host}).status_code == 200
    with_key = ask(guarded(local_only=True, keys=[KEY]), "POST", "/state", headers=page | AUTHORIZATION)
    assert with_key.status_code == 200


# --- The size of a body ---


def chunks(total: int, size: int = 1 << 16) -> AsyncIterator[bytes]:
    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, total, size):
            yield b"x" * min(size, total - start)

    return pieces()


@pytest.mark.parametrize("content_type", ["application/octet-stream", "", "text/plain", "multipart/form-data"])
def test_a_body_has_at_most_an_image_and_a_mebibyte(content_type):
    headers = {"content-type": content_type}
    for body in (b"x" * (2 * MIB), chunks(2 * MIB)):
        assert ask(guarded(), "POST", "/bytes", content=body, headers=headers).json() == 2 * MIB
    for body in (b"x" * (2 * MIB + 1), chunks(2 * MIB + 1)):
        response = ask(guarded(), "POST", "/bytes", content=body, headers=headers)
        assert (response.status_code, told(response).type) == (413, "too_large") and "2.0 MiB" in told(response).detail


@pytest.mark.parametrize("content_type", ["application/json", "Application/JSON; charset=utf-8", "application/a+json"])
def test_in_json_an_image_is_base64_and_may_be_a_third_longer(content_type):
    room = -(-4 * MIB // 3) + MIB
    headers = {"content-type": content_type}
    assert ask(guarded(), "POST", "/bytes", content=chunks(room), headers=headers).json() == room
    assert ask(guarded(), "POST", "/bytes", content=chunks(room + 1), headers=headers).status_code == 413


def test_a_body_said_to_be_too_large_is_refused_before_any_of_it_is_taken():
    client = Client("/bytes", [piece(10)], {"content-length": str(2 * MIB + 1)})
    run(client.ask(guarded()))
    assert client.status == 413 and client.taken == 0


def test_who_has_no_key_learns_nothing_else():
    client = Client("/bytes", [piece(10)], {"content-length": str(2 * MIB + 1)})
    run(client.ask(guarded(keys=[KEY])))
    assert client.status == 401 and client.taken == 0


@pytest.mark.parametrize("length", ["-1", "+5", "1e3", "0x10", "five", "", "1, 2", "9" * 5000, "²"])
def test_a_length_that_is_none_is_the_clients_mistake(length):
    client = Client("/bytes", [piece(10, more=False)])
    client.scope["headers"] = [(b"content-length", length.encode("latin-1"))]
    run(client.ask(guarded()))
    assert client.status == 400 and client.problem.type == "bad_request"


BEGINNINGS = {
    "/bytes": ("application/octet-stream", b"x"),
    "/json": ("application/json", b'{"image": "'),
    "/form": (
        "multipart/form-data; boundary=b",
        b'--b\r\nContent-Disposition: form-data; name="image"; filename="i"\r\n\r\n',
    ),
}
"""Of each route that reads a body: its type, and how it begins."""


@pytest.mark.parametrize("path", BEGINNINGS)
@pytest.mark.parametrize("headers", [{}, {"content-length": "10"}, {"transfer-encoding": "chunked"}])
def test_an_endless_body_is_ended_as_soon_as_it_is_too_large_whatever_it_was_said_to_be(path, headers):
    content_type, beginning = BEGINNINGS[path]
    first = {"type": "http.request", "body": beginning, "more_body": True}
    client = Client(path, [first, *[piece(1 << 18)] * 1000], {"content-type": content_type, **headers})
    run(client.ask(guarded()))
    assert client.status == 413 and client.problem.type == "too_large"
    assert client.taken <= 1 + (10 if path == "/json" else 8)  # of a quarter of a mebibyte each, and the first


def test_the_largest_form_and_json_arrive_whole():
    image = b"x" * MIB
    assert ask(guarded(), "POST", "/form", files={"image": ("name", image)}).json() == MIB
    encoded = "x" * (4 * MIB // 3)
    assert ask(guarded(), "POST", "/json", json={"image": encoded}).json() == len(encoded)


# --- Slow clients ---


@pytest.mark.parametrize("path", BEGINNINGS)
def test_a_body_that_does_not_arrive_in_time_is_refused(path):
    content_type, beginning = BEGINNINGS[path]
    first = {"type": "http.request", "body": beginning, "more_body": True}
    client = Client(path, [first, piece(1)], {"content-type": content_type})
    run(client.ask(guarded(upload_seconds=0.05)))
    assert client.status == 408 and client.problem.type == "timed_out"


def test_a_body_that_trickles_is_refused_though_each_piece_comes_soon():
    class Trickling(Client):
        async def receive(self) -> Message:
            self.taken += 1
            await asyncio.sleep(0.01)
            return piece(1)

    client = Trickling("/bytes")
    run(client.ask(guarded(upload_seconds=0.1)))
    assert client.status == 408


def test_time_that_the_answer_takes_is_none_of_the_upload():
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        with pytest.raises(TimeoutError):  # the client waits, and is not told to have left
            await asyncio.wait_for(receive(), 0.2)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"end"})

    client = Client("/", [piece(1, more=False)])
    run(client.ask(guarded(app=app, upload_seconds=0.05)))
    assert client.status == 200


def test_a_body_that_is_there_may_be_read_late():
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.1)
        await reading(scope, receive, send)

    client = Client("/", [piece(1), piece(1, more=False)])
    run(client.ask(guarded(app=app, upload_seconds=0.05)))
    assert client.status == 200


# --- Headers ---


def assert_secured(headers: httpx.Headers) -> None:
    for name, value in HEADERS.items():
        assert headers.get_list(name) == [value], name
    assert len(headers.get_list("x-request-id")) == 1


def test_the_policy_is_of_this_site_alone():
    policy = HEADERS["Content-Security-Policy"]
    assert policy.startswith("default-src 'self';") and "frame-ancestors 'none'" in policy
    assert not any(word in policy for word in ("unsafe", "http", "data:", "*"))
    assert HEADERS["X-Content-Type-Options"] == "nosniff" and HEADERS["Cache-Control"] == "no-store"


@pytest.mark.parametrize(
    ("method", "path", "request_", "status"),
    [
        ("GET", "/state", {}, 200),
        ("GET", "/docs", {}, 200),
        ("GET", "/headers", {}, 200),
        ("HEAD", "/nothing", {}, 404),
        ("DELETE", "/state", {}, 405),
        ("GET", "/fail", {}, 500),
        ("POST", "/json", {"json": []}, 422),
        ("POST", "/form", {"content": b"", "headers": {"content-type": "multipart/form-data"}}, 400),
        ("POST", "/bytes", {"content": b"x" * 3 * MIB}, 413),
        ("POST", "/bytes", {"content": chunks(3 * MIB)}, 413),
        ("GET", "/state", {"headers": {"origin": "null"}}, 403),
    ],
)
def test_every_response_has_the_headers_of_security(method, path, request_, status):
    response = ask(guarded(), method, path, **request_)
    assert response.status_code == status
    assert_secured(response.headers)


def test_refusals_and_failures_of_the_guard_have_them_too():
    assert_secured(ask(guarded(keys=[KEY]), "GET", "/state").headers)
    assert_secured(ask(guarded(app=failing), "GET", "/state").headers)
    limited = guarded(keys=[KEY.model_copy(update={"per_minute": 1})])
    ask(limited, "GET", "/state", headers=AUTHORIZATION)
    assert_secured(ask(limited, "GET", "/state", headers=AUTHORIZATION).headers)


def test_a_routes_own_headers_stay_but_cannot_weaken_them():
    response = ask(guarded(), "GET", "/headers")
    assert response.headers["x-own"] == "kept"
    assert_secured(response.headers)


# --- Streams and disconnects ---


def test_a_stream_passes_piece_by_piece():
    sent: asyncio.Queue[Message] = asyncio.Queue()
    turn = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def events() -> AsyncIterator[str]:
            for number in range(3):
                await turn.wait()
                turn.clear()
                yield f"data: {number}\n\n"

        await StreamingResponse(events(), media_type="text/event-stream")(scope, receive, send)

    async def asked() -> None:
        client = Client("/", [piece(0, more=False)])
        task = asyncio.create_task(guarded(app=app)(client.scope, client.receive, sent.put))
        assert (await sent.get())["type"] == "http.response.start"
        for number in range(3):
            assert sent.empty()
            turn.set()  # the next event is made only once the one before has arrived
            assert await sent.get() == {
                "type": "http.response.body",
                "body": f"data: {number}\n\n".encode(),
                "more_body": True,
            }
        assert not (await sent.get())["more_body"]
        await task

    run(asked())


def test_a_stream_ends_when_its_client_leaves(caplog):
    closed = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def events() -> AsyncIterator[str]:
            try:
                while True:
                    yield "data: more\n\n"
                    await asyncio.sleep(0.01)
            finally:
                closed.set()

        await StreamingResponse(events())(scope, receive, send)

    async def asked() -> None:
        client = Client("/", [piece(0, more=False), GONE])
        await client.ask(guarded(app=app))
        await closed.wait()
        assert client.status == 200

    run(asked())
    assert caplog.records == []


def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_failure(caplog):
    client = Client("/", [piece(10), GONE])
    run(client.ask(guarded(app=reading)))
    assert client.answered == [] and caplog.records == []


@pytest.mark.parametrize("path", ["/bytes", "/json"])
def test_nothing_is_answered_to_a_client_that_leaves_in_the_middle_of_its_body(caplog, path):
    """FastAPI would answer 400 or 500, which would be counted as such."""
    client = Client(path, [piece(10), GONE])
    run(client.ask(guarded()))
    assert client.answered == [] and caplog.records == []


def test_a_cancelled_request_stays_cancelled():
    async def asked() -> None:
        task = asyncio.create_task(Client("/").ask(guarded(app=hanging)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(asked())


# --- Failures ---


def test_an_error_that_escapes_is_a_500_and_only_its_kind_and_place_are_logged(caplog):
    response = ask(guarded(app=failing), "POST", f"/{CANARY}", content=CANARY, headers={"x-canary": CANARY})
    found = told(response)
    assert (response.status_code, found.type) == (500, "internal") and found.request_id in found.detail
    (record,) = caplog.records
    assert record.levelno == logging.ERROR and record.exc_info is None
    places = r"\S+:\d+ failing < \S+serving/guard.py:\d+ _answer"
    said = f"request {found.request_id} failed: builtins.RuntimeError at {places}"
    assert re.fullmatch(said, record.getMessage())
    assert CANARY not in caplog.text and CANARY not in response.text


def test_an_error_in_the_middle_of_an_answer_ends_the_connection_and_carries_nothing(caplog):
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        raise RuntimeError(CANARY)

    client = Client("/")
    with pytest.raises(BrokenResponse) as broken:
        run(client.ask(guarded(app=app)))
    assert broken.value.__cause__ is None and broken.value.__context__ is None and CANARY not in str(broken.value)
    assert [message["type"] for message in client.answered] == ["http.response.start", "http.response.body"]
    assert "RuntimeError" in caplog.text and CANARY not in caplog.text


def test_an_error_after_the_answer_is_logged_and_the_answer_stays(caplog):
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await reading(scope, receive, send)
        raise RuntimeError(CANARY)

    client = Client("/", [piece(1, more=False)])
    run(client.ask(guarded(app=app)))
    assert client.status == 200 and len(client.answered) == 2
    assert "RuntimeError" in caplog.text and CANARY not in caplog.text


def test_of_an_error_with_a_cause_both_kinds_are_logged(caplog):
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            json.loads(CANARY)
        except ValueError as error:
            raise RuntimeError(CANARY) from error

    run(Client("/").ask(guarded(app=app)))
    assert re.search(r"builtins.RuntimeError at .*\nafter json.decoder.JSONDecodeError at", caplog.text)
    assert CANARY not in caplog.text


def test_a_connection_that_cannot_be_answered_fails_without_the_first_error():
    async def closed(message: Message) -> None:
        raise RuntimeError("the connection is closed")

    with pytest.raises(RuntimeError, match="the connection is closed") as error:
        run(guarded(app=failing)(Client("/").scope, Client("/").receive, closed))
    assert error.value.__context__ is None


def test_the_applications_parser_failing_on_a_refused_body_is_not_logged(caplog):
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        with pytest.raises(ClientDisconnect):
            await Request(scope, receive).body()
        raise ClientDisconnect

    client = Client("/", [piece(3 * MIB)])
    run(client.ask(guarded(app=app)))
    assert client.status == 413 and caplog.records == []


# --- Other kinds of connections ---


def test_a_web_socket_is_refused_and_the_lifespan_passes():
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])

    socket = Client("/", [{"type": "websocket.connect"}])
    socket.scope["type"] = "websocket"
    run(socket.ask(guarded(keys=[KEY], app=app)))
    assert socket.answered == [{"type": "websocket.close", "code": 1008}] and seen == []
    lifespan = Client("/")
    lifespan.scope = {"type": "lifespan"}
    run(lifespan.ask(guarded(keys=[KEY], app=app)))
    assert seen == ["lifespan"]
