"""The service while it is asked: what dies is replaced, and what is changed drops no request."""

import asyncio
import os
import signal
import threading
import time
from dataclasses import dataclass, field

import httpx
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from phantoms import rows
from serving.run import NAME, Service, applications
from tests.conftest import TINY_REASONER
from tests.nodes import free_port
from umrg.dataset import Dataset
from umrg.dataset_writer import write_rows

pytestmark = [pytest.mark.slow, pytest.mark.cluster]

CLIENTS = 4


@dataclass
class Traffic:
    """Clients that ask one after another about a few images, until they are told to stop."""

    address: str
    questions: list[tuple[bytes, str]]
    replies: list[tuple[float, int, httpx.Response]] = field(default_factory=list)
    """Monotonic time of the reply's end, number of the question, and the reply."""
    broken: list[Exception] = field(default_factory=list)
    """Connections that broke."""

    def __enter__(self):
        self._ended = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._ask()))
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        self._thread.join(200)
        assert not self._thread.is_alive(), "no request lasts longer than it may"

    async def _ask(self):
        async with httpx.AsyncClient(base_url=self.address, timeout=150) as http:
            await asyncio.gather(*(self._client(http, i) for i in range(CLIENTS)))

    async def _client(self, http, number):
        while not self._ended.is_set():
            number = (number + 1) % len(self.questions)
            image, query = self.questions[number]
            try:
                reply = await http.post("/v1/ground", files={"image": image}, data={"query": query})
            except httpx.TransportError as error:
                self.broken.append(error)
                await asyncio.sleep(0.5)
                continue
            self.replies.append((time.monotonic(), number, reply))
            if reply.status_code != 200:
                await asyncio.sleep(0.5)

    def answered(self, since=0.0):
        return [reply for at, _, reply in self.replies if at > since and reply.status_code == 200]

    def await_answers(self, count, *, since, seconds=150):
        deadline = time.monotonic() + seconds
        while len(self.answered(since)) < count:
            assert time.monotonic() < deadline, [(n, r.status_code, r.text[:200]) for _, n, r in self.replies[-5:]]
            time.sleep(0.2)
        return time.monotonic() - since


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "phantoms.parquet"
    write_rows(path, rows(6, seed=4, modalities=["CT"], phrasings="held_out", queries_per_image=1))
    return [(sample.image_bytes, sample.query) for sample in Dataset.open(path)]


