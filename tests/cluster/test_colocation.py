"""Engines and ranks that share GPUs take turns: with hand-written pools, and in a run on the tiny models."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors.calls import Call, Ended
from actors.config import DeadlineConfig
from actors.failures import ActorFailed, DeadlinePassed
from actors.gpus import Place
from actors.pool import Member
from cluster.colocation import Colocation, refuse_apart
from cluster.memory import Idling, Tenant, overfull, parking, tenant
from cluster.records import read_records
from cluster.train import train
from tests.cluster.test_memory import need, place
from tests.cluster.test_train import SMALL
from tests.conftest import ROOT, TIMED


class Engine:
    """An actor of which every call is recorded by name."""

    def __init__(self, name: str, record: list[str]) -> None:
        self._name, self._record = name, record

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=partial(self._record.append, f"{self._name}: {method}"))


class Pool(list[Member]):
    def __init__(self, record: list[str], *states: str) -> None:
        super().__init__(
            Member(name=f"rollout {i}", handle=Engine(f"rollout {i}", record), state=state)  # type: ignore[arg-type]
            for i, state in enumerate(states)
        )
        self.lost: list[str] = []

    @property
    def loaded(self) -> list[Member]:
        return [member for member in self if member.state == "loaded"]

    def admit(self, name: str) -> None:
        for member in self:
            member.state = "ready" if member.name == name else member.state

    def died(self, name: str, cause: str) -> None:
        self.lost.append(cause)


class Calls:
    """Each call ends at once. faults: by the actor's name. turned: called when the driver waits."""

    def __init__(self, faults: dict[str, str], turned: Callable[[], None]) -> None:
        self._faults, self._turned = faults, turned

    def turn(self) -> None:
        self._turned()

    def settle(self, refs: dict[str, Any], *, seconds: float, doing: str) -> dict[str, Ended]:
        assert seconds == DeadlineConfig().step
        call = Call(actor="", doing=doing, seconds=seconds, then=lambda _: None)
        return {
            name: Ended(call=call, fault=self._faults.get(name), cause=f"{name} while {doing}")  # type: ignore[arg-type]
            for name in refs
        }


def colocation(
    *states: str, faults: dict[str, str] | None = None, turned: Any = lambda: None, now: Any = lambda: 0.0
) -> tuple[Colocation, list[str], Pool]:
    record: list[str] = []
    pool = Pool(record, *states)
    learner = SimpleNamespace(
        unpark=lambda: record.append("learner: unpark"),
        park=lambda state: record.append(f"learner: park, state {state}"),
    )
    workers: Any = SimpleNamespace(rollouts=pool, learner=learner, calls=Calls(faults or {}, turned), parks=True)
    return Colocation(workers, DeadlineConfig(), now), record, pool


def test_the_turns_of_a_step():
    turns, record, _ = colocation("ready", "ready")
    turns.before_learning()
    record.append("learner: update")
    turns.after_learning(lambda: record.append("weights"))
    assert record == [
        *("rollout 0: sleep", "rollout 1: sleep", "learner: unpark"),
        "learner: update",
        *("learner: park, state True", "rollout 0: wake_weights", "rollout 1: wake_weights"),
        "weights",
        "learner: park, state True",  # what the export took, before the KV cache needs it
        *("rollout 0: wake", "rollout 1: wake"),
    ]


def test_engines_sleep_whatever_has_become_of_the_learner():
    turns, record, pool = colocation("ready", "loaded", "draining")
    turns.before_restart()
    assert record == ["rollout 0: sleep", "rollout 1: sleep", "rollout 2: sleep"]
    assert [member.state for member in pool] == ["ready", "ready", "draining"], (
        "one that has loaded is sent weights too"
    )


def test_the_learner_waits_for_an_engine_that_is_starting():
    def turned():
        pool[1].state = "loaded"

    turns, record, pool = colocation("ready", "starting", turned=turned)
    turns.before_learning()
    assert record == ["rollout 0: sleep", "rollout 1: sleep", "learner: unpark"]


