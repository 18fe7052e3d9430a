"""A reasoner behind an endpoint: what is asked of it, and what its answers' coordinates mean."""

import asyncio
import base64
import io
import json
import threading
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from PIL import Image

from actors.config import EndpointConfig
from actors.endpoint import Endpoint
from phantoms import rows
from tests.encoded_images import encoded, turned
from umrg.answers import format_answer, parse_answer
from umrg.dataset import Dataset
from umrg.dataset_writer import write_rows
from umrg.frames import Frame, Size
from umrg.group import Group, SamplingParams
from umrg.prompts import PromptSpec

BOX, POINTS = (100.0, 200.0, 300.0, 400.0), ((150.0, 250.0), (250.0, 350.0))


def plain(request: dict[str, Any]) -> tuple[dict[str, Any], str]:
    return {"content": format_answer(box=BOX, points=POINTS, think="so")}, "stop"


class Server:
    """Answers every request as `reply` says: with a message and a reason to finish. Keeps what it was asked."""

    def __init__(self, reply: Callable[[dict[str, Any]], tuple[dict[str, Any], str]] = plain) -> None:
        self.reply = reply
        self.requests: list[dict[str, Any]] = []
        self.headers: list[str | None] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._send({"object": "list", "data": [{"id": "m", "object": "model", "created": 0, "owned_by": "us"}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.requests.append(body)
                server.headers.append(self.headers["Authorization"])
                message, reason = server.reply(body)
                choice = {"message": {"role": "assistant", **message}, "finish_reason": reason}
                choices = [{"index": i, **choice} for i in range(body["n"])]
                reply = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": choices}
                self._send(reply)

            def _send(self, reply: dict[str, Any]) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(json.dumps(reply).encode())

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server():
    running = Server()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "phantoms.parquet"
    write_rows(path, rows(1, seed=9, modalities=["CT"]))
    return Dataset.open(path)[0]


def ask(endpoint, sample, n):
    group = Group(run="e", step=0, index=0, sample=sample)
    return asyncio.run(endpoint.sample(group, SamplingParams(n=n, temperature=0.5, max_tokens=64, seed=1)))


def test_a_request_leaves_nothing_to_the_servers_defaults(server, sample, monkeypatch):
    monkeypatch.setenv("MEDREASONER_TEST_KEY", "secret")
    config = EndpointConfig(url=server.url, model="m", key_variable="MEDREASONER_TEST_KEY", body={"top_k": 0})
    ask(Endpoint(config, PromptSpec(), key=config.key()), sample, n=3)
    (asked,) = server.requests
    assert (asked["n"], asked["temperature"], asked["max_tokens"]) == (3, 0.5, 64)
    assert (asked["top_p"], asked["presence_penalty"], asked["frequency_penalty"], asked["top_k"]) == (1, 0, 0, 0)
    assert server.headers == ["Bearer secret"]


def test_an_endpoint_is_asked_in_the_words_of_a_template(server, sample):
    spec = PromptSpec(style="Wo? {query} {a: 1}")
    ask(Endpoint(EndpointConfig(url=server.url, model="m"), spec, key=None), sample, n=1)
    _, text = server.requests[0]["messages"][0]["content"]
    assert text == {"type": "text", "text": f"Wo? {sample.query} {{a: 1}}"}


def test_a_key_that_is_not_set_is_the_users_mistake(monkeypatch):
    monkeypatch.delenv("MEDREASONER_TEST_KEY", raising=False)
    config = EndpointConfig(url="http://127.0.0.1:9/v1", model="m", key_variable="MEDREASONER_TEST_KEY")
    with pytest.raises(ValueError, match="MEDREASONER_TEST_KEY is not set; export it"):
        config.key()


def test_the_server_is_sent_the_picture_that_was_counted(server, sample):
    colours = np.random.default_rng(0).integers(0, 256, (224, 112, 4), dtype=np.uint8)
    other = replace(sample, image_bytes=encoded(colours, "PNG", exif=turned(6)))
    samples = ask(Endpoint(EndpointConfig(url=server.url, model="m"), PromptSpec(), key=None), other, n=1)
    (message,) = server.requests[0]["messages"]
    kind, _, content = message["content"][0]["image_url"]["url"].partition(";base64,")
    assert kind == "data:image/png"
    with Image.open(io.BytesIO(base64.b64decode(content))) as sent:
        assert (sent.mode, sent.size, dict(sent.getexif())) == ("RGB", (224, 112), {})
        assert np.array_equal(np.asarray(sent), other.image())
    assert samples.frames.original == Size(224, 112)


def test_coordinates_are_in_the_frame_that_was_declared(server, sample):
    config = EndpointConfig(url=server.url, model="m", max_pixels=28 * 28 * 16)
    samples = ask(Endpoint(config, PromptSpec(), key=None), sample, n=1)
    (answer,) = (parse_answer(completion.text) for completion in samples.completions)
    side, model = sample.size.width, samples.frames.model.width
    assert (side, model) == (224, 112)
    assert answer.to_original(samples.frames, Frame.ORIGINAL).box == BOX
    assert answer.to_original(samples.frames, Frame.RELATIVE).box == pytest.approx([v * 224 / 1000 for v in BOX])
    assert answer.to_original(samples.frames, Frame.MODEL).box == pytest.approx([v * 2 for v in BOX])


DRAFT = format_answer(box=(0, 0, 9, 9), points=((1, 1), (8, 8)), think=None)
ANSWER = format_answer(box=BOX, points=POINTS, think=None)


@pytest.mark.parametrize(
    ("message", "text"),
    [
        # A reasoning parser, under either name, with white space as the model wrote it.
        ({"reasoning": "so\n", "content": f"\n\n{ANSWER}"}, f"<think>so\n</think>\n\n{ANSWER}"),
        ({"reasoning_content": "so", "content": ANSWER}, f"<think>so</think>{ANSWER}"),
        ({"reasoning_content": "so", "reasoning": None, "content": ANSWER}, f"<think>so</think>{ANSWER}"),
        ({"reasoning": "so", "reasoning_content": "so", "content": ANSWER}, f"<think>so</think>{ANSWER}"),
        ({"reasoning": f"{DRAFT}, no", "content": ANSWER}, f"<think>{DRAFT}, no</think>{ANSWER}"),
        # One that splits at the first of several closing tags.
        (
            {"reasoning": "<think>", "content": f"{DRAFT}</think>{ANSWER}"},
            f"<think><think></think>{DRAFT}</think>{ANSWER}",
        ),
        # One that found no thoughts, and one that leaves them where they were.
        ({"reasoning": "", "content": ANSWER}, ANSWER),
        ({"reasoning": None, "content": ANSWER}, ANSWER),
        ({"reasoning": "so", "content": f"<think>so</think>{ANSWER}"}, f"<think>so</think>{ANSWER}"),
        # No parser: the model, or the server's template, opened the thoughts.
        ({"content": f"<think>so</think>{ANSWER}"}, f"<think>so</think>{ANSWER}"),
        ({"content": f"so\n</think>\n{ANSWER}"}, f"<think>so\n</think>\n{ANSWER}"),
        ({"content": ANSWER}, ANSWER),
    ],
)
def test_thoughts_and_answer_are_put_together_again(server, sample, message, text):
    server.reply = lambda request: (message, "stop")
    config = EndpointConfig(url=server.url, model="m")
    (completion,) = ask(Endpoint(config, PromptSpec(), key=None), sample, n=1).completions
    assert completion.text == text
    answer = parse_answer(completion.text)
    assert answer.box == BOX and answer.well_formed(think="think" in text)


@pytest.mark.parametrize(
    "message",
    [
        {"reasoning": f"perhaps {DRAFT}", "content": None},
        {"reasoning_content": f"perhaps {DRAFT}", "content": ""},
        {"reasoning": f"perhaps {DRAFT}", "content": f"<think>perhaps {DRAFT}"},
        {"content": f"<think>perhaps {DRAFT}"},
        {"content": None},
    ],
)
def test_what_was_cut_off_within_the_thoughts_has_no_answer(server, sample, message):
    server.reply = lambda request: (message, "length")
    config = EndpointConfig(url=server.url, model="m")
    (completion,) = ask(Endpoint(config, PromptSpec(), key=None), sample, n=1).completions
    answer = parse_answer(completion.text)
    assert answer.failure(finished=completion.finished) == "cut off at the token limit"
