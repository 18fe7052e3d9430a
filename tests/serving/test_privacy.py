"""Nothing of an image, header, query or answer reaches a log, a metric, a trace or the cluster's state.

Every part of a request carries a canary of its own, and afterwards Ray's whole log folder, the metrics of every node
and the state API are searched for all of them. Once the application is a small one, which fails in every way that the
service could, deployed as Serve does it and as we do; once it is the service itself.
"""

import asyncio
import base64
import hashlib
import json
import logging
import os
import pickle
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import numpy as np
import psutil
import pytest
import ray
from fastapi import FastAPI, Form, Request, UploadFile
from fastapi.responses import JSONResponse, StreamingResponse
from PIL import Image, PngImagePlugin
from ray import serve
from ray.serve.schema import LoggingConfig
from ray.util.state import list_actors, list_jobs, list_objects, list_tasks, list_workers
from transformers import AutoTokenizer

from serving.messages import Overloaded
from serving.metrics import Exposition, living_nodes
from serving.privacy import (
    CONTROLLER_OPTIONS,
    LOGGING,
    PROXY_CALLBACK,
    UNHEARD,
    Fault,
    HeadersUnheard,
    Sealed,
    described,
    log_discreetly,
    sealed,
    unsealed,
)
from serving.run import NAME, Service, applications
from tests.conftest import ROOT, TINY_REASONER
from tests.encoded_images import encoded
from tests.nodes import free_port
from umrg.mistake import Mistake

SEARCH_SECONDS = 60.0
PLACES = (
    *("path", "query string", "method"),
    *("x-request-id", "x-session-id", "serve-multiplexed-model-id", "cookie", "user-agent", "referer"),
    *("traceparent", "tracestate", "authorization", "forwarded", "field", "file name", "file", "json"),
    *("mistake", "library error", "ingress error", "stream error", "forgotten task", "warning", "answer"),
)

PLACES_OF_THE_SERVICE = (
    *("key", "key name", "wrong key", "query", "long query", "window", "frame", "image id", "label", "accept", "host"),
    *("content type", "field name", "field value", "broken json", "broken form", "message", "system", "user"),
    *("url", "base64", "png text", "exif", "pixels", "abandoned", "while the engine dies"),
)

Canaries = dict[str, str]


def canaries(places: tuple[str, ...] = PLACES) -> Canaries:
    return {place: f"canary{secrets.token_hex(12)}" for place in places}


@dataclass(frozen=True)
class Traffic:
    """What is sent to an application."""

    whole: list[httpx.Request]
    """One after the other; the first is answered with 200."""
    abandoned: httpx.Request
    """Whose client leaves before the answer."""


@dataclass(frozen=True)
class Outcome:
    """What came of it."""

    kept: dict[str, set[str]]
    """Where canaries were found, by their places."""
    statuses: list[int]
    """Of the whole requests; 0 for an answer that broke off."""
    unreadable: int
    """Status of a request whose X-Request-Id is no text."""


def telling(canary: Canaries) -> dict[str, str]:
    """Headers that a server might write down."""
    return {
        "X-Request-Id": canary["x-request-id"],
        "X-Session-Id": canary["x-session-id"],
        "Serve-Multiplexed-Model-Id": canary["serve-multiplexed-model-id"],
        "Cookie": f"session={canary['cookie']}",
        "User-Agent": canary["user-agent"],
        "Referer": f"http://{canary['referer']}/",
        "Traceparent": f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01{canary['traceparent']}",
        "Tracestate": f"vendor={canary['tracestate']}",
        "X-Forwarded-For": canary["forwarded"],
    }