@pytest.fixture(scope="module")
def newer(tmp_path_factory):
    """The tiny model with other weights, as of a later training step."""
    folder = tmp_path_factory.mktemp("runs") / "step-000007"
    folder.mkdir()
    for path in TINY_REASONER.iterdir():
        if path.name != "model.safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    torch.manual_seed(0)
    weights = {
        name: tensor + 0.02 * tensor.float().std().nan_to_num() * torch.randn_like(tensor)
        for name, tensor in load_file(TINY_REASONER / "model.safetensors").items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


ARGS = {"model": str(TINY_REASONER), "name": "tiny"}


@pytest.fixture(scope="module")
def service(ray_cluster):
    running = Service(ARGS, port=free_port())
    running.start()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def expected(service, questions):
    """The answer to each question, by version of the weights: filled as versions are met for the first time."""
    return {0: [ask(service.address(), *question) for question in questions]}


def ask(address, image, query):
    reply = httpx.post(f"{address}/v1/ground", files={"image": image}, data={"query": query}, timeout=150)
    reply.raise_for_status()
    return said(reply)


def said(reply):
    found = reply.json()
    return found["completion"], found["mask"]


def replicas(deployment):
    """Process ids of a deployment's running replicas."""
    found = applications()[NAME].deployments[deployment].replicas
    return [replica.pid for replica in found if replica.state == "RUNNING"]


def await_replicas(deployment, count, seconds=150):
    deadline = time.monotonic() + seconds
    while len(found := replicas(deployment)) != count:
        assert time.monotonic() < deadline, found
        time.sleep(0.5)
    return found


def engine_core(replica):
    """The process of the engine's core that belongs to a reasoner's replica."""
    (core,) = [child for child in psutil.Process(replica).children(recursive=True) if "EngineCore" in child.name()]
    return core.pid


def assert_right(traffic, expected):
    """Every reply is the answer of its version, or says when to try again."""
    for _, number, reply in traffic.replies:
        if reply.status_code == 200:
            assert said(reply) == expected[reply.json()["policy_version"]][number]
        else:
            assert reply.status_code in (429, 503, 504) and "retry-after" in reply.headers, (reply, reply.text)
    assert not traffic.broken


def test_when_an_ingress_replica_is_killed_its_requests_are_told_to_try_again(service, questions, expected):
    """Serve answers in its place, and the other one goes on."""
    with Traffic(service.address(), questions) as traffic:
        traffic.await_answers(5, since=0.0)
        before = await_replicas("Ingress", 2)
        os.kill(before[0], signal.SIGKILL)
        traffic.await_answers(5, since=time.monotonic())
        deadline = time.monotonic() + 100
        while len(set(replicas("Ingress")) - {before[0]}) < 2:
            assert time.monotonic() < deadline, "no new replica"
            time.sleep(0.2)
    assert_right(traffic, expected)


@pytest.mark.parametrize(
    "victim", ["engine core", *(pytest.param(role, marks=pytest.mark.chaos) for role in ("Reasoner", "Segmenter"))]
)
def test_what_is_killed_is_replaced_and_no_answer_is_wrong(service, questions, expected, victim):
    with Traffic(service.address(), questions) as traffic:
        traffic.await_answers(5, since=0.0)
        (replica,) = await_replicas("Segmenter" if victim == "Segmenter" else "Reasoner", 1)
        killed = engine_core(replica) if victim == "engine core" else replica
        at = time.monotonic()
        os.kill(killed, signal.SIGKILL)
        # What was being written when it died may still end well: the replacement answers later than that.
        deployment = "Segmenter" if victim == "Segmenter" else "Reasoner"
        deadline = time.monotonic() + 150
        while replicas(deployment) in ([replica], []):
            assert time.monotonic() < deadline, f"no new replica of {deployment}"
            time.sleep(0.2)
        recovery = traffic.await_answers(5, since=time.monotonic())
        print(f"{victim}: a new replica after {time.monotonic() - recovery - at:.1f} s")
    assert_right(traffic, expected)
    failed = sum(reply.status_code != 200 for _, _, reply in traffic.replies)
    print(f"{victim}: {len(traffic.replies)} requests, {failed} told to try again")


def test_newer_weights_are_taken_over_without_dropping_a_request(service, questions, expected, newer):
    before = replicas("Reasoner")
    with Traffic(service.address(), questions) as traffic:
        traffic.await_answers(5, since=0.0)
        service.reload({**ARGS, "model": str(newer)})
        at = time.monotonic()
        traffic.await_answers(10, since=at)
    assert [reply.status_code for _, _, reply in traffic.replies] == [200] * len(traffic.replies) and not traffic.broken
    versions = [reply.json()["policy_version"] for _, _, reply in traffic.replies]
    assert versions == sorted(versions) and set(versions) == {0, 7}
    assert replicas("Reasoner") == before, "no replica was restarted"
    expected[7] = [ask(service.address(), *question) for question in questions]
    assert expected[7] != expected[0], "the newer weights answer otherwise"
    assert_right(traffic, expected)


def test_replicas_come_and_go_without_dropping_a_request(service, questions, expected, newer):
    """From one to two and back. The second replica starts with the newest weights."""
    args = {**ARGS, "model": str(newer)}
    with Traffic(service.address(), questions) as traffic:
        service.reload({**args, "rollout": {"num_cpus": 0.5, "actors": 2}})
        await_replicas("Reasoner", 2)
        traffic.await_answers(10, since=time.monotonic())
        service.reload(args)
        await_replicas("Reasoner", 1)
        traffic.await_answers(5, since=time.monotonic())
    assert [reply.status_code for _, _, reply in traffic.replies] == [200] * len(traffic.replies) and not traffic.broken
    assert {reply.json()["policy_version"] for _, _, reply in traffic.replies} == {7}
    assert_right(traffic, expected)


def test_what_exceeds_the_queues_is_told_to_try_again(service, questions, expected, newer):
    args = {**ARGS, "model": str(newer)}
    service.reload({**args, "reasoner_queue": {"ongoing": 1, "queued": 1}})

    async def all_at_once():
        async with httpx.AsyncClient(base_url=service.address(), timeout=150) as http:
            files, data = {"image": questions[0][0]}, {"query": questions[0][1]}
            return await asyncio.gather(*(http.post("/v1/ground", files=files, data=data) for _ in range(16)))

    replies = asyncio.run(all_at_once())
    service.reload(args)
    told = [reply for reply in replies if reply.status_code == 429]
    assert told and all(reply.json()["type"] == "overloaded" and reply.headers["retry-after"] for reply in told)
    answered = [reply for reply in replies if reply.status_code == 200]
    assert answered and len(answered) + len(told) == 16
    assert {said(reply) == expected[7][0] for reply in answered} == {True}
