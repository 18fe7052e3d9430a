"""Runs on clusters of several nodes, which come and go: nothing is lost, nothing is left, and what happens is said."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from ray.job_submission import JobStatus, JobSubmissionClient
from ray.util.state import list_actors, list_placement_groups

from cluster.records import read_records
from tests.conftest import ROOT
from tests.nodes import free_port, started_cluster
from tests.runs import MARK, Run, marked, told

SMALL = (
    *("batch=4", "evaluation={before: false, limit: 4, n: 0}", "learner.warmup=0"),
    *("rollout.actors=2", "rollout.num_cpus=1", "rollout.threads=1", "rollout.node_labels={kind: engines}"),
    *("segmenter.actors=2", "segmenter.num_cpus=0.5", "segmenter.threads=1", "segmenter.node_labels={kind: engines}"),
    *("learner.num_cpus=1", "learner.threads=1", "learner.node_labels={kind: learner}"),
)
ROLES = {"Rollout": "rollout", "LightRollout": "rollout", "Segmenter": "segmenter", "LearnerRank": "learner"}
pytestmark = [pytest.mark.slow, pytest.mark.cluster]
chaos = pytest.mark.chaos


@pytest.fixture
def environment(monkeypatch):
    """Whatever is started carries a mark, by which it is found and ended. Others' clusters may run beside."""
    mark = uuid.uuid4().hex
    monkeypatch.setenv(MARK, mark)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    yield mark
    for process in marked(mark):
        with suppress(psutil.Error):
            process.kill()


@pytest.fixture
def nodes(environment):
    """A cluster of which the head computes nothing, with a node for the learner and two for engines and experts."""
    with started_cluster() as cluster:
        for kind, cpus in (("learner", 1), ("engines", 2), ("engines", 2)):
            cluster.add(cpus, labels={"kind": kind})
        yield cluster


def living(cluster):
    """The living actors of runs: role and node of each."""
    found = list_actors(address=cluster.dashboard, filters=[("state", "=", "ALIVE")], limit=1000)
    return [(ROLES[actor.class_name], actor.node_id) for actor in found if actor.class_name in ROLES]


def assert_nothing_left(cluster):
    """Of actors, their engines' processes and placement groups; the cluster stays."""
    deadline = time.monotonic() + 60
    while True:
        groups = [each for each in list_placement_groups(address=cluster.dashboard) if each.state != "REMOVED"]
        engines = [each for each in marked(os.environ[MARK]) if "VLLM::" in each.name()]
        if not (left := [*living(cluster), *groups, *engines]):
            return
        assert time.monotonic() < deadline, left
        time.sleep(0.5)


def answers(folder: Path):
    return [read_records(path) for path in sorted((folder / "samples").glob("step-*.parquet"))]


PLACES = """
import json, sys
from pathlib import Path
from actors.gpus import this_place
from cluster.config import TrainConfig, load_config
from cluster.hiring import ActorSpec
from cluster.placement import Bundle
from cluster.workers import ray_connection, started

class Fake:
    def place(self):
        return this_place()
    def address(self):
        return "127.0.0.1", 1
    def start(self, *_):
        return "digest"
    def stop(self):
        pass

config = load_config(TrainConfig, Path("configs/demo.yaml"))
with ray_connection():
    for shares in json.loads(sys.argv[1]):
        listed = [
            ActorSpec(
                bundle=Bundle(role=role, index=i, cpus=0, gpus=gpus, labels=labels), actor_class=Fake, arguments={}
            )
            for role, gpus, count, labels in shares
            for i in range(count)
        ]
        with started(listed, config) as workers:
            places = workers.hiring.places
            found = {name: [place.node, *map(int, place.given)] for name, place in places.items()}
        print("places", json.dumps(found))
"""
"""Starts actors that load nothing, once for each list of shares, and prints each one's node and the ids of its GPUs,
which are logical."""


def placed(address, *runs):
    """Places of each run's actors, by name. runs: of each the shares of GPUs; role, share, count and labels."""
    done = subprocess.run(
        [sys.executable, "-c", PLACES, json.dumps(runs)],
        cwd=ROOT,
        env={**os.environ, "RAY_ADDRESS": address},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.removeprefix("places ") for line in done.stdout.splitlines() if line.startswith("places ")]
    return [{name: tuple(place) for name, place in json.loads(line).items()} for line in lines]