def traffic(address: str, canary: Canaries) -> Traffic:
    """Good and bad requests to the application of `build`, with a canary in every part."""
    headers = telling(canary) | {"Authorization": f"Bearer {canary['authorization']}"}
    query = {"q": canary["query string"]}
    form = {"query": canary["field"]}
    files = {"image": (f"{canary['file name']}.png", canary["file"].encode(), "image/png")}

    def request(method: str, path: str, **content: Any) -> httpx.Request:
        return httpx.Request(method, f"{address}{path}", headers=headers, params=query, **content)

    whole = [
        request("POST", "/v1/ground", data=form, files=files),
        request("POST", "/v1/ground", content=canary["file"].encode()),
        request("POST", "/v1/chat/completions", json={"text": canary["json"]}),
        request("POST", "/v1/chat/completions", content=canary["json"].encode()),
        request("GET", f"/{canary['path']}"),
        request("GET", f"/%2e%2e/{canary['path']}%00"),
        request(canary["method"].upper(), "/v1/ground"),
        *(
            request("POST", f"/fail/{way}", json={"text": canary[way.replace("-", " ")]})
            for way in ("mistake", "library-error", "ingress-error", "stream-error", "forgotten-task", "warning")
        ),
    ]
    return Traffic(whole, request("POST", "/fail/slow", json={"text": canary["answer"]}))


async def send(sent: Traffic) -> tuple[list[int], int]:
    """Statuses, of the whole requests and of an unreadable one, as `Outcome` has them."""
    async with httpx.AsyncClient(timeout=30, trust_env=False) as client:
        statuses = []
        for request in sent.whole:
            try:
                statuses.append((await client.send(request)).status_code)
            except httpx.RemoteProtocolError:
                statuses.append(0)
        with suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                await client.send(sent.abandoned)
        nowhere = sent.abandoned.url.copy_with(path="/nowhere")
        return statuses, (await client.get(nowhere, headers=[(b"x-request-id", b"\xff")])).status_code


class Model:
    """A replica behind the ingress, which fails as it is told."""

    def __init__(self, discreet: bool) -> None:
        self._discreet = discreet
        if discreet:
            log_discreetly()

    async def answer(self, way: str, text: str) -> str:
        if not self._discreet:
            return await self._answer(way, text)
        with sealed():
            return await self._answer(way, text)

    async def _answer(self, way: str, text: str) -> str:
        if way == "mistake":
            raise Mistake(f"{text} is empty; ask about something in the image")
        if way == "library-error":
            raise KeyError(text)
        if way == "forgotten-task":
            asyncio.get_running_loop().create_task(_failing(text))
        if way == "warning":
            logging.getLogger("a.library").warning("odd: %s", text)
        if way == "slow":
            await asyncio.sleep(5)
        return text

    async def stream(self, text: str):
        yield text
        if not self._discreet:
            raise KeyError(text)
        with sealed():
            raise KeyError(text)


async def _failing(text: str) -> None:
    raise KeyError(text)


