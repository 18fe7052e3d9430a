"""Requests that chance would not find: small for their sender, and costly or confusing for who reads them."""

import asyncio
import base64
import json

import pytest

from serving.api import Problem
from tests.serving.fake_models import FakeModels
from tests.serving.fuzzed_requests import BOUNDARY, form, part
from tests.serving.in_process import application, calling
from tests.serving.test_routes import IMAGE

DEADLINE = 20.0
"""Seconds after which a test has failed, whatever it waits for."""
MIB = 1 << 20
FILE = part("image", IMAGE, file="a.png")
QUERY = part("query", b"Where is bile stored?")
MULTIPART = "multipart/form-data; boundary=" + BOUNDARY.decode()
URL = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(IMAGE).decode()}"}}


def ask(path, body, content_type):
    """The reply, and what the models were called for."""

    async def call():
        models = FakeModels()
        app = application(models, limits={"image_mib": 8})
        async with asyncio.timeout(DEADLINE), calling(app) as client:
            headers = {"Content-Type": content_type}
            return await client.post(path, content=body, headers=headers), models.calls

    return asyncio.run(call())


def refused(path, body, content_type):
    reply, calls = ask(path, body, content_type)
    problem = Problem.model_validate_json(reply.content)
    assert calls == [] and len(reply.content) < 4096 and problem.request_id == reply.headers["x-request-id"]
    return reply.status_code, problem.detail


@pytest.mark.parametrize("path", ["/v1/ground", "/v1/segment", "/v1/chat/completions"])
@pytest.mark.parametrize(
    "body",
    [
        b'{"points": [' + b"1," * (4 * MIB) + b"1]}",
        b'{"image": [' + b"[]," * (3 * MIB) + b"[]]}",
        b"{" + b",".join(b'"%x":1' % n for n in range(500_000)) + b"}",
        b'{"messages": [{"role": "user", "content": [' + b"{}," * (3 * MIB) + b"1]}]}",
        b"[" * (8 * MIB),
    ],
    ids=["numbers", "lists", "fields", "parts of a message", "depth"],
)
def test_json_of_many_values_is_refused_before_it_is_parsed(path, body):
    """Each would take hundreds of bytes, and a fault of its own a thousand."""
    status, detail = refused(path, body, "application/json")
    assert status == 400 and "20000 values" in detail


def test_of_many_faults_the_first_are_told():
    body = json.dumps(dict.fromkeys(map(str, range(5000)))).encode()
    status, detail = refused("/v1/ground", body, "application/json")
    assert status == 422 and detail.endswith("and 4986 more") and detail.count(";") == 16


@pytest.mark.parametrize("path", ["/v1/ground", "/v1/segment", "/v1/chat/completions"])
@pytest.mark.parametrize(
    "body",
    [
        b'{"seed": ' + b"1" * (8 * MIB) + b"}",
        b'{"query": "\\ud800"}',
        b'{"\\udfff": 1}',
        b'{"query": "\xed\xa0\x80"}',
        '{"query": "é"}'.encode("utf-16"),
        b'{"seed": NaN, "image": Infinity}',
        b'{"query": "' + b"x" * (4 * MIB),
        b"[" * 5000,
        b"",
        b"null",
    ],
    ids=["digits", "surrogate", "name", "raw surrogate", "utf-16", "nan", "no end", "depth", "empty", "null"],
)
def test_json_that_is_none_is_a_fault_of_its_sender(path, body):
    status, _ = refused(path, body, "application/json")
    assert status == 422


@pytest.mark.parametrize("text", ["true", '"1"', "1.5", "1e400", "null", "[1]"])
def test_json_has_types_and_a_form_has_texts(text):
    encoded = base64.b64encode(IMAGE).decode()
    body = f'{{"image": "{encoded}", "query": "?", "seed": {text}}}'.encode()
    assert refused("/v1/ground", body, "application/json")[0] == 422
    reply, _ = ask("/v1/ground", form((FILE, QUERY, part("seed", b"1"))), MULTIPART)
    assert reply.status_code == 200


