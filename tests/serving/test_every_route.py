"""Every route of the service, by hand: who may ask it, what goes with its replies, and what is logged of its
requests."""

import asyncio
import base64
import io
import logging
import re

import httpx
import pytest
from fastapi.routing import APIRoute
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from starlette.routing import Mount, Route

from serving.config import Key
from serving.guard import HEADERS, is_open
from serving.keys import new_key
from serving.routes import EVENTS, MASK, OVERLAY
from tests.serving.fake_models import FakeModels
from tests.serving.in_process import application, calling, interface
from tests.serving.test_routes import IMAGE

NEEDS_A_KEY = {
    ("POST", "/v1/ground"): True,
    ("POST", "/v1/segment"): True,
    ("POST", "/v1/chat/completions"): True,
    ("GET", "/v1/models"): True,
    ("GET", "/metrics"): True,
    ("GET", "/healthz"): False,
    ("GET", "/readyz"): False,
    ("GET", "/docs"): False,
    ("GET", "/docs/style.css"): False,
    ("GET", "/openapi.json"): False,
}
"""A new route is added here, by whoever has thought about it."""

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE", "PROPFIND")
SECRET, DIGEST = new_key()
KEY = Key(name="anna", sha256=DIGEST, per_minute=10**9)
RIGHT, UNKNOWN = {"Authorization": f"Bearer {SECRET}"}, {"Authorization": f"Bearer {new_key()[0]}"}
NO_KEYS: tuple[dict[str, str], ...] = (
    {},
    UNKNOWN,
    {"Authorization": SECRET},
    {"Authorization": f"Basic {SECRET}"},
    {"Authorization": "Bearer"},
)
CANARY = "canary-7f3a"

routes = pytest.mark.parametrize(("method", "path"), NEEDS_A_KEY)


def ask(*requests, app=None):
    """The replies to requests, each a method, a path as it stands in the request line, and headers."""

    async def call():
        async with calling(app or application(keys=(KEY,))) as client:
            return [await client.request(method, path, headers=headers) for method, path, headers in requests]

    return asyncio.run(call())


def declared(routes, before=""):
    """Method and path of all that an application answers; of what is mounted and no application of ours, `*`."""
    for route in routes:
        if isinstance(route, Mount):
            below = route.routes
            yield from declared(below, before + route.path) if below else [("*", before + route.path)]
        elif isinstance(route, (APIRoute, Route)):
            yield from ((method, before + route.path) for method in route.methods or {"*"})
        else:
            yield "*", before + str(getattr(route, "path", route))


def test_every_route_stands_in_the_table():
    api, _ = interface()
    assert sorted(declared(api.routes)) == sorted(NEEDS_A_KEY)


@routes
def test_who_has_no_key_is_kept_out_where_one_is_needed(method, path):
    needs_key = NEEDS_A_KEY[method, path]
    for reply in ask(*((method, path, headers) for headers in NO_KEYS)):
        assert (reply.status_code == 401) == needs_key, reply.text
        assert reply.status_code < 500 and ("www-authenticate" in reply.headers) == needs_key
    (reply,) = ask((method, path, RIGHT))
    assert reply.status_code == (200 if method == "GET" else 415), "it is let in, and its empty request looked at"


@routes
def test_no_method_goes_around_the_key_and_none_but_the_routes_own_is_answered(method, path):
    others = [other for other in METHODS if other != method]
    for other, reply in zip(others, ask(*((other, path, {}) for other in others)), strict=True):
        assert reply.status_code == (401 if NEEDS_A_KEY[method, path] else 405), (other, reply.text)
    for other, reply in zip(others, ask(*((other, path, RIGHT) for other in others)), strict=True):
        assert reply.status_code == 405 and reply.headers["allow"] == method, (other, reply.text)


@routes
def test_what_only_resembles_a_path_is_nothing_and_needs_a_key(method, path):
    resembling = [
        f"{path}/",
        f"{path}//",
        f"/{path}",
        f"{path}%2f",
        f"/x/%2e%2e{path}",
        f"{path}%00",
        f"{path};x=1",
        "/",
    ]
    resembling += [path.upper(), path.replace("/", "//"), f"{path}.", f"/docs/%2e%2e{path}", f"/docs%2f{path}"]
    for asked in resembling:
        url = httpx.URL("http://127.0.0.1:8000").copy_with(raw_path=asked.encode())
        kept_out, let_in = ask((method, url, {}), (method, url, RIGHT))
        assert let_in.status_code == 404, (asked, let_in.status_code)
        assert kept_out.status_code == (404 if is_open(url.path) else 401), (asked, kept_out.status_code)
        assert not is_open(url.path) or url.path.startswith("/docs/"), "files of the page that there are none of"