class Outermost:
    """ASGI: an error that no route handles is answered with 500 and ends here."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        begun = False

        async def note(message: Any) -> None:
            nonlocal begun
            begun = True
            await send(message)

        with Fault() as fault:
            await self._app(scope, receive, note)
        if fault.name and not begun:
            await JSONResponse({"request_id": fault.name}, 500)(scope, receive, send)


def ingress(discreet: bool) -> type:
    """The class that answers requests, with routes that fail as they are told."""
    api = FastAPI()
    if discreet:
        api.add_middleware(Outermost)

    @serve.ingress(api)
    class Ingress:
        def __init__(self, model: Any) -> None:
            self._model = model
            if discreet:
                log_discreetly()

        @api.post("/v1/ground")
        async def ground(self, image: UploadFile, query: Annotated[str, Form()]) -> dict[str, str]:
            await image.read()
            return {"answer": await self._model.answer.remote("well", query)}

        @api.post("/v1/chat/completions")
        async def chat(self, asked: dict[str, str]) -> dict[str, str]:
            return {"answer": await self._model.answer.remote("well", asked["text"])}

        @api.post("/fail/{way}")
        async def fail(self, way: str, request: Request) -> Any:
            text = (await request.json())["text"]
            if way == "ingress-error":
                raise KeyError(text)
            if way == "stream-error":
                pieces = self._model.options(stream=True).stream.remote(text)
                return StreamingResponse(piece async for piece in pieces)
            try:
                return {"answer": await self._model.answer.remote(way, text)}
            except (ray.exceptions.RayTaskError, Mistake) as error:
                if isinstance(mistake := unsealed(error), Mistake):
                    return JSONResponse({"detail": str(mistake)}, status_code=400)
                raise

    return Ingress


def build(discreet: bool) -> serve.Application:
    """The application as the service is deployed, or as Serve does it by itself."""
    options: dict[str, Any] = {
        "ray_actor_options": {"num_cpus": 0},
        "graceful_shutdown_timeout_s": 0.1,
        "graceful_shutdown_wait_loop_s": 0.1,
    }
    if discreet:
        options["logging_config"] = LOGGING
    model: Any = serve.deployment(Model, **options)
    front: Any = serve.deployment(ingress(discreet), **options)
    app: serve.Application = front.bind(model.bind(discreet))
    return app


@pytest.fixture
def outcome(ray_cluster):
    """Serves an application, sends it requests, and searches the cluster's logs, metrics and state. options: of
    `serve.start`."""

    def of(app: serve.Application, sent: Callable[[str, Canaries], Traffic] = traffic, **options: Any) -> Outcome:
        canary = canaries()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        serve.start(http_options={"host": "127.0.0.1", "port": port}, **options)
        try:
            serve.run(app, name=NAME, route_prefix="/")
            requests = sent(f"http://127.0.0.1:{port}", canary)
            statuses, unreadable = asyncio.run(send(requests))
            metrics = _metrics(NAME, len(requests.whole))
            page = asyncio.run(Exposition(NAME).text())
            assert "ray_serve_num_http_requests_total" in page
            kept = found(canary, {"metrics": metrics, "/metrics": page, "state": _state(ray_cluster)})
            return Outcome(kept, statuses, unreadable)
        finally:
            serve.shutdown()

    return of


def session() -> Path:
    """Ray's folder of the running cluster."""
    return Path(ray._private.worker._global_node.get_session_dir_path())


def found(canary: Canaries, told: Mapping[str, str], before: Mapping[str, int] | None = None) -> dict[str, set[str]]:
    """The places whose canary is in a file of Ray's session or in another text, as it is or in base64, and the names of
    these. told: the other texts by name. before: the sizes of files whose beginnings are not searched."""
    texts = {name: text.encode() for name, text in told.items()}
    for path in session().rglob("*"):
        if path.is_file():
            name = str(path.relative_to(session()))
            texts[name] = path.read_bytes()[(before or {}).get(name, 0) :]
    assert any(name.startswith("logs/serve/") for name in texts), "Serve's logs are searched too"
    kept: dict[str, set[str]] = {}
    for name, content in ((name, content.lower()) for name, content in texts.items()):
        for place, text in canary.items():
            if any(form.lower() in content for form in _forms(text)):
                kept.setdefault(place, set()).add(name)
    return kept


def _forms(text: str) -> list[bytes]:
    """A text, and what base64 makes of it wherever it begins in the file."""
    shifted = (base64.b64encode(b"." * shift + text.encode()) for shift in range(3))
    return [text.encode(), *(coded[4:-4] for coded in shifted)]


def _metrics(application: str, answered: int) -> str:
    """What all nodes export, once Serve's proxy has counted the requests."""
    deadline = time.monotonic() + SEARCH_SECONDS
    while True:
        text = "\n".join(httpx.get(url, trust_env=False).text for url in living_nodes().values())
        counted = re.findall(
            rf'^ray_serve_num_http_requests_total{{.*application="{application}".*}} (\S+)$', text, re.M
        )
        if sum(map(float, counted)) >= answered - 2:  # the HTTP server itself refuses an unknown method
            return text
        assert time.monotonic() < deadline, f"{counted} of {answered} requests were counted"
        time.sleep(1)


