"""The client, against a small server that speaks the service's protocol over a real socket."""

import asyncio
import base64
import json
import os
import pickle
import pty
import select
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise

import httpx
import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response, StreamingResponse
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cluster.cli import main
from serving.api import AnswerEvent, GroundOptions, GroundResponse, ReasoningEvent, Rle, SegmentResponse, Timings
from serving.client import (
    AsyncClient,
    Client,
    EventParser,
    Grounded,
    Options,
    RequestRefused,
    ServiceBusy,
    ServiceError,
    ServiceFault,
    Unreachable,
)
from tests.conftest import ROOT
from tests.encoded_images import BLOCKS, DEEP, encoded, turned
from tests.serving.fake_models import THOUGHTS, box_of, mask_of, points_of
from umrg.answers import format_answer
from umrg.images import decode_image, decode_mask, encode_png
from umrg.masks import encode_rle
from umrg.mistake import Mistake

QUERY = "What may break in old age?"
HEIGHT, WIDTH = BLOCKS.shape[:2]
BOX, POINTS = box_of(WIDTH, HEIGHT), points_of(WIDTH, HEIGHT)
MASK = mask_of(BOX, WIDTH, HEIGHT)
COMPLETION = format_answer(box=BOX, points=POINTS, think=THOUGHTS)
EXPERT = {"expert": "tiny", "expert_licence": "Apache-2.0", "image_id": "a" * 32, "request_id": "r1"}
SECONDS = Timings(decode=0.1, reason=0.2, segment=0.3, total=0.6)
ANSWER = GroundResponse(
    mask=Rle.model_validate(encode_rle(MASK)),
    score=0.875,
    width=WIDTH,
    height=HEIGHT,
    timings=SECONDS,
    query=QUERY,
    reasoning=THOUGHTS,
    well_formed=True,
    box=BOX,
    points=POINTS,
    confidence=None,
    completion=COMPLETION,
    model="tiny-reasoner",
    policy_version=7,
    **EXPERT,
)
PIECES = [COMPLETION[start : start + 9] for start in range(0, len(COMPLETION), 9)]
EVENTS = [
    *(("reasoning", ReasoningEvent(text=piece).model_dump_json()) for piece in PIECES),
    ("answer", AnswerEvent(reasoning=THOUGHTS, well_formed=True, box=BOX, points=POINTS).model_dump_json()),
    ("mask", ANSWER.model_dump_json()),
]
DEADLINE = 30.0


@dataclass
class Asked:
    """A request as the server saw it."""

    path: str
    headers: dict[str, str]
    fields: dict[str, str] = field(default_factory=dict)
    file: bytes | None = None
    filename: str | None = None
    json: dict | None = None


@dataclass
class Canned:
    """What the server answers: `replies` first, one each, and then what the protocol says."""

    url: str = ""
    replies: deque[Response] = field(default_factory=deque)
    always: Response | None = None
    """In place of every answer."""
    asked: list[Asked] = field(default_factory=list)
    events: list[tuple[str, str]] = field(default_factory=lambda: list(EVENTS))
    cut: int = 5
    """How many bytes of a stream are sent at a time."""
    held: threading.Event | None = None
    """What the last event of a stream waits for."""


def problem(status: int, type: str, detail: str = "a sentence", **headers: str) -> Response:
    content = {"detail": detail, "type": type, "request_id": "r7"}
    return JSONResponse(content, status, {name.replace("_", "-"): value for name, value in headers.items()})