def test_roles_land_as_they_are_placed(environment):
    """On two nodes of three GPUs each, of different kinds."""
    with started_cluster() as cluster:
        new, old = (cluster.add(4, gpus=3, labels={"kind": kind}) for kind in ("new", "old"))
        by_label, mixed, shared_out = placed(
            cluster.address,
            [("segmenter", 0.25, 4, {}), ("rollout", 1, 3, {"kind": "old"}), ("learner", 1, 2, {"kind": "new"})],
            [("segmenter", 0.1, 4, {}), ("rollout", 0.9, 4, {}), ("learner", 1, 2, {})],
            [("rollout", 1, 1, {}), ("learner", 1, 1, {}), ("segmenter", 0.5, 8, {})],
        )
    assert {by_label[f"learner {i}"][0] for i in range(2)} == {new.id}, "the ranks share a bundle"
    assert {by_label[f"rollout {i}"] for i in range(3)} == {(old.id, i) for i in range(3)}
    (shared,) = {by_label[f"segmenter {i}"] for i in range(4)}
    assert shared[0] == new.id, "all four share the one GPU that nobody needs whole"

    engines = {mixed[f"rollout {i}"] for i in range(4)}
    assert len(engines) == 4 and {mixed[f"segmenter {i}"] for i in range(4)} <= engines
    assert len({mixed[f"learner {i}"] for i in range(2)} - engines) == 2

    assert len({shared_out[f"segmenter {i}"] for i in range(8)}) == 4, "those that find a node full lie on the other"


WHOLE_BEFORE = """
import sys
from cluster import train
from cluster.cli import run_command
from cluster.weight_sync import tend

take_step = train.Training.take_step

def take_step_by_all(self):
    pools = (self.workers.rollouts, self.workers.segmenters)
    while self.step == {step} and any(len(pool.ready) < self.workers.wanted[pool.role] for pool in pools):
        tend(self.workers)
        self.workers.calls.turn()
    take_step(self)

train.Training.take_step = take_step_by_all
run_command(lambda: train.main(sys.argv[1:]))
"""
"""A run that waits before a step until all its actors are there."""


@chaos
def test_nodes_that_are_lost_and_added_change_nothing(nodes, environment, tmp_path):
    """One with a rollout and a segmenter, and then the learner's own. Roles lie where they were placed."""
    settings = (*SMALL, "steps=6", "checkpoint_every=1")
    calm = Run(tmp_path / "calm", *settings, address=nodes.address)
    calm.await_line("step 1/")
    (learner,), (first, second) = nodes.of_kind("learner"), nodes.of_kind("engines")
    elsewhere = [(role, node.id) for role in ("rollout", "segmenter") for node in (first, second)]
    assert sorted(living(nodes)) == sorted([("learner", learner.id), *elsewhere])
    assert calm.process.wait(timeout=300) == 0, calm.output.read_text()

    run = Run(tmp_path / "lossy", *settings, program=("-c", WHOLE_BEFORE.format(step=3)), address=nodes.address)
    run.await_line("step 1/")
    nodes.remove(second)
    run.await_line("died while")
    third = nodes.add(2, labels={"kind": "engines"})
    run.await_line("step 4/")
    assert ("rollout", third.id) in living(nodes) and ("segmenter", third.id) in living(nodes)
    nodes.remove(learner)
    run.await_line("the learner starts again")
    nodes.add(1, labels={"kind": "learner"})
    assert run.process.wait(timeout=600) == 0, run.output.read_text()
    assert run.output.read_text().count("the learner starts again") == 1
    assert answers(run.folder) == answers(calm.folder) and len(answers(run.folder)) == 6
    assert told(run.folder) == told(calm.folder)
    assert_nothing_left(nodes)


LIGHT = """
import sys
from dataclasses import replace
from cluster import train
from cluster.cli import run_command
from tests.light_rollout import LightRollout

listed = train.actors

def light(*args):
    return [
        replace(actor, actor_class=LightRollout) if actor.bundle.role == "rollout" else actor for actor in listed(*args)
    ]

train.actors = light
"""


@chaos
def test_many_actors_work_as_one_run(environment, tmp_path):
    """Eight rollouts, sixteen segmenters on shares of logical GPUs, and the learner's two ranks, of which no node holds
    both. Engines of vLLM would take three times this machine's memory."""
    settings = (
        *("rollout.actors=8", "rollout.num_cpus=0.5", "rollout.node_labels={kind: engines}"),
        *("segmenter={actors: 16, num_cpus: 0.1, num_gpus: 0.25, threads: 1, device: cpu}", "batch=16", "rollout.n=4"),
        *("learner.ranks=2", "learner.nodes=2", "learner.num_cpus=2.5", "learner.threads=1", "steps=3"),
        "evaluation={before: false, limit: 4, n: 0}",
    )
    program = LIGHT + WHOLE_BEFORE.format(step=0)
    with started_cluster() as cluster:
        for labels in ({"kind": "engines"}, {"kind": "engines"}, {}):
            cluster.add(4, gpus=2, labels=labels)
        run = Run(tmp_path, *settings, program=("-c", program), address=cluster.address)
        run.await_line("step 1/", seconds=900)
        there = living(cluster)
        assert Counter(role for role, _ in there) == {"rollout": 8, "segmenter": 16, "learner": 2}
        engines = {node.id for node in cluster.of_kind("engines")}
        assert {node for role, node in there if role == "rollout"} == engines
        assert len({node for role, node in there if role == "learner"}) == 2
        assert run.process.wait(timeout=300) == 0, run.output.read_text()
        assert [len(each) for each in answers(run.folder)] == [64] * 3
        assert_nothing_left(cluster)


