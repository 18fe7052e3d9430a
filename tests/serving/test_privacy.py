"""Nothing of an image, header, query or answer reaches a log, a metric, a trace or the cluster's state.

Every part of a request carries a canary of its own, and afterwards Ray's whole log folder, the metrics of every node
and the state API are searched for all of them. The application is a small one that fails in every way that the service
can.
"""

import asyncio
import logging
import pickle
import re
import secrets
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import pytest
import ray
from fastapi import FastAPI, Form, Request, UploadFile
from fastapi.responses import JSONResponse, StreamingResponse
from ray import serve
from ray.serve.schema import LoggingConfig
from ray.util.state import list_actors, list_tasks

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
from tests.conftest import ROOT
from umrg.mistake import Mistake

NAME = "medreasoner"
SEARCH_SECONDS = 60.0
PLACES = (
    *("path", "query string", "method"),
    *("x-request-id", "x-session-id", "serve-multiplexed-model-id", "cookie", "user-agent", "referer"),
    *("traceparent", "tracestate", "authorization", "forwarded", "field", "file name", "file", "json"),
    *("mistake", "library error", "ingress error", "stream error", "forgotten task", "warning", "answer"),
)

Canaries = dict[str, str]


def canaries() -> Canaries:
    return {place: f"canary{secrets.token_hex(12)}" for place in PLACES}


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


def traffic(address: str, canary: Canaries) -> Traffic:
    """Good and bad requests to the application of `build`, with a canary in every part."""
    headers = {
        "X-Request-Id": canary["x-request-id"],
        "X-Session-Id": canary["x-session-id"],
        "Serve-Multiplexed-Model-Id": canary["serve-multiplexed-model-id"],
        "Cookie": f"session={canary['cookie']}",
        "User-Agent": canary["user-agent"],
        "Referer": f"http://{canary['referer']}/",
        "Traceparent": f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01{canary['traceparent']}",
        "Tracestate": f"vendor={canary['tracestate']}",
        "Authorization": f"Bearer {canary['authorization']}",
        "X-Forwarded-For": canary["forwarded"],
    }
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


def found(canary: Canaries, told: Mapping[str, str]) -> dict[str, set[str]]:
    """The places whose canary is in a file of Ray's session or in another text, and the names of these. told: the
    other texts by name."""
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    texts = {name: text.encode() for name, text in told.items()}
    texts |= {str(path.relative_to(session)): path.read_bytes() for path in session.rglob("*") if path.is_file()}
    assert any(name.startswith("logs/serve/") for name in texts), "Serve's logs are searched too"
    kept: dict[str, set[str]] = {}
    for name, content in texts.items():
        for place, text in canary.items():
            if text.encode() in content.lower():
                kept.setdefault(place, set()).add(name)
    return kept


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
    """Tasks and actors with their errors, and what the dashboard says of the application."""
    tasks = list_tasks(detail=True, limit=10_000, raise_on_missing_output=False)
    actors = list_actors(detail=True, limit=10_000, raise_on_missing_output=False)
    details = httpx.get(f"http://{dashboard}/api/serve/applications/", trust_env=False).text
    return "\n".join(map(repr, [*tasks, *actors, details]))


@pytest.mark.slow
@pytest.mark.parametrize("told", [False, True], ids=["proxies as they are", "proxies of ours"])
def test_nothing_of_a_request_is_kept_but_where_its_error_arose(outcome, told):
    """Whether Serve's proxies do not hear the headers, or only log no more than errors."""
    ours = outcome(build(True), logging_config=LOGGING, controller_options=CONTROLLER_OPTIONS if told else None)
    assert ours.kept == {}
    assert ours.statuses[0] == 200 and {400, 422, 500, 0} < set(ours.statuses)
    assert ours.unreadable == (404 if told else 500), "a header that Serve hears and cannot read"
    logs = Path(ray._private.worker._global_node.get_session_dir_path(), "logs")
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

    async def nothing(*_: Any) -> Any:
        raise AssertionError

    headers = [(b"X-Request-Id", b"\xff"), (b"serve_multiplexed_model_id", b"m"), (b"accept", b"*/*")]
    asyncio.run(HeadersUnheard(app)({"type": "http", "headers": headers}, nothing, nothing))
    asyncio.run(HeadersUnheard(app)({"type": "lifespan"}, nothing, nothing))
    assert seen == [[(b"accept", b"*/*")], None]


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
