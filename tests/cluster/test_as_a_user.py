"""A cluster as its users work with it, from outside and by the commands alone: a run is submitted, watched, scaled and
ended, loses a node and gets another; a model is trained further, evaluated and served."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster.test_nodes import assert_nothing_left, living
from tests.conftest import ROOT
from tests.nodes import Nodes, free_port, started_cluster
from tests.runs import MARK

pytestmark = [pytest.mark.slow, pytest.mark.cluster]

PLACES = (
    *("rollout.actors=2", "rollout.num_cpus=1.5", "rollout.threads=1", "rollout.node_labels={kind: engines}"),
    # Their shares are of logical GPUs, of which only these nodes have any.
    *("segmenter={actors: 2, num_cpus: 0.2, num_gpus: 0.25, threads: 1, device: cpu}",),
    *("learner.num_cpus=1", "learner.threads=1", "learner.node_labels={kind: learner}"),
)
ROWS = ("data.train={phantoms: 16, seed: 1, modalities: [CT]}", "data.eval={phantoms: 4, seed: 2, modalities: [CT]}")
SMALL = (*PLACES, *ROWS, "batch=4", "rollout.n=2", "evaluation={before: false, limit: 4, n: 0}", "checkpoint_every=1")


class Command:
    """`medreasoner …` in a process of its own."""

    def __init__(self, log, *words, environment=None):
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cluster.cli", *map(str, words)],
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
        )

    def said(self):
        return self.log.read_text()

    def await_line(self, pattern, seconds=300):
        deadline = time.monotonic() + seconds
        while not re.search(pattern, self.said()):
            assert self.process.poll() is None and time.monotonic() < deadline, f"no {pattern!r} in: {self.said()}"
            time.sleep(0.2)

    def end(self, code=0, seconds=300):
        assert self.process.wait(timeout=seconds) == code, self.said()
        return self.said()


@dataclass(frozen=True, kw_only=True)
class Outside:
    """A user who has the cluster's address and a folder that all nodes see."""

    cluster: Nodes
    folder: Path

    @property
    def runs(self):
        return self.folder / "runs"

    @property
    def where(self):
        """Arguments that name the cluster."""
        return "--address", self.cluster.dashboard

    def command(self, name, *words, **options):
        """name: of its output's file."""
        return Command(self.folder / f"{name}.log", *words, **options)

    def submitted(self, name, config, *overrides):
        given = (f"name={name}", f"runs={self.runs}", "--python", sys.executable)
        return self.command(name, "submit", f"configs/{config}.yaml", *overrides, *given, *self.where)

    def summary(self, name):
        return json.loads((self.runs / name / "summary.json").read_text())


@pytest.fixture
def outside(monkeypatch, tmp_path):
    """A cluster with a node for the learner and two for engines and experts, and its user."""
    monkeypatch.setenv(MARK, uuid.uuid4().hex)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with started_cluster() as cluster:
        for cpus, gpus, kind in ((1, 0, "learner"), (2, 1, "engines"), (2, 1, "engines")):
            cluster.add(cpus, gpus, {"kind": kind})
        yield Outside(cluster=cluster, folder=tmp_path)


def await_living(cluster, role, count, seconds=120):
    deadline = time.monotonic() + seconds
    while sum(each == role for each, _ in living(cluster)) < count:
        assert time.monotonic() < deadline, living(cluster)
        time.sleep(0.5)


def test_a_run_from_outside(outside):
    cluster, runs = outside.cluster, outside.runs
    (learner,), (first, second) = cluster.of_kind("learner"), cluster.of_kind("engines")
    train = outside.submitted("trial", "demo", *SMALL, "steps=500")  # the small model is sent with it
    train.await_line("step 1/")
    assert [node for role, node in living(cluster) if role == "learner"] == [learner.id]
    await_living(cluster, "rollout", 2)  # on a busy machine the second comes later
    assert {node for role, node in living(cluster) if role == "rollout"} == {first.id, second.id}
    assert {node for role, node in living(cluster) if role == "segmenter"} <= {first.id, second.id}
    assert "RUNNING" in outside.command("list", "runs", "list", *outside.where).end()

    cluster.remove(second)
    train.await_line("died")
    third = cluster.add(2, 1, {"kind": "engines"})
    # Ray may place the first on the node that it does not know to be gone.
    train.await_line(r"rollout \d+ is there")
    assert ("rollout", third.id) in living(cluster)
    assert "asked for 4 segmenters" in outside.command("scale", "scale", runs / "trial", "segmenter=4").end()
    train.await_line("segmenters: 2 -> 4, as asked for")
    await_living(cluster, "segmenter", 4)
    assert "nothing is left behind" in outside.command("stop", "runs", "stop", "trial", *outside.where).end()
    assert_nothing_left(cluster)
    train.end(code=1)
    assert outside.summary("trial")["status"] == "interrupted"


@pytest.mark.chaos
def test_a_model_from_outside(outside):
    """Trained, trained on, evaluated and served on the same cluster."""
    trial = outside.runs / "trial"
    for steps in (1, 2):
        outside.submitted("trial", "demo", *SMALL, f"steps={steps}").end()
    assert [json.loads(line)["step"] for line in (trial / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    assert outside.summary("trial")["status"] == "ended" and "put_aside" not in outside.summary("trial")
    outside.submitted("after", "evaluate_demo", f"model={trial}", ROWS[1], "n=0", "limit=4").end()
    assert json.loads((outside.runs / "after" / "metrics.json").read_text())["overall"]

    port = free_port()
    there = {"RAY_ADDRESS": outside.cluster.address}
    serve = outside.command("serve", "serve", trial, "--port", port, environment=there)
    serve.await_line("serving")
    query = ("-F", "image=@docs/pictures/example.png", "-F", "query=Which organ?")
    address = f"http://127.0.0.1:{port}/v1/ground"
    reply = subprocess.run(["curl", "-sS", *query, address], cwd=ROOT, capture_output=True, check=True, timeout=120)
    assert "completion" in json.loads(reply.stdout)
    serve.process.send_signal(signal.SIGINT)
    serve.end()