def application(canned: Canned) -> FastAPI:
    api = FastAPI()

    async def took(request: Request) -> Asked:
        asked = Asked(request.url.path, dict(request.headers))
        if request.headers.get("content-type", "").startswith("multipart/form-data"):
            form = await request.form()
            asked.fields = {name: value for name, value in form.items() if isinstance(value, str)}
            upload = form.get("image")
            if upload is not None and not isinstance(upload, str):
                asked.file, asked.filename = await upload.read(), upload.filename
        elif request.method == "POST":
            asked.json = await request.json()
        canned.asked.append(asked)
        return asked

    def instead() -> Response | None:
        return canned.always or (canned.replies.popleft() if canned.replies else None)

    @api.post("/v1/ground")
    async def ground(request: Request) -> Response:
        asked = await took(request)
        if reply := instead():
            return reply
        answer = ANSWER.model_copy(update={"query": asked.fields["query"]})
        if asked.fields.get("mask") == "png":
            answer = answer.model_copy(
                update={"mask": None, "mask_png": base64.b64encode(encode_png(MASK)).decode("ascii")}
            )
        if int(asked.fields.get("samples", 1)) > 1:
            answer = answer.model_copy(update={"confidence": 0.75})
        if asked.headers["accept"] == "text/event-stream":
            return StreamingResponse(pieces(canned), media_type="text/event-stream")
        return Response(answer.model_dump_json(), media_type="application/json")

    @api.post("/v1/segment")
    async def segment(request: Request) -> Response:
        await took(request)
        if reply := instead():
            return reply
        found = ANSWER.model_dump(include=set(SegmentResponse.model_fields))
        return Response(SegmentResponse(**found).model_dump_json(), media_type="application/json")

    @api.get("/healthz")
    @api.get("/readyz")
    async def standing(request: Request) -> Response:
        await took(request)
        return instead() or JSONResponse({"status": "ok"})

    return api


async def pieces(canned: Canned):
    yield b": a comment\r\n\r\n"
    for index, (name, data) in enumerate(canned.events):
        while canned.held is not None and index + 1 == len(canned.events) and not canned.held.is_set():
            await asyncio.sleep(0.01)
        whole = f"event: {name}\ndata: {data}\n\n".encode()
        for start in range(0, len(whole), canned.cut):
            yield whole[start : start + canned.cut]