@routes
def test_every_reply_has_the_headers_of_security_and_an_id_of_its_own(method, path):
    requests = [(method, path, RIGHT), (method, path, {}), ("HEAD", path, {}), ("OPTIONS", path, RIGHT)]
    requests += [(method, f"{path}/", RIGHT), (method, path, {**RIGHT, "Content-Length": "many"})]
    requests += [(method, path, {**RIGHT, "X-Request-Id": CANARY, "Content-Length": str(10**12)})]
    replies = ask(*requests)
    for reply in replies:
        assert {name: reply.headers[name] for name in HEADERS} == dict(HEADERS)
        assert reply.headers.get_list("x-request-id") == [found := reply.headers["x-request-id"]]
        assert re.fullmatch("[0-9a-f]{32}", found)
        if reply.content and reply.status_code >= 400:
            assert reply.json()["request_id"] == found
    assert len({reply.headers["x-request-id"] for reply in replies}) == len(replies)


def test_nothing_that_a_client_sends_is_logged_whatever_comes_of_it(caplog, capfd):
    caplog.set_level(logging.DEBUG)
    broken: tuple[dict[str, Exception], ...] = (
        {},
        {"sample": ValueError(CANARY)},
        {"stream": ValueError(CANARY), "segment": KeyError(CANARY)},
    )
    statuses = set()
    for models in (*(FakeModels(failures=failures) for failures in broken), FakeModels(completion=CANARY)):
        replies = asyncio.run(_told(application(models, keys=(KEY,))))
        statuses |= {reply.status_code for reply in replies}
    assert {200, 204, 400, 401, 404, 405, 406, 415, 422, 500} <= statuses
    # This test's own client and event loop.
    written = [each for each in caplog.records if not each.name.startswith(("httpx", "httpcore", "asyncio"))]
    assert any(" failed: " in each.getMessage() for each in written), "faults of the service are logged"
    printed = "\n".join([*map(logging.Formatter().format, written), *capfd.readouterr()])
    for kept in (CANARY, base64.b64encode(CANARY.encode()).decode(), SECRET):
        assert kept not in printed


async def _told(app):
    """Replies to requests with the canary in every part."""
    headers = {**RIGHT, **dict.fromkeys(("User-Agent", "Cookie", "Referer", "X-Request-Id", "X-Own"), CANARY)}
    image = _image()
    encoded = base64.b64encode(image).decode()
    url = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}}
    content = [url, {"type": "text", "text": CANARY}]
    chat = {"model": "tiny", "user": CANARY, "messages": [{"role": "user", "content": content}]}
    form = {"files": {"image": (CANARY, image, f"image/{CANARY}")}, "data": {"query": CANARY}}
    sent = [{"url": "/v1/ground", **form, "headers": {"Accept": kind}} for kind in (MASK, OVERLAY, EVENTS, CANARY)]
    sent += [{"url": "/v1/ground", "json": {"image": encoded, "query": CANARY}}]
    sent += [{"url": "/v1/ground", **form, "data": {"query": CANARY, **fields}} for fields in _WRONG]
    sent += [{"url": "/v1/ground", "files": {"image": CANARY.encode()}, "data": {"query": CANARY}}]
    sent += [{"url": "/v1/ground", "content": CANARY.encode(), "headers": {"Content-Type": kind}} for kind in _KINDS]
    sent += [{"url": "/v1/segment", "json": {"image": encoded, "box": [1, 2, 3, 4]}}]
    sent += [{"url": "/v1/segment", "json": {"image_id": CANARY, CANARY: CANARY}}]
    sent += [{"url": "/v1/chat/completions", "json": body} for body in (chat, {**chat, "stream": True})]
    sent += [{"url": "/v1/chat/completions", "json": {**chat, field: CANARY}} for field in ("model", "n", CANARY)]
    sent += [{"url": f"/{CANARY}"}, {"url": "/healthz", "method": CANARY}]
    sent += [{"url": "/v1/models", "method": "GET", "headers": {"Authorization": f"Bearer {CANARY}"}}]
    async with calling(app, headers=headers, params={CANARY: CANARY}) as client:
        return [await client.request(**{"method": "POST", **request}) for request in sent]


_WRONG = ({"window": CANARY}, {"samples": CANARY}, {CANARY: CANARY}, {"frame": "77"})
_KINDS = ("application/json", "multipart/form-data; boundary=b", f"multipart/form-data; boundary={CANARY}", CANARY)


def _image():
    """A picture with a text of its own."""
    text, buffer = PngInfo(), io.BytesIO()
    text.add_text("Comment", CANARY)
    Image.open(io.BytesIO(IMAGE)).save(buffer, "PNG", pnginfo=text)
    return buffer.getvalue()