def _state(dashboard: str) -> str:
    """Everything that Ray lists, tasks and actors with their errors, and what the dashboard says of the application."""
    listed = [
        repr(each)
        for list_all in (list_tasks, list_actors, list_workers, list_objects, list_jobs)
        for each in list_all(address=f"http://{dashboard}", detail=True, limit=10_000, raise_on_missing_output=False)
    ]
    details = httpx.get(f"http://{dashboard}/api/serve/applications/", trust_env=False).text
    return "\n".join([*listed, details])


@pytest.mark.slow
@pytest.mark.parametrize(
    "told",
    [pytest.param(False, id="proxies as they are", marks=pytest.mark.chaos), pytest.param(True, id="proxies of ours")],
)
def test_nothing_of_a_request_is_kept_but_where_its_error_arose(outcome, told):
    """Whether Serve's proxies do not hear the headers, or only log no more than errors."""
    ours = outcome(build(True), logging_config=LOGGING, controller_options=CONTROLLER_OPTIONS if told else None)
    assert ours.kept == {}
    assert ours.statuses[0] == 200 and {400, 422, 500, 0} < set(ours.statuses)
    assert ours.unreadable == (404 if told else 500), "a header that Serve hears and cannot read"
    logs = session() / "logs"
    text = "".join(path.read_text(errors="replace") for path in logs.glob("worker-*.err"))
    lines = re.findall(r"^ERROR .* medreasoner: fault [0-9a-f]{32}\nbuiltins.KeyError at (.*)$", text, re.M)
    assert any(
        re.search(r"privacy.py:\d+ _answer < .*privacy.py:\d+ answer < .*privacy.py:\d+ sealed", line) for line in lines
    )


@pytest.mark.slow
def test_serve_by_itself_keeps_a_good_deal(outcome):
    """The search finds what there is, and what docs/security.md says of Serve is so."""
    errors = {"mistake", "library error", "ingress error", "stream error", "forgotten task"}
    assert outcome(build(False)).kept.keys() == {"x-request-id", "warning", *errors}


def test_what_ray_and_vllm_do_unless_they_are_told():
    """docs/security.md relies on it."""
    from ray.serve._private import constants
    from ray.serve.schema import TracingConfig
    from vllm.engine.arg_utils import AsyncEngineArgs

    assert LoggingConfig().enable_access_log, "Serve's access log, with the client's X-Request-Id, is on"
    assert not constants.RAY_SERVE_LOG_CLIENT_ADDRESS
    assert not TracingConfig().enabled and not constants.RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH
    assert not constants.RAY_SERVE_ENABLE_TASK_EVENTS, "errors of replicas are not in the list of tasks"
    assert not constants.RAY_SERVE_ENABLE_HA_PROXY and not constants.RAY_SERVE_ENABLE_DIRECT_INGRESS
    assert constants.SERVE_HTTP_REQUEST_ID_HEADER.encode() in UNHEARD
    assert constants.SERVE_SESSION_ID.encode() in UNHEARD
    assert constants.SERVE_MULTIPLEXED_MODEL_ID.replace("_", "-").encode() in UNHEARD
    assert constants.SERVE_HTTP_REQUEST_TIMEOUT_S_HEADER.encode() in UNHEARD
    assert constants.SERVE_HTTP_REQUEST_DISCONNECT_DISABLED_HEADER.encode() in UNHEARD
    assert constants.RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH is None and PROXY_CALLBACK.endswith(
        "CALLBACK_IMPORT_PATH"
    )
    assert not AsyncEngineArgs.enable_log_requests


def test_the_settings_that_the_documentation_names_are_rays():
    from ray.serve._private import constants

    named = set(re.findall(r"RAY_SERVE_[A-Z_]+", (ROOT / "docs" / "security.md").read_text()))
    assert len(named) >= 3 and named <= vars(constants).keys()


