"""What goes around the application: it names each request, lets in whom it may, bounds what is sent, and puts the
headers of security on whatever is answered. A plain ASGI middleware, so that streams pass through it as they are."""

import asyncio
import ipaddress
import re
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from starlette._utils import get_route_path
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.config import Limits
from serving.errors import internal, log_failure, problem
from serving.keys import EVERYBODY, Doorkeeper, Refused

OPEN = frozenset({"/healthz", "/readyz", "/docs", "/openapi.json"})
"""The paths that need no key, beside the files of the documentation's page, which lie directly below /docs/."""

REQUEST_ID = "X-Request-Id"

HEADERS: Mapping[str, str] = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; "
    "object-src 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), display-capture=(), geolocation=(), microphone=(), payment=(), usb=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
"""Of every response, whatever a route has set."""

_DOCS_FILE = re.compile(r"/docs/[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)+")
_LENGTH = re.compile(r"[0-9]{1,18}")
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\[\]:@/]*)(:[0-9]*)?")
_ORIGIN = re.compile(r"(https?)://([^/?#@\s]+)")
_MIB = 1 << 20


class BrokenResponse(RuntimeError):
    """An answer that could not be finished. It tells the server to end the connection, so that the client does not take
    the piece for the whole; it carries nothing of the error itself."""


class Guard:
    """The application, guarded. In `scope["state"]` a route finds `request_id` and `owner`, the name of the key that
    asks (`EVERYBODY` where none is needed).

    It refuses with a `Problem`: 401 for no key or an unknown one, 403 for what a browser sends from another site where
    no key is needed, 408 for a body that takes too long, 413 for one that is too large, 429 beyond a key's limits. An
    error that escapes the application becomes a 500. All of it holds for every request, but for keys, which `OPEN`
    paths do not need.
    """

    def __init__(self, app: ASGIApp, door: Doorkeeper, limits: Limits, *, local_only: bool = False) -> None:
        """app: the application. door: who is let in. limits: `image_mib` and `upload_seconds` of each request.
        local_only: whether this is a service for one's own machine, which is asked by its address or as localhost;
        where no key is needed, any other name is refused, since a page may have made that name mean this machine."""
        self._app, self._door, self._local_only = app, door, local_only
        self.limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._answer(scope, receive, send)
        else:
            # There is no socket to talk to.
            await receive()
            await send({"type": "websocket.close", "code": 1008})

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id, headers, path = uuid.uuid4().hex, Headers(scope=scope), get_route_path(scope)
        most = _most_bytes(headers.get("content-type", ""), self.limits)
        exchange = _Exchange(receive, send, most, self.limits.upload_seconds, {**HEADERS, REQUEST_ID: request_id})
        failure: Exception | None = None
        with ExitStack() as stack:
            try:
                owner = self._let_in(stack, path, headers)
                _check_length(headers, most)
                scope["state"] = {**scope.get("state", {}), "request_id": request_id, "owner": owner}
                await self._app(scope, exchange.receive, exchange.send)
            except Refused as refused:
                exchange.refused = refused
            except Exception as error:  # noqa: BLE001  # whatever it is, what it says may not leave this process
                failure = error
                if not exchange.explains(error):
                    log_failure(request_id, error)
        # Out of the handler, so that an error here does not carry the first one's message as its context.
        await exchange.finish(scope, request_id, path, failed=failure is not None)

    def _let_in(self, stack: ExitStack, path: str, headers: Headers) -> str:
        """Whose request it is; the key's account is charged until the stack is closed. Raises Refused."""
        if not self._door.needs_key:
            _check_origin(headers)
            if self._local_only:
                _check_host(headers)
        if is_open(path):
            return EVERYBODY
        sent = headers.getlist("authorization")
        return stack.enter_context(self._door.admit(sent[0] if len(sent) == 1 else None))