def test_an_engine_that_is_being_sent_weights_falls_asleep_when_it_has_them():
    def turned():
        pool[0].taking = None

    turns, record, pool = colocation("loaded", turned=turned)
    pool[0].taking = "weights"
    turns.before_learning()
    assert record == ["rollout 0: sleep", "learner: unpark"] and pool[0].taking is None


def test_one_that_comes_while_the_others_wake_is_not_woken():
    """It takes the place of one that died asleep."""
    turns, record, pool = colocation("ready", "ready")
    turns.before_learning()

    def send():
        pool[1] = Member(name="rollout 2", handle=Engine("rollout 2", record), state="starting")

    turns.after_learning(send)
    assert [each for each in record if each.startswith("rollout 2")] == [] and record[-1] == "rollout 0: wake"


def test_it_does_not_wait_for_ever():
    times = iter([0.0, *([DeadlineConfig().start + 1] * 5)])
    turns, record, _ = colocation("ready", "starting", now=lambda: next(times))
    with pytest.raises(DeadlinePassed, match="rollout 1 did not start within 900 s, for which the learner waits"):
        turns.before_learning()
    assert record == []


def test_an_engine_that_dies_asleep_is_replaced_and_an_error_ends_the_run():
    turns, _, pool = colocation("ready", "ready", faults={"rollout 1": "died"})
    turns.before_learning()
    assert pool.lost == ["rollout 1 while falling asleep"]
    turns, _, pool = colocation("ready", faults={"rollout 0": "error"})
    with pytest.raises(ActorFailed, match="rollout 0 while falling asleep"):
        turns.before_learning()


def at(gpu: str, node: str = "n") -> Place:
    return Place(node=node, memory=1, gpus=(), given=(gpu,), address=node)


def test_a_rank_with_another_gpu_than_its_engine_s_is_refused():
    refuse_apart({"learner 0": at("0"), "rollout 0": at("0"), "segmenter 0": at("1")})
    with pytest.raises(ValueError, match="learner 1 was given GPU 1 of n and rollout 1 GPU 2 of n, and placement=colo"):
        refuse_apart({"learner 1": at("1"), "rollout 1": at("2")})
    with pytest.raises(ValueError, match="set placement to disaggregated"):
        refuse_apart({"learner 0": at("0", "a"), "rollout 0": at("0", "b")})


def pair(*, parked: float, unparked: float, gib: float = 10.0, host: float = 0.0) -> list[Tenant]:
    """A rank that needs 7 GiB at work, an engine of 6, which sleeps on 1, and a segmenter of 1."""
    resting = Idling(least=need(parked, host=host), most=need(unparked))
    asleep = Idling(least=need(1), most=need(1))
    where = place(gib=gib)
    return [
        tenant("learner 0", lambda _: need(7), where, lambda: resting),
        tenant("rollout 0", lambda _: need(1, reserved=6), where, lambda: asleep),
        tenant("segmenter 0", lambda _: need(1), where),
    ]


def test_a_shared_gpu_must_hold_each_turn():
    """7 and 6 GiB do not lie on one GPU of 10 at the same time, and need not."""
    assert overfull(pair(parked=2, unparked=2)) is None
    assert "learner 0, idle, 4.0 GiB (weights 4.0); rollout 0 reserves 6.0 GiB; segmenter 0 1.0" in str(
        overfull(pair(parked=4, unparked=4))
    )
    assert "learner 0 7.0 GiB (weights 7.0); rollout 0, idle, 1.0 GiB" in str(
        overfull(pair(parked=1, unparked=1, gib=8.5))
    )


@pytest.mark.parametrize(
    ("parked", "unparked", "parks", "said"),
    [
        (2, 3, False, "optimizer state of 1.0 GiB stays on the GPU"),
        (2, 5, True, "optimizer state of 3.0 GiB waits in host memory"),
        (2, 2, False, "no optimizer state lies on the GPU"),
    ],
)
def test_the_learner_parks_where_memory_asks(parked, unparked, parks, said):
    found, why = parking(pair(parked=parked, unparked=unparked))
    assert found is parks and said in why


