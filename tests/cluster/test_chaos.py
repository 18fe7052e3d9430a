"""Runs whose actors are killed while they work: nothing is lost, nothing counts twice, and what is learnt is what the
undisturbed run learns."""

import json
import os
import random
import signal
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import ray
from ray.util.state import get_actor

import cluster.train
import cluster.workers
from actors.pools import LearnerPool, RolloutPool
from actors.segmenter import Segmenter
from cluster.evaluation import TooManyFailures
from cluster.records import read_records
from cluster.scaling import ask
from cluster.train import Training, train
from cluster.weight_sync import tend
from tests.conftest import TIMED

SMALL = (
    "data.train={phantoms: 64, seed: 1, modalities: [CT]}",
    "data.eval={phantoms: 4, seed: 2, modalities: [CT]}",
    "batch=6",
    "rollout.n=4",
    "rollout.actors=2",
    "rollout.num_cpus=0.3",
    "rollout.threads=1",
    "segmenter.threads=1",
    "segmenter.actors=3",
    "evaluation={before: false, limit: 4, n: 0}",
    "learner.warmup=0",
    "learner.num_cpus=0.3",
)
pytestmark = pytest.mark.slow
chaos = pytest.mark.chaos
"""Of what takes minutes: `make chaos`."""


def pid(handle):
    """Of an actor's process."""
    return get_actor(handle._actor_id.hex(), address=ray.get_runtime_context().gcs_address, timeout=30).pid


def process(member, kind):
    """The id of a member's own process, or of its engine's core or worker."""
    own = psutil.Process(pid(member.handle))
    if kind in ("segmenter", "rollout"):
        return own.pid
    (found,) = [
        each for each in own.children(recursive=True) if {"core": "Engine", "worker": "Worker"}[kind] in each.name()
    ]
    return found.pid


def whole(workers):
    pools = (workers.rollouts, workers.segmenters)
    return all(len(pool.ready) == len(pool.members) == workers.wanted[pool.role] for pool in pools)


class Disturbed(Training):
    """Before each step its pools are made whole; then, at a seeded moment of the step, something is killed."""

    kills: list[str]
    chance: random.Random
    killed: list[str]

    def take_step(self):
        while not whole(self.workers):
            tend(self.workers)
            self.workers.calls.turn()
        timer = None
        if self.kills:
            kind = self.kills.pop(0)
            pool = self.workers.segmenters if kind == "segmenter" else self.workers.rollouts
            target = process(self.chance.choice(pool.ready), kind)
            timer = threading.Timer(self.chance.uniform(0.0, 1.0), os.kill, (target, signal.SIGKILL))
            timer.start()
            self.killed.append(kind)
        super().take_step()
        if timer:
            timer.join()


def told(run):
    """Metrics of each step, timings left out."""
    lines = map(json.loads, (run.path / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if not name.startswith(TIMED)} for line in lines]


def answers(run):
    return [read_records(path) for path in sorted(run.samples.glob("step-*.parquet"))]


def undisturbed_run(demo_config, folder, steps):
    """With one actor of each role: whichever works changes nothing, and one starts in half the time."""
    alone = ("rollout.actors=1", "segmenter.actors=1")
    run = train(demo_config(*SMALL, *alone, f"steps={steps}", f"runs={folder}", "name=chaos"))
    return told(run), answers(run)


@pytest.fixture(scope="module")
def undisturbed(ray_cluster, demo_config, tmp_path_factory):
    """Metrics and answers of a run of twelve steps."""
    return undisturbed_run(demo_config, tmp_path_factory.mktemp("runs"), 12)


def disturb(monkeypatch, kills, chance):
    monkeypatch.setattr(Disturbed, "kills", list(kills), raising=False)
    monkeypatch.setattr(Disturbed, "killed", [], raising=False)
    monkeypatch.setattr(Disturbed, "chance", chance, raising=False)
    monkeypatch.setattr(cluster.train, "Training", Disturbed)


