"""What the service's logs have of a request: its own id, its route and its status, and nothing that a client sent.

Three things keep it so, and docs/security.md says what each of them is for:

- `LOGGING` for Serve's own logs, of every deployment and of the proxies;
- `log_discreetly` in every process that sees a request: errors are logged by type and place, without their message;
- `sealed` around the methods of the models' replicas: Ray writes what they raise into logs, so the message travels
  beside the error.

Imports neither Ray nor torch.
"""

import logging
import os
import sys
import threading
import traceback
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.api import Problem
from serving.messages import Failed
from umrg.mistake import Mistake

LOGGING: Final[dict[str, Any]] = {"encoding": "TEXT", "log_level": "ERROR", "enable_access_log": False}
"""`logging_config` of each deployment, and of Serve itself (`serve.start`, a YAML file's top level). Serve's access
logs and warnings name requests by what the client's X-Request-Id says."""
PROXY_CALLBACK: Final = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
"""Environment variable that makes Serve's proxies call a function."""
CONTROLLER_OPTIONS: Final = {"runtime_env": {"env_vars": {PROXY_CALLBACK: "serving.privacy.proxy_middlewares"}}}
"""`controller_options` of `serve.start`, or of a YAML file's top level: proxies have the environment of the controller,
which starts them. Our code must be on their nodes."""
UNHEARD: Final = frozenset(
    {
        b"x-request-id",
        b"x-session-id",
        b"serve-multiplexed-model-id",
        b"x-request-timeout-seconds",
        b"x-request-disconnect-disabled",
        b"traceparent",
        b"tracestate",
    }
)
"""Headers, with `-` for `_`, by which any client could tell Serve how to name, route, time or trace a request."""

MOST_BYTES: Final = 256 << 20
"""Of a request's body, at the proxies: above what any configuration should allow, since each replica has its own
limits (`limits.image_mib`)."""

_log = logging.getLogger("medreasoner")
_ENGINE_LOGGING = Path(__file__).with_name("engine_logging.json")


class Sealed(Exception):
    """What a replica raises in place of an error: its text says nothing, and the error's words travel beside it.

    An instance goes from process to process, so it can be made without arguments."""

    def __init__(self, said: Mistake | Failed | None = None, fault: str = "") -> None:
        super().__init__()
        self.said = said
        """What is wrong with the request, or why it failed; None for an error of our own or of a library."""
        self.fault = fault
        """Names that error in the replica's log."""