FILL = """
import time, numpy, ray
ray.init(log_to_driver=False)
held = [ray.put(numpy.full(10 << 20, i, dtype=numpy.uint8)) for i in range(30)]
print("full", flush=True)
time.sleep(3600)
"""


@chaos
def test_a_full_object_store_changes_nothing(environment, tmp_path):
    """Others hold four times as much as it can: what a run puts there is spilled to disk, and read from there."""
    small = ("--num-cpus=4", f"--object-store-memory={80 << 20}")
    settings = (*SMALL, *(f"{role}.node_labels={{}}" for role in ROLES.values()), "steps=3", "checkpoint_every=1")
    with started_cluster(*small) as cluster:
        calm = Run(tmp_path / "calm", *settings, address=cluster.address)
        assert calm.process.wait(timeout=300) == 0, calm.output.read_text()
        filler = subprocess.Popen(
            [sys.executable, "-c", FILL],
            env={**os.environ, "RAY_ADDRESS": cluster.address},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert filler.stdout and filler.stdout.readline() == "full\n"
        run = Run(tmp_path / "full", *settings, address=cluster.address)
        assert run.process.wait(timeout=400) == 0, run.output.read_text()
        assert filler.poll() is None
        assert answers(run.folder) == answers(calm.folder) and told(run.folder) == told(calm.folder)


@chaos
def test_two_runs_share_a_cluster(nodes, tmp_path):
    """The second waits until the first leaves it room, and says what it waits for."""
    first = Run(tmp_path / "first", *SMALL, "steps=500", address=nodes.address)
    first.await_line("step 1/")
    one_each = ("rollout.actors=1", "segmenter.actors=1")
    second = Run(tmp_path / "second", *SMALL, *one_each, "steps=2", address=nodes.address)
    second.await_line("waiting for 2.5 CPUs and 0 GPUs; ")
    first.process.send_signal(signal.SIGTERM)
    assert first.process.wait(timeout=120) == 130, first.output.read_text()
    assert second.process.wait(timeout=600) == 0, second.output.read_text()
    assert len(answers(second.folder)) == 2
    assert_nothing_left(nodes)


@chaos
@pytest.mark.parametrize("moment", ["starting actors", "step 1/", "evaluating after"])
def test_a_job_that_is_stopped_leaves_nothing(nodes, tmp_path, moment):
    client = JobSubmissionClient(nodes.dashboard)
    words = " ".join(f"'{each}'" for each in (*SMALL, "name=job", "steps=3", f"runs={tmp_path}"))
    deadline = time.monotonic() + 300
    job = client.submit_job(entrypoint=f"cd {ROOT} && exec {sys.executable} -m cluster.train configs/demo.yaml {words}")
    while moment not in client.get_job_logs(job):
        assert time.monotonic() < deadline and not client.get_job_status(job).is_terminal(), client.get_job_logs(job)
        time.sleep(0.2)
    time.sleep(1.0)
    client.stop_job(job)
    while not client.get_job_status(job).is_terminal():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert client.get_job_status(job) == JobStatus.STOPPED
    assert_nothing_left(nodes)
    assert json.loads((tmp_path / "job" / "summary.json").read_text())["status"] == "interrupted"


@pytest.fixture
def growing(environment, tmp_path):
    """A cluster that starts nodes of two cores when they are asked for, two at most; its head has one core. Ray's own
    class for this ends all clusters of the machine when it starts."""
    port = free_port()
    lists = ("setup_commands", "head_setup_commands", "worker_setup_commands", "initialization_commands")
    config = {
        "cluster_name": "growing",
        "max_workers": 2,
        "idle_timeout_minutes": 5,
        "upscaling_speed": 1.0,
        "provider": {
            "type": "fake_multinode",  # Ray's own, for tests: its nodes are processes of this machine
            "gcs_address": f"127.0.0.1:{port}",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
            "worker": {"resources": {"CPU": 2}, "node_config": {}, "min_workers": 0, "max_workers": 2},
        },
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        **{name: [] for name in (*lists, "cluster_synced_files", "rsync_exclude", "rsync_filter")},
        **{name: [] for name in ("head_start_ray_commands", "worker_start_ray_commands")},
        "file_mounts_sync_continuously": False,
    }
    (tmp_path / "cluster.json").write_text(json.dumps(config))
    with started_cluster(
        *("--num-cpus=1", f"--autoscaling-config={tmp_path / 'cluster.json'}"),
        port=port,
        environment={"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"},
    ) as cluster:
        yield cluster


def test_a_cluster_grows_by_what_a_run_asks_for(growing, tmp_path):
    """The learner has no room before there is a node for it."""
    settings = ("learner.num_cpus=2", "segmenter.actors=2", "segmenter.num_cpus=1", "rollout.num_cpus=0.5", "steps=3")
    run = Run(tmp_path, *SMALL[:2], *settings, address=growing.address)
    assert run.process.wait(timeout=500) == 0, run.output.read_text()
    said = run.output.read_text()
    assert "waiting for 3.5 CPUs and 0 GPUs; " in said and "there is no room for " in said
    assert len(answers(run.folder)) == 3
    assert_nothing_left(growing)