def kill_learner(monkeypatch, *, update):
    """Kill a rank when its pool is asked for so many-th an update. Returns a function that says how many were left when
    it was last asked; below 0 once another followed."""
    original, left = LearnerPool.update, [update]

    def dying_once(self, *work):
        left[0] -= 1
        if left[0] == 0:
            ray.kill(next(iter(self._actors.values())))
        return original(self, *work)

    monkeypatch.setattr(LearnerPool, "update", dying_once)
    return lambda: left[0]


def test_a_short_run_learns_the_same_whoever_dies(ray_cluster, demo_config, tmp_path, monkeypatch):
    """A segmenter, an engine's core, and the learner in the middle of an update."""
    metrics, expected = undisturbed_run(demo_config, tmp_path / "undisturbed", 3)
    disturb(monkeypatch, ["segmenter", "core"], random.Random(0))
    left = kill_learner(monkeypatch, update=2)
    run = train(demo_config(*SMALL, "steps=3", "checkpoint_every=1", f"runs={tmp_path}", "name=chaos"))
    assert Disturbed.killed == ["segmenter", "core"] and left() < 0
    assert answers(run) == expected and told(run) == metrics


@chaos
def test_every_group_is_learnt_from_once_whoever_dies(undisturbed, demo_config, tmp_path, monkeypatch):
    """Six segmenters are killed, and a rollout, an engine's core and its worker."""
    kills = ["segmenter"] * 6 + ["rollout", "core", "worker"]
    chance = random.Random(7)
    chance.shuffle(kills)
    disturb(monkeypatch, kills, chance)
    before = set(os.listdir("/dev/shm"))
    run = train(demo_config(*SMALL, "steps=12", f"runs={tmp_path}", "name=chaos"))
    assert Disturbed.killed == kills
    metrics, expected = undisturbed
    found = answers(run)
    for step in found:
        ids = Counter(record["answer_id"] for record in step)
        assert len(ids) == 6 * 4 and set(ids.values()) == {1}
    assert found == expected, "prompts, tokens, masks and rewards are the undisturbed run's"
    assert told(run) == metrics
    left = [each.name() for each in psutil.process_iter() if each.name().startswith("VLLM::") and each.ppid() == 1]
    assert left == [] and {name for name in set(os.listdir("/dev/shm")) - before if "medreasoner" in name} == set()


class Bereft(Training):
    """Kills a rank of the learner just before some of its calls."""

    before: list[str]

    def go(self, checkpoint):
        calls = [(self.workers.learner, name) for name in ("update", "weights", "logprobs", "save")]
        for pool, method in [*calls, (self.workers.rollouts, "_give")]:
            setattr(pool, method, self.guarded(method, getattr(pool, method)))
        super().go(checkpoint)

    def guarded(self, name, method):
        def call(*args, **kwargs):
            if self.before and self.before[0] == f"{name} {self.step}":
                self.before.pop(0)
                ray.kill(next(iter(self.workers.learner._actors.values())))
            return method(*args, **kwargs)

        return call


@chaos
def test_a_learner_that_dies_goes_on_from_its_newest_checkpoint(undisturbed, demo_config, tmp_path, monkeypatch):
    """Whatever it is asked for: an update before there is any checkpoint, weights, the canary, a checkpoint. With it go
    weights that were on their way to the rollouts."""
    deaths = ["update 1", "weights 3", "logprobs 4", "save 6", "_give 8"]
    monkeypatch.setattr(Bereft, "before", list(deaths), raising=False)
    monkeypatch.setattr(cluster.train, "Training", Bereft)
    settings = ("steps=12", "checkpoint_every=2", "restarts=5", f"runs={tmp_path}", "name=chaos")
    run = train(demo_config(*SMALL, *settings))
    assert Bereft.before == []
    metrics, expected = undisturbed
    assert answers(run) == expected and told(run) == metrics