class Fault(AbstractContextManager["Fault"]):
    """Around code whose errors end here: one is logged by type and place, and gets a name."""

    name: str | None = None
    """Names the error in the log; None where there was none."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception) or isinstance(error, Sealed):
            return False
        self.name = uuid.uuid4().hex
        _log.error("fault %s", self.name, exc_info=error)
        return True


@contextmanager
def sealed() -> Iterator[None]:
    """Around what a replica does with a request: whatever is raised within leaves as `Sealed`. What is neither
    `Mistake` nor `Failed` is logged, by type and place."""
    with Fault() as fault:
        try:
            yield
        except (Mistake, Failed) as error:
            raise Sealed(error) from None
    if fault.name:
        raise Sealed(None, fault.name)


def unsealed(error: BaseException) -> BaseException:
    """What a replica raised, of the error that Ray hands to its caller: the Mistake or Failed itself, `Sealed` for an
    error of our own or of a library, or, where no replica spoke, the error as it is."""
    found = getattr(error, "cause", error)
    if not isinstance(found, Sealed):
        return error
    return found if found.said is None else found.said


def described(error: BaseException) -> str:
    """Types and places of an error and of those that led to it, without a message or a value."""
    lines: list[str] = []
    each: BaseException | None = error
    while each is not None and len(lines) < 10:
        frames = traceback.extract_tb(each.__traceback__)
        places = " < ".join(f"{frame.filename}:{frame.lineno} {frame.name}" for frame in reversed(frames))
        lines.append(f"{type(each).__module__}.{type(each).__qualname__} at {places or 'no place of this process'}")
        each = each.__cause__ or (None if each.__suppress_context__ else each.__context__)
    return "\nafter ".join(lines)


def log_discreetly() -> None:
    """Make this process log errors without their messages, and libraries nothing below an error. For every process that
    sees requests, before it loads anything; a second call changes nothing."""
    if _LogRecords.installed:
        return
    _LogRecords.installed = True
    logging.setLogRecordFactory(_LogRecords(logging.getLogRecordFactory()))
    logging.getLogger("ray.serve").addFilter(_unnamed)
    # Otherwise a record that cannot be formatted is printed with its arguments.
    logging.raiseExceptions = False
    logging.captureWarnings(True)
    logging.basicConfig(level=logging.ERROR, format="%(levelname)s %(asctime)s %(name)s: %(message)s")
    logging.getLogger().setLevel(logging.ERROR)
    sys.excepthook = _log_uncaught
    threading.excepthook = lambda args: _log_uncaught(args.exc_type, args.exc_value, args.exc_traceback)
    sys.unraisablehook = lambda args: _log_uncaught(args.exc_type, args.exc_value, args.exc_traceback)
    # An engine that dies would print the image's tensors.
    os.environ.setdefault("VLLM_LOGGING_CONFIG_PATH", str(_ENGINE_LOGGING))


class _LogRecords:
    """Makes log records as `factory` does, with errors described in place of their messages."""

    installed = False

    def __init__(self, factory: Callable[..., logging.LogRecord]) -> None:
        self._factory = factory

    def __call__(self, *arguments: Any, **keywords: Any) -> logging.LogRecord:
        record = self._factory(*arguments, **keywords)
        if isinstance(record.msg, BaseException):
            record.msg, record.args = type(record.msg).__qualname__, None
        if isinstance(record.args, tuple):
            record.args = tuple(_nameless(each) for each in record.args)
        if record.name == "asyncio":
            # It goes on with what a task was called with, and with its error.
            record.msg, record.args = str(record.msg).partition("\n")[0].partition("(")[0], None
        if record.exc_info and record.exc_info[1] is not None:
            # Formatters take this text in place of the traceback that they would write.
            record.exc_text, record.exc_info = described(record.exc_info[1]), None
        return record


def _unnamed(record: logging.LogRecord) -> bool:
    """Take the request's id from a record of Serve, and keep Serve from putting it there: it is what the client's
    X-Request-Id says."""
    record.__dict__.pop("request_id", None)
    record.skip_context_filter = True
    return True


def _nameless(value: object) -> object:
    return type(value).__qualname__ if isinstance(value, BaseException) else value


def _log_uncaught(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    _log.error("uncaught", exc_info=(kind, error or kind(), trace))


class HeadersUnheard:
    """ASGI, in Serve's proxies: drops what clients would tell Serve by headers, and the request's id that Serve adds to
    a response which has the service's own. Where a replica ended while it had a request, clients are told to try
    again."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if "headers" in scope:
            kept = [
                (name, value) for name, value in scope["headers"] if name.lower().replace(b"_", b"-") not in UNHEARD
            ]
            scope = {**scope, "headers": kept}

        started, received = False, 0

        async def receive_bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            # Serve's proxy keeps what comes until a replica asks for it.
            return message if received <= MOST_BYTES else {"type": "http.disconnect"}

        async def send_one_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message = {**message, "headers": _with_first_id(message.get("headers", ()))}
            await send(message)

        with Fault():
            await self._app(scope, receive_bounded, send_one_id)
        if not started and scope["type"] == "http":
            # The replica that had the request ended before it answered: of Serve's own the client would get a bare 500.
            detail = "a part of the service is being replaced; try again later"
            told = Problem(detail=detail, type="unavailable", request_id="none").model_dump()
            await JSONResponse(told, status_code=503, headers={"Retry-After": "1"})(scope, receive, send)


def _with_first_id(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Serve appends its own."""
    kept: list[tuple[bytes, bytes]] = []
    for name, value in headers:
        if name.lower() != b"x-request-id" or not any(each.lower() == b"x-request-id" for each, _ in kept):
            kept.append((name, value))
    return kept


def proxy_middlewares() -> list[Middleware]:
    """What Serve's proxies put before themselves, where their environment (`PROXY_CALLBACK`) names this."""
    log_discreetly()
    return [Middleware(HeadersUnheard)]