@pytest.mark.parametrize(
    "charset", ["idna", "punycode", "undefined", "unicode_escape", "utf-7", "utf-16", "hex", "bz2", "\0", "x" * 9000]
)
def test_a_form_is_in_utf_8_and_no_codec_of_pythons_is_tried(charset):
    """Some never end, some give no text, and some give what cannot be written into an answer."""
    body = form((FILE, part("query", b"xn--\\ud800" + b"a" * 60_000)))
    assert refused("/v1/ground", body, f"{MULTIPART}; charset={charset}")[0] == 415
    reply, _ = ask("/v1/ground", form((FILE, QUERY)), f'{MULTIPART}; charset="UTF-8"')
    assert reply.status_code == 200


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        (form((part("image", (b"\r\n--" + BOUNDARY + b"x") * 400_000, file="a"), QUERY)), "too many parts"),
        (form((FILE, *[part(f"f{n}", b"") for n in range(90)])), "Too many fields"),
        (form((FILE, QUERY, part("extra", form((FILE,)))) * 40), "too many parts"),
        (form((FILE, QUERY, (QUERY[0] + b"\r\nX: y" * 20, b""))), "Invalid multipart"),
        (form((FILE, QUERY, (QUERY[0] + b"\r\nX:" + b"y" * 9000, b""))), "Invalid multipart"),
        (form((FILE, QUERY, (b"X: y", b""))), "Content-Disposition"),
        (form((FILE, part("query", b"x" * 2 * MIB))), "maximum size"),
        (form((FILE, QUERY, QUERY)), "more than once"),
        (form((part("query", IMAGE, file="a.png"),)), "not called image"),
        (form((FILE, QUERY)).replace(b"\r\n", b"\n"), "Invalid multipart"),
        (form((FILE, QUERY), b"another"), "Invalid multipart"),
        (form((part("image", b"", file="a.png"), QUERY)), "the file is empty"),
    ],
)
def test_a_form_that_is_none_is_told_so(body, detail):
    status, told = refused("/v1/ground", body, MULTIPART)
    assert status == 400 and detail in told, told


def test_a_form_within_a_form_is_a_text():
    inner = (part("query", b"")[0] + b"\r\nContent-Type: multipart/mixed; boundary=inner", form((FILE,), b"inner"))
    reply, calls = ask("/v1/ground", form((FILE, inner)), MULTIPART)
    assert reply.status_code == 400 and "characters" in reply.json()["detail"] and calls == []


@pytest.mark.parametrize("header", ["", "; boundary=", "; boundary=" + "b" * 300, "; boundary*=utf-8''b0undary"])
def test_a_form_without_a_boundary_is_told_so(header):
    assert refused("/v1/ground", form((FILE, QUERY)), f"multipart/form-data{header}")[0] == 400


def test_a_line_of_points_without_an_end_is_not_read():
    body = form((FILE, part("points", b"1,1;" * 200_000)))
    status, detail = refused("/v1/segment", body, MULTIPART)
    assert status == 400 and "points is too long" in detail


@pytest.mark.parametrize(
    "url",
    [
        *("http://127.0.0.1:9/a.png", "file:///etc/passwd", "ftp://a/b.png", "//a/b.png", "data:,", "", "javascript:1"),
        *("data:text/html;base64,PGI+", "data:image/png,%89PNG", "data:image/png;base64", "data:image/png;base64,%%%"),
    ],
)
def test_no_address_is_fetched_and_no_other_data_is_read(url):
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "?"}]
    body = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": content}]}).encode()
    assert refused("/v1/chat/completions", body, "application/json")[0] == 400


@pytest.mark.parametrize("content_type", ["", "text/plain", "application/x+json", "multipart/form-data; boundary=b"])
def test_a_chat_is_json(content_type):
    content = [URL, {"type": "text", "text": "?"}]
    body = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": content}]}).encode()
    assert refused("/v1/chat/completions", body, content_type)[0] == 415


def test_a_path_with_a_slash_too_many_leads_nowhere_else():
    """A redirection would repeat whatever host the client has named."""

    async def call():
        async with calling(application()) as client:
            return await client.post("/v1/ground/", headers={"Host": "elsewhere.example"})

    reply = asyncio.run(call())
    assert reply.status_code == 404 and "elsewhere" not in reply.text + str(reply.headers)