class _Exchange:
    """A request as it is received and its response as it is sent."""

    def __init__(self, receive: Receive, send: Send, most: int, seconds: float, headers: Mapping[str, str]) -> None:
        self._receive, self._send, self._headers = receive, send, headers
        self._most, self._seconds, self._received = most, seconds, 0
        self._deadline = asyncio.get_running_loop().time() + seconds
        self._whole = self._started = self._ended = False
        self.refused: Refused | None = None
        """Why no more is taken of the request."""
        self.gone = False
        """Whether the client has left."""

    async def receive(self) -> Message:
        """The next message for the application. Of a request that is refused it is that the client has gone, which
        every application knows how to end at, and which no parser takes for the end of the body."""
        if self.refused is None and not self._whole:
            message = await self._received_in_time()
            if self.refused is None:
                return message
        if self.refused is not None:
            return {"type": "http.disconnect"}
        return self._seen(await self._receive())

    def explains(self, error: Exception) -> bool:
        """Whether an error says no more than that the client has left."""
        return (self.gone or self.refused is not None) and isinstance(error, (ClientDisconnect, OSError))

    async def send(self, message: Message) -> None:
        """A message of the application's response. What it makes of a request that was refused meanwhile is dropped:
        the refusal itself will be the answer. So is what it answers to a client that has left before its request was
        whole: that would be counted as a fault of ours."""
        if (self.refused is not None or (self.gone and not self._whole)) and not self._started:
            return
        if message["type"] == "http.response.start":
            self._started = True
            headers = MutableHeaders(raw=list(message.get("headers", ())))
            for name, value in self._headers.items():
                headers[name] = value
            message = {**message, "headers": headers.raw}
        elif message["type"] == "http.response.body":
            self._ended = not message.get("more_body", False)
        await self._send(message)

    async def finish(self, scope: Scope, request_id: str, path: str, *, failed: bool) -> None:
        """Send what the application left to send: a refusal, or that it failed. Raises BrokenResponse where it failed
        in the middle of its answer."""
        if self.refused is not None and not self._started:
            response, self.refused = _refusal(self.refused, request_id, path), None
            await response(scope, self._receive, self.send)
        elif failed and not self._started and not self.gone:
            await internal(request_id, path=path)(scope, self._receive, self.send)
        elif failed and self._started and not self._ended and not self.gone:
            raise BrokenResponse(f"request {request_id} failed after its answer had begun")

    async def _received_in_time(self) -> Message:
        try:
            async with asyncio.timeout_at(self._deadline):
                message = self._seen(await self._receive())
        except TimeoutError:
            detail = f"the request did not arrive within {self._seconds:g} s; send it faster, or a smaller image"
            self.refused = Refused(408, "timed_out", detail)
            return {"type": "http.disconnect"}
        if message["type"] == "http.request":
            self._received += len(message.get("body", b""))
            self._whole = not message.get("more_body", False)
            if self._received > self._most:
                self.refused = _too_large(self._most)
        return message

    def _seen(self, message: Message) -> Message:
        self.gone = self.gone or message["type"] == "http.disconnect"
        return message


def is_open(path: str) -> bool:
    """Whether a path needs no key."""
    return path in OPEN or _DOCS_FILE.fullmatch(path) is not None


def _refusal(refused: Refused, request_id: str, path: str) -> Response:
    response = problem(refused.status, refused.type, refused.detail, request_id, refused.retry_after, path=path)
    if refused.status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


def _most_bytes(content_type: str, limits: Limits) -> int:
    """The most bytes that a body may have: an image, with room for what goes with it; in JSON the image is base64."""
    media_type = content_type.split(";")[0].strip().lower()
    image = limits.image_mib * _MIB
    is_json = media_type == "application/json" or media_type.endswith("+json")
    return (-(-image * 4 // 3) if is_json else image) + _MIB


def _too_large(most: int) -> Refused:
    return Refused(413, "too_large", f"the request has more than {most / _MIB:.1f} MiB; send a smaller image")


def _check_length(headers: Headers, most: int) -> None:
    """Raise Refused for a length that is none, or is said to be too large. What is said is not relied on."""
    for length in headers.getlist("content-length"):
        if not _LENGTH.fullmatch(length):
            raise Refused(400, "bad_request", "the Content-Length is not a number of bytes; let the client set it")
        if int(length) > most:
            raise _too_large(most)


def _check_origin(headers: Headers) -> None:
    """Raise Refused for what a browser sends on behalf of another site's page. It would not be kept from that by the
    service's address, which only its own machine can reach."""
    sites = {site.lower() for site in headers.getlist("sec-fetch-site")}
    hosts = headers.getlist("host")
    if not sites <= {"same-origin", "none"} or not all(_is_ours(each, hosts) for each in headers.getlist("origin")):
        raise Refused(403, "forbidden", "this service does not answer pages of other sites; open its own address")


def _is_ours(origin: str, hosts: Sequence[str]) -> bool:
    """Whether an Origin is that of a page of the host that is asked. A browser leaves out the scheme's own port."""
    found = _ORIGIN.fullmatch(origin.lower())
    if found is None:
        return False
    port = ":443" if found[1] == "https" else ":80"
    return found[2].removesuffix(port) in {host.strip().lower().removesuffix(port) for host in hosts}


def _check_host(headers: Headers) -> None:
    """Raise Refused for a name other than localhost. Only a name can be made to mean another machine than before."""
    for host in headers.getlist("host"):
        found = _HOST.fullmatch(host.strip().lower())
        if found is None or not (found[1] == "localhost" or _is_address(found[1].strip("[]"))):
            raise Refused(403, "forbidden", "this service is asked by its address or as localhost, not by another name")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