def test_a_sealed_error_has_its_words_beside_it_wherever_it_goes():
    with pytest.raises(Sealed) as caught, sealed():
        raise Mistake("canary is empty")
    for told in (str(caught.value), repr(caught.value), "".join(traceback.format_exception(caught.value))):
        assert "canary is" not in told.replace('raise Mistake("canary is empty")', "")
    travelled = pickle.loads(pickle.dumps(caught.value))
    assert str(unsealed(travelled)) == "canary is empty" and isinstance(unsealed(travelled), Mistake)
    with pytest.raises(Sealed) as caught, sealed():
        raise Overloaded("busy")
    assert isinstance(unsealed(caught.value), Overloaded)


def test_a_librarys_error_is_named_and_not_told(caplog):
    with pytest.raises(Sealed) as caught, sealed():
        int("canary")
    travelled = pickle.loads(pickle.dumps(caught.value))
    assert isinstance(travelled, Sealed) and unsealed(travelled) is travelled and travelled.said is None
    assert f"fault {travelled.fault}" in caplog.text
    other = OSError("gone")
    assert unsealed(other) is other


def test_an_error_is_described_without_its_message():
    try:
        try:
            int("canary")
        except ValueError as error:
            raise KeyError("canary") from error
    except KeyError as error:
        text = described(error)
    assert re.fullmatch(r"builtins.KeyError at \S+:\d+ test_\w+\nafter builtins.ValueError at \S+:\d+ test_\w+", text)


DISCREET = """
import asyncio, gc, logging, threading, warnings
from serving.privacy import log_discreetly
log_discreetly()
log_discreetly()
def fail(*_): raise KeyError("canary")
async def failing(): fail()
async def forget():
    task = asyncio.create_task(failing()); await asyncio.sleep(0.01); del task; gc.collect()
    asyncio.get_running_loop().call_soon(fail, "canary"); await asyncio.sleep(0.01)
try:
    fail()
except KeyError as error:
    logging.getLogger("a.library").exception("failed with %s", error)
    logging.error(error)
logging.error("%d", "canary")
logging.getLogger("a.library").warning("canary")
warnings.warn("canary")
asyncio.run(forget())
thread = threading.Thread(target=fail); thread.start(); thread.join()
fail()
"""


def test_a_discreet_process_says_types_and_places_on_its_way_down():
    done = subprocess.run([sys.executable, "-c", DISCREET], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "canary" not in done.stdout + done.stderr
    assert "failed with KeyError\nbuiltins.KeyError at" in done.stderr
    assert done.stderr.count("builtins.KeyError at") == 5 and done.stderr.count("medreasoner: uncaught") == 2


def test_the_engine_does_not_print_its_input_when_it_dies():
    script = (
        "from serving.privacy import log_discreetly\n"
        "log_discreetly()\n"
        "import logging, vllm.logging_utils.dump_input as dump\n"
        "from vllm.config.logging import LoggingConfig\n"
        "from vllm.logger import configure_logging\n"
        "configure_logging(LoggingConfig())\n"
        "print(dump.logger.isEnabledFor(logging.ERROR), logging.getLogger('vllm.v1').isEnabledFor(logging.ERROR))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.split()[-2:] == ["False", "True"], done.stderr


def test_an_error_that_no_route_handles_is_a_500_and_ends_there(caplog):
    app = FastAPI()
    app.add_middleware(Outermost)

    @app.get("/fail")
    def fail() -> None:
        raise KeyError("canary")

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=True)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get("/fail")

    answer = asyncio.run(ask())
    assert answer.status_code == 500 and "canary" not in answer.text
    assert f"fault {answer.json()['request_id']}" in caplog.text


def test_serves_proxies_do_not_hear_what_clients_tell_them():
    seen: list[list[tuple[bytes, bytes]]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope.get("headers"))

    async def nothing(*_: Any) -> Any: ...

    headers = [(b"X-Request-Id", b"\xff"), (b"serve_multiplexed_model_id", b"m"), (b"accept", b"*/*")]
    asyncio.run(HeadersUnheard(app)({"type": "http", "headers": headers}, nothing, nothing))
    asyncio.run(HeadersUnheard(app)({"type": "lifespan"}, nothing, nothing))
    assert seen == [[(b"accept", b"*/*")], None]


@pytest.mark.parametrize("raised", [None, RuntimeError("canary")])
def test_where_a_replica_ended_before_it_answered_clients_are_told_to_try_again(raised):
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if raised:
            raise raised

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(HeadersUnheard(app))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get("/v1/models")

    answer = asyncio.run(ask())
    assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
    assert answer.json()["type"] == "unavailable" and "canary" not in answer.text


def test_a_body_without_end_is_cut_at_the_proxy(monkeypatch):
    monkeypatch.setattr("serving.privacy.MOST_BYTES", 1000)
    received: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (message := await receive())["type"] == "http.request":
            received.append(message)

    async def endless() -> Any:
        return {"type": "http.request", "body": b"x" * 300, "more_body": True}

    async def send(_: Any) -> None: ...

    asyncio.run(HeadersUnheard(app)({"type": "http", "headers": []}, endless, send))
    assert len(received) == 3


def test_a_response_has_one_id():
    """The service's own, not the one that Serve adds."""
    sent: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"x-request-id", b"ours"), (b"content-type", b"text/plain"), (b"x-request-id", b"Serve's")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b""})

    async def receive() -> Any:
        raise AssertionError

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(HeadersUnheard(app)({"type": "http", "headers": []}, receive, send))
    assert sent[0]["headers"] == [(b"x-request-id", b"ours"), (b"content-type", b"text/plain")]
    assert sent[1] == {"type": "http.response.body", "body": b""}