@contextmanager
def served(canned: Canned):
    """The server in a thread, at a port of its own."""
    server = uvicorn.Server(uvicorn.Config(application(canned), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        ends = time.monotonic() + DEADLINE
        while not server.started:
            assert time.monotonic() < ends and thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        canned.url = f"http://127.0.0.1:{port}"
        yield canned
    finally:
        server.should_exit = True
        thread.join(DEADLINE)


@pytest.fixture(scope="module")
def one_server():
    with served(Canned()) as canned:
        yield canned


@pytest.fixture
def server(one_server, monkeypatch):
    """The server as it begins each test."""
    fresh = Canned()
    for name in ("replies", "always", "asked", "events", "cut", "held"):
        setattr(one_server, name, getattr(fresh, name))
    monkeypatch.delenv("MEDREASONER_KEY", raising=False)
    return one_server


@pytest.fixture
def client(server):
    with Client(server.url) as client:
        yield client


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "jane-doe.png"
    path.write_bytes(encode_png(BLOCKS))
    return path


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def test_a_query_is_answered(client, server, image, tmp_path):
    found = client.ground(image, QUERY)
    assert (found.reasoning, found.box, found.points, found.score) == (THOUGHTS, BOX, POINTS, 0.875)
    assert found.mask_array.dtype == np.bool_ and np.array_equal(found.mask_array, MASK)
    assert np.array_equal(found.image, BLOCKS) and found.overlay().shape == BLOCKS.shape
    files = [path.name for path in found.save(tmp_path / "out", "a")]
    assert files == ["a.overlay.png", "a.json", "a.mask.png"]
    record = json.loads((tmp_path / "out" / "a.json").read_text())
    assert record.keys() == {"reasoning", "bbox", "points", "score", "completion"} and record["bbox"] == list(BOX)
    assert np.array_equal(decode_mask((tmp_path / "out" / "a.mask.png").read_bytes(), "mask"), MASK)
    (asked,) = server.asked
    assert asked.fields == {"query": QUERY} and asked.file == image.read_bytes()


def test_a_files_name_stays_here(client, server, image):
    client.ground(image, QUERY)
    assert "jane" not in json.dumps([server.asked[0].headers, server.asked[0].filename, server.asked[0].fields])


def test_every_kind_of_image_is_sent_without_loss(client, server, image):
    for given_ in (image, str(image), image.read_bytes(), BLOCKS, Image.fromarray(BLOCKS)):
        assert np.array_equal(client.ground(given_, QUERY).image, BLOCKS)
        assert np.array_equal(decode_image(server.asked[-1].file, "sent"), BLOCKS)
    picture = Image.fromarray(BLOCKS)
    picture.getexif().update(turned(6))
    client.ground(picture, QUERY)
    assert np.array_equal(decode_image(server.asked[-1].file, "sent"), np.rot90(BLOCKS, -1))


def test_the_options_are_those_of_the_interface(client, server):
    assert Options.__annotations__.keys() == GroundOptions.model_fields.keys()
    deep = encoded(DEEP[..., 0], "PNG")
    client.ground(deep, QUERY, think=False, samples=8, seed=3, mask="png", window="30000,60000", frame=0)
    fields = {"think": "false", "samples": "8", "seed": "3", "mask": "png", "window": "30000,60000", "frame": "0"}
    assert server.asked[0].fields == {"query": QUERY, **fields}
    assert GroundOptions.model_validate(fields).think is False


def test_of_several_samples_the_confidence_is_told(client):
    assert client.ground(BLOCKS, QUERY).confidence is None
    assert client.ground(BLOCKS, QUERY, samples=4).confidence == 0.75


def test_a_mask_comes_as_a_png_too(client):
    found = client.ground(BLOCKS, QUERY, mask="png")
    assert found.mask is None and found.mask_array is not None and np.array_equal(found.mask_array, MASK)


@pytest.mark.parametrize("cut", [1, 2, 7, 100_000])
def test_an_answer_is_read_while_it_is_written(client, server, cut):
    server.cut = cut
    *written, answer, found = client.ground_stream(BLOCKS, QUERY)
    assert "".join(piece.text for piece in written) == COMPLETION
    assert answer == AnswerEvent(reasoning=THOUGHTS, well_formed=True, box=BOX, points=POINTS)
    assert isinstance(found, Grounded) and found.mask_array is not None and np.array_equal(found.mask_array, MASK)
    assert found.overlay().shape == BLOCKS.shape


def test_events_of_a_later_version_are_passed_over(client, server):
    server.events.insert(0, ("progress", "1"))
    assert isinstance(list(client.ground_stream(BLOCKS, QUERY))[-1], Grounded)


def test_a_stream_may_be_left_and_the_client_goes_on(client, server):
    stream = client.ground_stream(BLOCKS, QUERY)
    assert next(stream) == ReasoningEvent(text=PIECES[0])
    stream.close()
    assert client.ground(BLOCKS, QUERY).box == BOX


@pytest.mark.parametrize(
    ("type", "error"), [("unavailable", ServiceBusy), ("bad_request", RequestRefused), ("internal", ServiceFault)]
)
def test_a_problem_within_a_stream_ends_it(client, server, type, error):
    told = {"detail": "a sentence", "type": type, "request_id": "r9"}
    server.events[2:] = [("error", json.dumps(told))]
    stream = client.ground_stream(BLOCKS, QUERY)
    assert [next(stream).text, next(stream).text] == PIECES[:2]
    with pytest.raises(error, match="a sentence") as raised:
        next(stream)
    assert (raised.value.type, raised.value.request_id, raised.value.status) == (type, "r9", None)
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("events", "error", "said"),
    [
        (EVENTS[:3], Unreachable, "ended its answer before the mask"),
        ([("mask", "{")], ServiceFault, "did not answer as a MedReasoner service of this version"),
        ([("reasoning", "[1]")], ServiceFault, "did not answer as a MedReasoner service of this version"),
    ],
    ids=["half", "no JSON", "another type"],
)
def test_a_stream_that_is_none_of_ours_is_told(client, server, events, error, said):
    server.events = list(events)
    with pytest.raises(error, match=said):
        list(client.ground_stream(BLOCKS, QUERY))


def test_a_stream_is_asked_for_again_until_it_begins(client, server):
    server.replies += [problem(503, "unavailable", retry_after="0")]
    assert isinstance(list(client.ground_stream(BLOCKS, QUERY))[-1], Grounded) and len(server.asked) == 2


def test_a_box_and_points_are_sent_as_a_form_and_an_id_as_json(client, server):
    box, points = np.array(BOX), np.array(POINTS, dtype=np.float32)
    found = client.segment(BLOCKS, box=box, points=points, labels=np.array([1, 0]), window="128,256")
    assert np.array_equal(found.mask_array, MASK) and found.overlay().shape == BLOCKS.shape
    sent = server.asked[0].fields
    assert [float(edge) for edge in sent["box"].split(",")] == list(BOX)
    assert [tuple(map(float, point.split(","))) for point in sent["points"].split(";")] == list(POINTS)
    assert sent["labels"] == "1,0" and sent["window"] == "128,256" and server.asked[0].file
    again = client.segment(image_id=found.image_id, box=BOX)
    assert server.asked[1].json == {"image_id": "a" * 32, "box": list(BOX)}
    with pytest.raises(ValueError, match="the image is not at hand"):
        again.overlay()


def test_an_image_that_is_forgotten_is_told_by_its_type(client, server):
    server.replies += [problem(404, "unknown_image")]
    with pytest.raises(RequestRefused) as raised:
        client.segment(image_id="b" * 32, box=BOX)
    assert raised.value.type == "unknown_image" and raised.value.status == 404


@pytest.mark.parametrize("path", ["health", "ready"])
def test_a_service_stands_or_does_not(client, server, path):
    assert getattr(client, path)()
    server.replies += [problem(503, "unavailable")]
    assert not getattr(client, path)()
    assert len(server.asked) == 2
    server.replies += [PlainTextResponse("welcome")]
    with pytest.raises(ServiceError, match="not as a MedReasoner service does; check the address"):
        getattr(client, path)()
    with Client(f"http://127.0.0.1:{free_port()}") as nobody:
        assert not getattr(nobody, path)()


def test_the_key_comes_from_the_argument_or_the_environment(server, monkeypatch):
    def sent(**options) -> str | None:
        with Client(server.url, **options) as client:
            client.health()
        return server.asked[-1].headers.get("authorization")

    assert sent() is None
    assert sent(key="one") == "Bearer one"
    monkeypatch.setenv("MEDREASONER_KEY", "two\n")
    assert sent() == "Bearer two" and sent(key="one") == "Bearer one"


def test_a_key_that_is_none_is_not_repeated():
    for key in ("séсret", "se cret", "se\ncret"):
        with pytest.raises(ValueError, match="the key has characters") as raised:
            Client("http://127.0.0.1:1", key=key)
        assert "cret" not in str(raised.value)


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "", "ftp://a", "http://", "http://a/?b", "http://a:b", "http://[:::]"]
)
def test_what_is_no_address_is_refused(url):
    with pytest.raises(ValueError, match="is no service's address; give http://HOST:PORT"):
        Client(url)


