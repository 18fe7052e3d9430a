"""A reasoner behind an endpoint: what is asked of it, and what its answers' coordinates mean."""

import asyncio
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from actors.config import EndpointConfig
from actors.endpoint import Endpoint
from umrg.answers import format_answer, parse_answer
from umrg.dataset import Dataset
from umrg.dataset_writer import write_rows
from umrg.frames import Frame
from umrg.group import Group
from umrg.phantoms import rows
from umrg.prompts import PromptSpec

BOX, POINTS = (100.0, 200.0, 300.0, 400.0), ((150.0, 250.0), (250.0, 350.0))


class Server:
    """Answers every request with one box and two points, and keeps what it was asked."""

    def __init__(self) -> None:
        self.requests: list[dict[str, object]] = []
        self.headers: list[str | None] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.requests.append(body)
                server.headers.append(self.headers["Authorization"])
                message = {"role": "assistant", "content": format_answer(box=BOX, points=POINTS, think="so")}
                choices = [{"index": i, "message": message, "finish_reason": "stop"} for i in range(body["n"])]
                reply = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": choices}
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
    return asyncio.run(endpoint.sample(group, n=n, temperature=0.5, max_tokens=64, run_seed=1))


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


def test_coordinates_are_in_the_frame_that_was_declared(server, sample):
    config = EndpointConfig(url=server.url, model="m", max_pixels=28 * 28 * 16)
    samples = ask(Endpoint(config, PromptSpec(), key=None), sample, n=1)
    (answer,) = (parse_answer(completion.text) for completion in samples.completions)
    side, model = sample.size.width, samples.frames.model.width
    assert (side, model) == (224, 112)
    assert answer.to_original(samples.frames, Frame.ORIGINAL).box == BOX
    assert answer.to_original(samples.frames, Frame.RELATIVE).box == pytest.approx([v * 224 / 1000 for v in BOX])
    assert answer.to_original(samples.frames, Frame.MODEL).box == pytest.approx([v * 2 for v in BOX])