# The service itself. Its tests come last, since Serve is started anew by those before.


@dataclass(frozen=True)
class Case:
    """A request to the service."""

    name: str
    status: int
    """Of the answer."""
    request: httpx.Request


@dataclass(frozen=True)
class Asked:
    """The service, asked in every way."""

    statuses: dict[str, tuple[int, int]]
    """Of each case the expected and the actual one."""
    cut_off: list[str]
    """Streams that were under way when the engine's core was killed."""
    kept: dict[str, set[str]]
    """Where canaries were found, by their places."""


def marked_image(canary: Canaries) -> bytes:
    """A PNG whose metadata and whose pixels, bytes [40, 40, 3], say canaries."""
    text, exif = PngImagePlugin.PngInfo(), Image.Exif()
    text.add_text("Comment", canary["png text"])
    exif[0x010E] = canary["exif"]
    said = canary["pixels"].encode() * (40 * 40 * 3 // len(canary["pixels"]))
    return encoded(np.frombuffer(said, dtype=np.uint8).reshape(40, 40, 3), "PNG", pnginfo=text, exif=exif)


def cases(address: str, canary: Canaries, image: bytes) -> Iterator[Case]:
    """Good and bad requests to the service, with a canary in every part."""
    headers = telling(canary) | {"Authorization": f"Bearer {canary['key']}"}
    query = f"Which organ is {canary['query']}?"
    data_url = f"data:image/png;base64,{base64.b64encode(image).decode()}"

    def case(name: str, status: int, path: str, *, method: str = "POST", told: Any = (), **content: Any) -> Case:
        sent = httpx.Request(
            method,
            f"{address}{path}",
            params={"q": canary["query string"]},
            headers=headers | dict(told),
            **content,
        )
        return Case(name, status, sent)

    def ground(name: str, status: int, file: bytes = image, told: Any = (), **fields: str) -> Case:
        files = {"image": (f"{canary['file name']}.png", file, "image/png")}
        return case(name, status, "/v1/ground", told=told, data={"query": query, **fields}, files=files)

    def chat(name: str, status: int, url: str = data_url, text: str = canary["message"], **fields: Any) -> Case:
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
        messages = [
            {"role": "system", "content": canary["system"]},
            {"role": "user", "content": parts, "name": canary["user"]},
        ]
        asked = {"model": "tiny", "messages": messages, "max_tokens": 16, "temperature": 0, **fields}
        return case(name, status, "/v1/chat/completions", json=asked)

    encoded_image = base64.b64encode(image).decode()
    yield ground("answered", 200)
    yield ground("several samples", 200, samples="3", seed="1")
    yield ground("streamed", 200, told={"Accept": "text/event-stream"})
    yield ground("overlay", 200, told={"Accept": "image/vnd.medreasoner.overlay+png"})
    yield case("as JSON", 200, "/v1/ground", json={"query": query, "image": encoded_image})
    yield case("segmented", 200, "/v1/segment", json={"image": encoded_image, "box": [4, 4, 30, 30]})
    yield chat("chat", 200)
    yield chat("chat, streamed", 200, stream=True, user=canary["user"])
    yield ground("another host", 200, told={"Host": f"{canary['host']}.example"})
    yield ground("unknown key", 401, told={"Authorization": f"Bearer {canary['wrong key']}"})
    yield ground("no such media type", 406, told={"Accept": f"text/{canary['accept']}"})
    yield ground("no such window", 400, window=canary["window"])
    yield ground("no such frame", 422, frame=canary["frame"])
    unknown = {"query": query, "image": encoded_image, canary["field name"]: canary["field value"]}
    yield case("no such field", 422, "/v1/ground", json=unknown)
    yield ground("no image", 400, file=canary["file"].encode())
    yield ground("a damaged image", 400, file=image[: len(image) - 30])
    yield ground("too many characters", 400, query=canary["long query"] * 200)
    yield ground("too many tokens", 400, query=canary["long query"] * 130)
    yield ground("too many bytes", 413, file=canary["file"].encode() * 100_000)
    yield case("no such image id", 422, "/v1/segment", json={"image_id": canary["image id"], "box": [4, 4, 30, 30]})
    labels = {"image": encoded_image, "points": [[4, 4]], "labels": [canary["label"]]}
    yield case("no such label", 422, "/v1/segment", json=labels)
    yield case("outside the image", 400, "/v1/segment", json={"image": encoded_image, "box": [4, 4, 300, 300]})
    yield case("no JSON", 422, "/v1/ground", content=f'{{"query": "{canary["broken json"]}'.encode(), told=JSON)
    broken = canary["broken form"].encode()
    yield case("no form", 400, "/v1/ground", content=broken, told={"Content-Type": "multipart/form-data; boundary=b"})
    yield case("no such type", 415, "/v1/ground", content=broken, told={"Content-Type": canary["content type"]})
    yield chat("an address", 400, url=f"http://{canary['url']}.example/image.png")
    yield chat("no base64", 400, url=f"data:image/png;base64,{canary['base64']}!")
    yield chat("a long chat", 400, text=canary["message"] * 130)
    yield chat("too long an answer", 400, max_tokens=100_000)
    yield chat("no such model", 400, model=canary["field value"])
    yield case("no such path", 404, f"/{canary['path']}", method="GET")
    yield case("an odd path", 404, f"/%2e%2e/{canary['path']}%00", method="GET")
    yield case("no such method", 400, "/v1/ground", method=canary["method"].upper())


JSON = {"Content-Type": "application/json"}


async def ask_all(address: str, canary: Canaries) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """As `Asked` has them. The answers' words and masks become canaries, too."""
    image = marked_image(canary)
    statuses = {}
    headers = {"Authorization": f"Bearer {canary['key']}"}
    async with httpx.AsyncClient(base_url=address, timeout=150, trust_env=False, headers=headers) as client:
        for each in cases(address, canary, image):
            reply = await client.send(each.request)
            statuses[each.name] = each.status, reply.status_code
            if each.name == "answered":
                canary["completion"] = reply.json()["completion"]
                canary["completion in JSON"] = json.dumps(canary["completion"])[1:-1]
        fields = {"query": canary["abandoned"], "samples": "16"}
        with suppress(TimeoutError):
            async with asyncio.timeout(0.3):
                await client.post("/v1/ground", files={"image": image}, data=fields)
        return statuses, await streams_of_the_dying(client, canary["while the engine dies"], image)


async def streams_of_the_dying(client: httpx.AsyncClient, query: str, image: bytes) -> list[str]:
    """Kill the engine's core while it writes several answers, and ask until another engine answers; the streams that
    were under way."""
    url = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": query}]
    # Hot, so that the model does not soon find an end.
    chat = {"model": "tiny", "messages": [{"role": "user", "content": parts}], "temperature": 2.0, "stream": True}
    begun = [asyncio.Event() for _ in range(8)]

    async def read(seed: int) -> str:
        text = ""
        async with client.stream("POST", "/v1/chat/completions", json={**chat, "seed": seed}) as reply:
            async for piece in reply.aiter_text():
                text += piece
                begun[seed].set()
        return text

    (before,) = reasoners()
    (core,) = [each for each in psutil.Process(before).children(recursive=True) if "EngineCore" in each.name()]
    async with asyncio.timeout(150):
        streams = [asyncio.create_task(read(seed)) for seed in range(len(begun))]
        for each in begun:
            await each.wait()
        os.kill(core.pid, signal.SIGKILL)
        texts = await asyncio.gather(*streams)
        fields = {"query": query, "samples": "16"}
        while (await client.post("/v1/ground", files={"image": image}, data=fields)).status_code != 200:
            await asyncio.sleep(0.5)
    assert reasoners() != [before]
    return texts


def reasoners() -> list[int]:
    """Process ids of the reasoner's running replicas."""
    running = applications()[NAME].deployments["Reasoner"].replicas
    return [replica.pid for replica in running if replica.state == "RUNNING"]


def token_ids(text: str) -> str:
    """A text's tokens as a list is printed, without those at its ends, which depend on what is around it."""
    ids = AutoTokenizer.from_pretrained(TINY_REASONER).encode(text, add_special_tokens=False)[3:-3]
    assert len(ids) > 6
    return ", ".join(map(str, ids))


@pytest.fixture(scope="module")
def asked(ray_cluster):
    canary = canaries((*PLACES, *PLACES_OF_THE_SERVICE))
    key = {"name": canary["key name"], "sha256": hashlib.sha256(canary["key"].encode()).hexdigest()}
    args = {
        "model": str(TINY_REASONER),
        "name": "tiny",
        "rollout": {"num_cpus": 0.5, "max_prompt_tokens": 1024},
        "limits": {"image_mib": 1},
        "keys": [key],
    }
    before = {str(path.relative_to(session())): path.stat().st_size for path in session().rglob("*") if path.is_file()}
    service = Service(args, port=free_port())
    try:
        statuses, cut_off = asyncio.run(ask_all(service.start(), canary))
        page = asyncio.run(Exposition(NAME).text())
        assert "ray_medreasoner_serve_requests_total" in page
        told = {"metrics": _metrics(NAME, len(statuses)), "/metrics": page, "state": _state(ray_cluster)}
        canary["tokens of the query"] = token_ids(canary["query"])
        canary["a route"] = "/v1/segment"
        return Asked(statuses, cut_off, found(canary, told, before))
    finally:
        service.stop()


@pytest.mark.slow
def test_each_request_to_the_service_ended_as_it_should(asked):
    assert {name: actual for name, (_, actual) in asked.statuses.items()} == {
        name: expected for name, (expected, _) in asked.statuses.items()
    }


@pytest.mark.slow
def test_the_service_keeps_nothing_of_a_request(asked):
    """Of all that it was sent and has answered; the names of its own routes are in the metrics."""
    assert asked.kept == {"a route": {"metrics", "/metrics"}}


@pytest.mark.slow
def test_an_engine_died_meanwhile(asked):
    assert any('"type":"unavailable"' in text.replace(" ", "") for text in asked.cut_off), asked.cut_off