def test_a_password_in_the_address_is_refused_and_not_repeated():
    with pytest.raises(ValueError, match="give the key in MEDREASONER_KEY instead") as raised:
        Client("http://me:secret@host")
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    "options",
    [{"samples": 0}, {"temperature": 1}, {"mask": "jpeg"}, {"frame": -1}],
    ids=["no samples", "unknown", "format", "frame"],
)
def test_options_that_cannot_be_are_refused_before_anything_is_sent(client, server, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        client.ground(BLOCKS, QUERY, **options)
    assert not server.asked


@pytest.mark.parametrize(
    ("asked", "error", "said"),
    [
        (lambda client: client.ground("none.png", QUERY), ValueError, "none.png is not a file"),
        (lambda client: client.ground(BLOCKS[..., 0], QUERY), ValueError, "this one is uint8"),
        (lambda client: client.ground(Image.new("F", (3, 3)), QUERY), ValueError, "more than 8 bits"),
        (lambda client: client.ground(3, QUERY), TypeError, "an image is a path, bytes, a PIL image or an array"),
        (lambda client: client.ground(BLOCKS, " <|image_pad|> "), ValueError, "the query is empty"),
        (lambda client: client.segment(box=BOX), ValueError, "either an image or the image_id"),
        (lambda client: client.segment(BLOCKS, image_id="a" * 32, box=BOX), ValueError, "either an image or"),
        (lambda client: client.segment(BLOCKS), ValueError, "the prompt is empty"),
        (lambda client: client.segment(BLOCKS, points=POINTS, labels=[1]), ValueError, "2 points and 1 labels"),
        (lambda client: client.segment(BLOCKS, box=(1, 2, 3)), ValueError, "box"),
        (lambda client: client.segment(image_id="nope", box=BOX), ValueError, "image_id"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_sent(client, server, asked, error, said):
    with pytest.raises(error, match=said):
        asked(client)
    assert not server.asked


@pytest.mark.parametrize(("status", "type"), [(429, "overloaded"), (503, "unavailable"), (504, "timed_out")])
def test_a_busy_service_is_asked_again(client, server, status, type):
    server.replies += [problem(status, type, retry_after="0")] * 2
    assert client.ground(BLOCKS, QUERY).box == BOX
    assert [asked.file for asked in server.asked] == [encode_png(BLOCKS)] * 3


def test_a_service_that_stays_busy_is_told(server):
    server.always = problem(503, "unavailable", "a part is being replaced; try again later", retry_after="0")
    with (
        Client(server.url, retries=2) as client,
        pytest.raises(ServiceBusy, match=r"a part is being replaced; try again later \(request r7\)") as raised,
    ):
        client.ground(BLOCKS, QUERY)
    error = raised.value
    assert (error.status, error.type, error.request_id, error.retry_after) == (503, "unavailable", "r7", 0.0)
    assert len(server.asked) == 3 and not isinstance(error, ValueError)


@pytest.mark.parametrize("retry_after", ["3600", "Fri, 31 Dec 2100 23:59:59 GMT"])
def test_a_wait_beyond_the_deadline_is_not_begun(client, server, retry_after):
    server.always = problem(429, "overloaded", retry_after=retry_after)
    with pytest.raises(ServiceBusy) as raised:
        client.ground(BLOCKS, QUERY)
    assert (raised.value.retry_after or 0) >= 3600 and len(server.asked) == 1


@pytest.mark.parametrize("retry_after", ["soon", "-1", "", "1e3", "²"])
def test_a_wait_that_is_no_time_is_none(server, retry_after):
    server.always = problem(429, "overloaded", retry_after=retry_after)
    with Client(server.url, retries=0) as client, pytest.raises(ServiceBusy) as raised:
        client.ground(BLOCKS, QUERY)
    assert raised.value.retry_after is None


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 415, 422])
def test_a_mistake_of_the_clients_own_is_a_value_error_and_not_repeated(client, server, status):
    server.always = problem(status, "bad_request", "the image is damaged; send another")
    with pytest.raises(ValueError, match="the image is damaged; send another") as raised:
        client.ground(BLOCKS, QUERY)
    assert isinstance(raised.value, RequestRefused) and isinstance(raised.value, Mistake)
    assert raised.value.status == status and len(server.asked) == 1


def test_a_fault_of_the_service_is_no_value_error_and_not_repeated(client, server):
    server.always = problem(500, "internal")
    with pytest.raises(ServiceFault, match=r"request r7") as raised:
        client.ground(BLOCKS, QUERY)
    assert not isinstance(raised.value, ValueError) and len(server.asked) == 1


@pytest.mark.parametrize(
    ("reply", "error", "said"),
    [
        (PlainTextResponse("<html>"), ServiceFault, "did not answer as a MedReasoner service of this version"),
        (JSONResponse({"box": 1}), ServiceFault, "check the address and both versions"),
        (Response(status_code=204), ServiceFault, "did not answer as a MedReasoner service"),
        (PlainTextResponse("no", 404), RequestRefused, r"answered 404 \(Not Found\), and not as a MedReasoner"),
        (PlainTextResponse("no", 502), ServiceFault, r"answered 502 \(Bad Gateway\)"),
        (JSONResponse({"detail": "no"}, 500), ServiceFault, "answered 500"),
        (RedirectResponse("https://elsewhere/"), RequestRefused, r"redirects \(307\) to 'https://elsewhere/'"),
        (JSONResponse({**ANSWER.model_dump(), "width": 3}), ServiceFault, "the mask is not of the image's size"),
    ],
    ids=["text", "JSON", "nothing", "404", "502", "500", "redirect", "another size"],
)
def test_a_reply_that_is_none_of_ours_is_told(client, server, reply, error, said):
    server.always = reply
    with pytest.raises(error, match=said):
        client.ground(BLOCKS, QUERY)


@pytest.mark.parametrize("counts", ["", "zzzz", "04", "é"])
def test_a_damaged_mask_is_none(client, server, counts):
    damaged = ANSWER.model_dump()
    damaged["mask"]["counts"] = counts
    server.always = JSONResponse(damaged)
    found = client.ground(BLOCKS, QUERY)
    with pytest.raises(ServiceFault, match="the service sent a damaged mask"):
        _ = found.mask_array


@contextmanager
def speaking(reply: bytes, times: int):
    """A server that sends each of so many connections the same bytes, whatever it is asked, and hangs up. Gives its
    address and the number of connections so far."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(DEADLINE)
        met: list[int] = []

        def serve() -> None:
            for _ in range(times):
                connection, _address = listening.accept()
                with connection:
                    met.append(1)
                    connection.settimeout(DEADLINE)
                    asked = b""
                    # The end of a multipart form; what is closed before it was read is reset.
                    while not asked.endswith(b"--\r\n"):
                        asked += connection.recv(1 << 16)
                    connection.sendall(reply)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", met
        thread.join(DEADLINE)


@pytest.mark.parametrize(
    "reply",
    [
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\nabcd",
    ],
    ids=["another protocol", "nothing", "half", "not compressed"],
)
def test_a_connection_that_breaks_off_is_made_again(reply):
    with speaking(reply, times=2) as (url, met), Client(url, retries=1) as client:
        with pytest.raises(Unreachable, match="broke off") as raised:
            client.ground(BLOCKS, QUERY)
        assert isinstance(raised.value.__cause__, httpx.RequestError) and raised.value.type == "unreachable"
    assert len(met) == 2


def test_a_stream_that_breaks_off_is_not_made_again():
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 1000\r\n\r\n"
    with speaking(head + b'event: reasoning\ndata: {"text": "a"}\n\n', times=1) as (url, met), Client(url) as client:
        stream = client.ground_stream(BLOCKS, QUERY)
        assert next(stream) == ReasoningEvent(text="a")
        with pytest.raises(Unreachable, match="broke off"):
            next(stream)
    assert len(met) == 1


def test_nobody_at_the_address_is_one_sentence():
    url = f"http://127.0.0.1:{free_port()}"
    with Client(url, retries=1) as client, pytest.raises(Unreachable) as raised:
        client.ground(BLOCKS, QUERY)
    assert str(raised.value).startswith(f"nothing answers at {url} (") and "\n" not in str(raised.value)


def test_an_answer_that_does_not_come_ends_at_the_deadline():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with Client(url, timeout=0.5) as client, pytest.raises(Unreachable, match=r"did not answer within 0.5 s"):
            client.ground(BLOCKS, QUERY)


def test_this_machine_is_asked_directly_whatever_proxy_is_set(server, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
    with Client(server.url) as client:
        assert client.health()


def test_an_error_travels_between_processes(client, server):
    server.always = problem(401, "unauthorized")
    with pytest.raises(RequestRefused) as raised:
        client.ground(BLOCKS, QUERY)
    copy = pickle.loads(pickle.dumps(raised.value))
    assert str(copy) == str(raised.value) and copy.status == 401 and copy.type == "unauthorized"


def test_the_asynchronous_client_does_the_same(server):
    async def ask():
        async with AsyncClient(server.url, key="one") as client:
            server.replies += [problem(429, "overloaded", retry_after="0")]
            together = await asyncio.gather(*(client.ground(BLOCKS, QUERY) for _ in range(8)))
            events = [event async for event in client.ground_stream(BLOCKS, QUERY)]
            segmented = await client.segment(BLOCKS, box=BOX)
            return together, events, segmented, await client.health(), await client.ready()

    together, events, segmented, health, ready = asyncio.run(asyncio.wait_for(ask(), DEADLINE))
    assert all(np.array_equal(found.mask_array, MASK) for found in [*together, segmented]) and health and ready
    assert "".join(event.text for event in events[:-2]) == COMPLETION and events[-1].image.shape == BLOCKS.shape
    assert {asked.headers["authorization"] for asked in server.asked} == {"Bearer one"}


def test_the_asynchronous_client_raises_the_same(server):
    async def ask(url: str, retries: int):
        async with AsyncClient(url, retries=retries) as client:
            await client.ground(BLOCKS, QUERY)

    server.always = problem(400, "bad_request")
    with pytest.raises(RequestRefused):
        asyncio.run(ask(server.url, 3))
    with pytest.raises(Unreachable, match="nothing answers at"):
        asyncio.run(ask(f"http://127.0.0.1:{free_port()}", 0))

    async def stream():
        async with AsyncClient(server.url) as client:
            return [event async for event in client.ground_stream(BLOCKS, QUERY)]

    server.always, server.events = None, EVENTS[:2]
    with pytest.raises(Unreachable, match="ended its answer before the mask"):
        asyncio.run(stream())


def test_the_client_needs_neither_torch_nor_ray():
    seen = "import sys, serving.client; print({'torch', 'transformers', 'ray', 'vllm'} & sys.modules.keys())"
    found = subprocess.run([sys.executable, "-c", seen], cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert found.stdout == "set()\n", found.stderr


LINE = st.text(st.characters(codec="utf-8", exclude_characters="\r\n\ufeff"), max_size=8)
NAMES = LINE.filter(bool)
SSE = st.lists(st.tuples(NAMES, st.lists(LINE, min_size=1, max_size=3)), max_size=4)
END = st.sampled_from(["\n", "\r\n", "\r"])


@given(SSE, END, st.lists(st.integers(0, 200), max_size=8), st.booleans(), st.booleans())
def test_events_are_the_same_wherever_their_bytes_are_cut(events, end, cuts, mark, comments):
    lines = []
    for name, data in events:
        lines += [": ping", "", "retry: 3"] if comments else []
        lines += [f"event: {name}", *(f"data: {line}" for line in data), ""]
    sent = (("\ufeff" if mark else "") + "".join(line + end for line in lines)).encode()
    places = [0, *sorted(cut for cut in cuts if cut <= len(sent)), len(sent)]
    parser = EventParser()
    found = [event for a, b in pairwise(places) for event in parser.feed(sent[a:b])]
    found += parser.feed(b"", final=True)
    assert found == [(name, "\n".join(data)) for name, data in events]


@given(st.lists(st.binary(max_size=60), max_size=5))
def test_any_bytes_are_read_as_some_events(chunks):
    whole, cut = EventParser(), EventParser()
    events = whole.feed(b"".join(chunks)) + whole.feed(b"", final=True)
    assert [event for chunk in chunks for event in cut.feed(chunk)] + cut.feed(b"", final=True) == events


@pytest.mark.parametrize(
    ("sent", "events"),
    [
        (b"data: a\n\n", [("message", "a")]),
        (b"data:a\ndata: b\ndata:  c\n\n", [("message", "a\nb\n c")]),
        (b"event: x\n\ndata: a\n\n", [("message", "a")]),
        (b"data\n\n", [("message", "")]),
        (b":data: a\n\n", []),
        (b"id: 1\nretry: 5\nother: 2\n\n", []),
        (b"data: open", []),
        (b"data: open\n", []),
    ],
)
def test_events_are_those_of_the_standard(sent, events):
    parser = EventParser()
    assert parser.feed(sent) + parser.feed(b"", final=True) == events


def run(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["medreasoner", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    return int(exit_.value.code or 0)


def test_the_command_asks_a_service(monkeypatch, capsys, server, image, tmp_path):
    out = tmp_path / "out"
    assert run(monkeypatch, "ground", str(image), QUERY, "--server", server.url, "--out", str(out)) == 0
    printed = capsys.readouterr().out.splitlines()
    x1, y1, x2, y2 = BOX
    assert printed[0] == f"reasoning  {THOUGHTS}"
    assert printed[1] == f"box        {x1:.0f}, {y1:.0f}, {x2:.0f}, {y2:.0f}  (x1, y1, x2, y2 in pixels)"
    assert printed[2].startswith("points     ") and printed[3].startswith("saved      ") and len(printed) == 4
    assert sorted(path.name for path in out.iterdir()) == [
        "jane-doe.json",
        "jane-doe.mask.png",
        "jane-doe.overlay.png",
    ]


def test_the_command_tells_how_far_several_samples_agree(monkeypatch, capsys, server, image, tmp_path):
    arguments = ("--server", server.url, "--samples", "4", "--out", str(tmp_path))
    assert run(monkeypatch, "ground", str(image), QUERY, *arguments) == 0
    assert "confidence 0.75\n" in capsys.readouterr().out and server.asked[0].fields["samples"] == "4"


def test_the_commands_key_comes_from_a_file_or_the_environment(monkeypatch, server, image, tmp_path):
    (tmp_path / "key").write_text("of-the-file\n")
    monkeypatch.setenv("MEDREASONER_KEY", "of-the-environment")
    arguments = ("ground", str(image), QUERY, "--server", server.url, "--out", str(tmp_path))
    run(monkeypatch, *arguments)
    run(monkeypatch, *arguments, "--key-file", str(tmp_path / "key"))
    sent = [asked.headers["authorization"] for asked in server.asked]
    assert sent == ["Bearer of-the-environment", "Bearer of-the-file"]


def test_an_unusable_answer_of_a_service_is_exit_code_1(monkeypatch, capsys, server, image, tmp_path):
    fields = {"mask": None, "score": None, "box": None, "points": None, "well_formed": False, "completion": "no answer"}
    server.always = JSONResponse(ANSWER.model_copy(update=fields).model_dump())
    assert run(monkeypatch, "ground", str(image), QUERY, "--server", server.url, "--out", str(tmp_path)) == 1
    assert "no usable box and points in the answer: 'no answer'" in capsys.readouterr().out
    assert json.loads((tmp_path / "jane-doe.json").read_text())["completion"] == "no answer"


@pytest.mark.parametrize(
    ("reply", "code", "said"),
    [
        (problem(401, "unauthorized", "no key; set MEDREASONER_KEY"), 2, "no key; set MEDREASONER_KEY"),
        (problem(429, "overloaded", "full; try again later", retry_after="9999"), 1, "full; try again later"),
        (problem(500, "internal", "the service failed"), 1, "the service failed (request r7)"),
        (PlainTextResponse("welcome"), 1, "did not answer as a MedReasoner service"),
    ],
    ids=["refused", "busy", "fault", "foreign"],
)
def test_what_a_service_refuses_is_one_line(monkeypatch, capsys, server, image, tmp_path, reply, code, said):
    server.always = reply
    assert run(monkeypatch, "ground", str(image), QUERY, "--server", server.url, "--out", str(tmp_path / "out")) == code
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and said in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--server", "URL", "--model", "."],
            "--model is the service's own choice; leave out either that or --server",
        ),
        (["--server", "URL", "--expert", "tiny", "--prompt", "full"], "--prompt and --expert are the service's own"),
        (["--server", "URL", "--checkpoint", "a"], "--checkpoint is the service's own choice"),
        (["--samples", "3"], "--samples is for a service; give its address with --server"),
        (["--key-file", "key"], "--key-file is for a service; give its address with --server"),
        (["--server", "URL", "--key-file", "none"], "none is not a file; give one that holds the key alone"),
        (["--server", "URL", "--key-file", "empty"], "empty is empty; write the key into it"),
        (["--server", "URL", "--key-file", "IMAGE"], "the key has characters that no key has"),
        (["--server", "URL", "--window", "4"], "the window '4' cannot be read"),
        (["--server", "somewhere"], "'somewhere' is no service's address"),
    ],
)
def test_the_commands_mistakes_are_one_line(monkeypatch, capsys, server, image, tmp_path, arguments, said):
    (tmp_path / "empty").touch()
    monkeypatch.chdir(tmp_path)
    named = {"URL": server.url, "IMAGE": str(image)}
    assert run(monkeypatch, "ground", str(image), QUERY, *(named.get(each, each) for each in arguments)) == 2
    error = capsys.readouterr().err.strip()
    assert said in error and len(error.splitlines()) == 1 and not server.asked


def test_nobody_at_the_commands_address_is_one_line(monkeypatch, capsys, image, tmp_path):
    url = f"http://127.0.0.1:{free_port()}"
    assert run(monkeypatch, "ground", str(image), QUERY, "--server", url, "--out", str(tmp_path)) == 2
    assert f"error: nothing answers at {url}" in capsys.readouterr().err


def test_on_a_terminal_the_reasoning_is_shown_while_it_is_written(server, image, tmp_path):
    command = ["ground", str(image), QUERY, "--server", server.url, "--out", str(tmp_path)]
    server.held = threading.Event()
    ours, theirs = pty.openpty()
    asking = subprocess.Popen(
        [sys.executable, "-m", "cluster.cli", *command],
        cwd=ROOT,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=theirs,
    )
    os.close(theirs)
    try:
        shown, ends = b"", time.monotonic() + DEADLINE
        while THOUGHTS.encode() not in shown:
            assert time.monotonic() < ends, shown
            if select.select([ours], [], [], 0.1)[0]:
                shown += os.read(ours, 1 << 12)
        server.held.set()
        printed, _ = asking.communicate(timeout=DEADLINE)
    finally:
        server.held.set()
        asking.kill()
        asking.wait(DEADLINE)
        os.close(ours)
    assert asking.returncode == 0 and f"reasoning  {THOUGHTS}" in printed.decode()