def test_a_rehearsal_parks():
    assert parking([]) == (
        True,
        "optimizer state waits in host memory while engines sample, as a rehearsal without GPUs",
    )


def test_what_is_parked_must_fit_into_the_node():
    fault = overfull(pair(parked=2, unparked=5, host=200))
    assert "cannot hold what is kept there (learner 0 200.0 GiB)" in str(fault)


@pytest.mark.slow
def test_a_colocated_run_learns_what_a_disaggregated_one_learns(ray_cluster, demo_config, tmp_path, capsys):
    """Two ranks and two engines on a CPU: the same metrics and answers, whoever had the GPU when."""
    actors = ("rollout.actors=2", "learner.ranks=2", "learner.num_cpus=0.25", "steps=2", "checkpoint_every=1")
    runs = {
        placement: train(
            demo_config(*SMALL, *actors, f"runs={tmp_path}", f"name={placement}", "seed=3", f"placement={placement}")
        )
        for placement in ("disaggregated", "colocated")
    }
    assert "learner: optimizer state waits in host memory while engines sample" in capsys.readouterr().out
    apart, shared = (steps(run.path) for run in runs.values())
    assert len(apart) == 2 and shared == apart
    for name in ("step-000002.parquet", "after-greedy.parquet"):
        first, second = (
            [(each["sample_id"], each["completion"], each["reward"]) for each in read_records(run.samples / name)]
            for run in runs.values()
        )
        assert sorted(first) == sorted(second)


def steps(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith(TIMED)} for line in lines]


GIVEN = """
import json, sys
import ray
from ray.util.placement_group import placement_group
from actors.pools import Placement
from cluster.placement import Bundle, core

ray.init(num_cpus=8, num_gpus=4, include_dashboard=False, logging_level="ERROR", log_to_driver=False)

class Where:
    def given(self):
        return ray.get_gpu_ids()

listed = [
    Bundle(role=role, index=i, cpus=0.1, gpus=share)
    for role, share in (("learner", 0.6), ("rollout", 0.3), ("segmenter", 0.1)) for i in range(4)
]
slots = core(listed, [], colocated=True)
group = placement_group([slot.resources for slot in slots], strategy="PACK")
ray.get(group.ready(), timeout=60)

def made(bundle, slot):
    place = Placement(
        group=group, bundle=slot, num_cpus=bundle.cpus, num_gpus=bundle.gpus, environment={}, labels={}
    )
    return ray.remote(Where).options(**place.options()).remote()

actors = {each.name: made(each, slot) for slot, shared in enumerate(slots) for each in shared.together}
found = {name: ray.get(actor.given.remote(), timeout=60) for name, actor in actors.items()}
for i in (1, 2):
    ray.kill(actors[f"rollout {i}"])
again = {i: made(listed[4 + i], i) for i in (2, 1)}
found |= {f"again {i}": ray.get(actor.given.remote(), timeout=60) for i, actor in again.items()}
ray.shutdown()
json.dump(found, sys.stdout)
"""


@pytest.mark.slow
@pytest.mark.cluster
def test_ray_gives_both_of_a_pair_one_gpu_and_a_replacement_too():
    """Of four GPUs that Ray counts and that are not there."""
    outside = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run([sys.executable, "-c", GIVEN], cwd=ROOT, env=outside, capture_output=True, timeout=180)
    assert done.returncode == 0, done.stderr.decode()
    found = json.loads(done.stdout)
    gpus = [found[f"learner {i}"] for i in range(4)]
    assert sorted(gpus) == [[0], [1], [2], [3]]
    assert [found[f"rollout {i}"] for i in range(4)] == gpus
    assert [found["again 1"], found["again 2"]] == gpus[1:3]