@chaos
def test_a_segmenter_that_hangs_is_replaced(undisturbed, demo_config, tmp_path, monkeypatch):
    """At the deadline of its own call."""

    class Stopped(Training):
        def take_step(self):
            if self.step == 1:
                stopped.append(pid(self.workers.segmenters.ready[0].handle))
                os.kill(stopped[0], signal.SIGSTOP)
            super().take_step()

    stopped: list[int] = []
    monkeypatch.setattr(cluster.train, "Training", Stopped)
    began = time.monotonic()
    run = train(demo_config(*SMALL, "steps=3", "deadlines={step: 20}", f"runs={tmp_path}", "name=chaos"))
    assert answers(run) == undisturbed[1][:3] and time.monotonic() - began > 20
    assert not psutil.pid_exists(stopped[0])


@chaos
def test_a_rollout_that_dies_in_a_weight_update_is_replaced(undisturbed, demo_config, tmp_path, monkeypatch):
    """The others are updated; the one that joins gets the same weights."""
    give = RolloutPool._give
    killed: list[str] = []

    def interrupted(self, member, weights, buckets, received):
        if weights.version == 2 and not killed:
            killed.append(member.name)
            threading.Timer(0.02, os.kill, (pid(member.handle), signal.SIGKILL)).start()
        give(self, member, weights, buckets, received)

    monkeypatch.setattr(RolloutPool, "_give", interrupted)
    run = train(demo_config(*SMALL, "steps=4", f"runs={tmp_path}", "name=chaos"))
    assert killed and answers(run) == undisturbed[1][:4]


class Crooked(Segmenter):
    """The first of its kind leaves an answer out of each group."""

    def start(self, *args):
        flag = Path(os.environ["OF_CROOKED"])
        self.crooked = not flag.exists()
        flag.touch()
        return super().start(*args)

    def score(self, *args, **kwargs):
        scored = super().score(*args, **kwargs)
        return replace(scored, answers=scored.answers[1:]) if self.crooked else scored


@chaos
def test_a_segmenter_that_leaves_answers_out_is_replaced(undisturbed, demo_config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cluster.workers, "Segmenter", Crooked)
    settings = (f"segmenter.environment={{OF_CROOKED: {tmp_path / 'flag'}}}", f"runs={tmp_path}", "name=chaos")
    run = train(demo_config(*SMALL, "steps=3", *settings))
    assert "failed 2 times in turn" in capsys.readouterr().out
    assert answers(run) == undisturbed[1][:3]


@chaos
def test_scaling_in_mid_step_loses_and_doubles_nothing(undisturbed, demo_config, tmp_path, monkeypatch):
    """Rollouts from one to two and back, segmenters from one to four and back."""

    class Scaled(Training):
        def take_step(self):
            wanted = {1: ["rollout=2", "segmenter=4"], 5: ["rollout=1", "segmenter=1"]}.get(self.step)
            if wanted:
                threading.Timer(0.3, ask, (self.run.path, wanted)).start()
            if self.step == 4:
                while not whole(self.workers):
                    tend(self.workers)
                    self.workers.calls.turn()
            super().take_step()
            members.append([len(pool.ready) for pool in (self.workers.rollouts, self.workers.segmenters)])

    members: list[list[int]] = []
    monkeypatch.setattr(cluster.train, "Training", Scaled)
    settings = ("rollout.actors=1", "segmenter.actors=1", "steps=12", f"runs={tmp_path}", "name=chaos")
    run = train(demo_config(*SMALL, *settings))
    assert members[0] == [1, 1] and members[4] == [2, 4] and members[-1] == [1, 1]
    assert answers(run) == undisturbed[1] and told(run) == undisturbed[0]


@chaos
def test_groups_that_fail_everywhere_end_the_run_by_name(demo_config, ray_cluster, tmp_path, monkeypatch):
    reward = "reward={terms: [{name: tests.cluster.test_chaos:broken}]}"
    config = demo_config(*SMALL, "steps=1", f"runs={tmp_path}", reward, "segmenter.environment={OF_AN_ACTOR: 1}")
    with pytest.raises(TooManyFailures, match=r"groups could not be sampled or scored; .*ZeroDivisionError"):
        train(config)


def broken(case):
    """A reward term that fails in actors alone; one that fails in the driver's trial is refused at once."""
    return 1 / 0 if "OF_AN_ACTOR" in os.environ else 0.5
