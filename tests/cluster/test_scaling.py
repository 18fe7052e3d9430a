"""Wishes to scale a run, and what becomes of them."""

import json
import random
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.config import Autoscale
from cluster.scaling import Autoscaler, Scaling, Wishes, ask
from tests.cluster.test_advice import step


@pytest.fixture
def run(tmp_path):
    (tmp_path / "summary.json").write_text('{"status": "running"}')
    return tmp_path


def test_a_wish_reaches_the_run_within_a_second(run):
    seconds = [0.0]
    wishes = Wishes(run, lambda: seconds[0])
    assert wishes.heard() == {}
    ask(run, ["rollout=2"])
    ask(run, ["segmenter=3"])
    assert wishes.heard() == {}, "it was looked for just now"
    seconds[0] = 1.0
    assert wishes.heard() == {"rollout": 2, "segmenter": 3}


def test_what_an_earlier_driver_was_asked_for_is_forgotten(run):
    ask(run, ["rollout=2"])
    assert Wishes(run, lambda: 0.0).heard() == {}


@pytest.mark.parametrize("wish", ["learner=2", "rollout", "rollout=0", "rollout=-1", "rollout=two", "=3"])
def test_a_wish_that_is_none_is_refused(run, wish):
    with pytest.raises(ValueError, match=r"is not understood; give rollout=N or segmenter=N, N from 1 on"):
        ask(run, [wish])


def test_engines_that_share_gpus_with_ranks_stay_as_many(run):
    (run / "config.yaml").write_text("placement: colocated\n")
    with pytest.raises(ValueError, match="one engine beside each rank of its learner; only its segmenters are scaled"):
        ask(run, ["rollout=2", "segmenter=3"])
    assert ask(run, ["segmenter=3"]) == {"segmenter": 3}


def test_only_a_run_under_way_is_scaled(tmp_path):
    with pytest.raises(ValueError, match="is no run's folder"):
        ask(tmp_path, ["rollout=2"])
    (tmp_path / "summary.json").write_text(json.dumps({"status": "ended"}))
    with pytest.raises(ValueError, match="is ended; only one that is running can be scaled"):
        ask(tmp_path, ["rollout=2"])


class Silence(Wishes):
    """Nobody asks for anything."""

    def __init__(self):
        pass

    def heard(self):
        return {}


@dataclass
class Machine:
    """A model of a step: rollouts share what they sample, but the longest completion takes its time whoever samples it;
    segmenters score all of it, some while others are sampled and the rest at the end; the learner learns."""

    sampling: float
    longest: float
    scoring: float
    overlapped: float
    """Share of the scoring that can be done while others are sampled."""
    learning: float
    noise: float = 0.0

    def step(self, rollouts, segmenters, chance):
        """Its metrics."""
        first, second, third = (1 + self.noise * chance.uniform(-1, 1) for _ in range(3))
        rollout = (self.sampling / rollouts + self.longest) * first
        work = self.scoring / segmenters * second
        score = max(work * (1 - self.overlapped), work - rollout)
        learn = self.learning * third
        made = step(rollout, score, learn, rollouts=rollouts, segmenters=segmenters)
        return {**made, "busy/segmenter": work / (rollout + score + learn)}


def scaled(machine, steps, *, wanted=None, delay=0, said=None):
    """How many rollouts and segmenters there were in each step. delay: steps that a new one takes to start."""
    wanted = {"rollout": 1, "segmenter": 1} if wanted is None else wanted
    autoscalers = {role: Autoscaler(role, Autoscale(min=1, max=8)) for role in wanted}
    scaling = Scaling(Silence(), autoscalers, wanted, (said if said is not None else []).append)
    chance, members, history = random.Random(0), [dict(wanted)] * (delay + 1), []
    for _ in range(steps):
        there = members.pop(0)
        scaling.follow(machine.step(there["rollout"], there["segmenter"], chance))
        members.append(dict(wanted))
        history.append((there["rollout"], there["segmenter"]))
    return history


SECONDS = st.floats(0.01, 100)
MACHINES = dict.fromkeys(("sampling", "longest", "scoring", "learning"), SECONDS) | {"overlapped": st.floats(0, 1)}
BEGUN = st.fixed_dictionaries(dict.fromkeys(("rollout", "segmenter"), st.integers(1, 8)))


@given(machine=st.builds(Machine, **MACHINES), begun=BEGUN, delay=st.integers(0, 4))
@settings(max_examples=200)
def test_a_constant_load_comes_to_rest(machine, begun, delay):
    """Whatever it is, however many the run begins with, and however long a new actor takes to start."""
    assert len(set(scaled(machine, 200, wanted=dict(begun), delay=delay)[120:])) == 1


@given(machine=st.builds(Machine, **MACHINES, noise=st.just(0.05)), begun=BEGUN)
@settings(max_examples=200)
def test_chance_makes_no_pool_swing(machine, begun):
    """Near a threshold it may grow, or shrink, later than elsewhere, but does not take it back."""
    late = scaled(machine, 300, wanted=dict(begun))[120:]
    for counts in zip(*late, strict=True):
        assert list(counts) in (sorted(counts), sorted(counts, reverse=True))


def test_a_pool_that_everything_waits_for_grows_until_it_is_not():
    said: list[str] = []
    history = scaled(Machine(sampling=60, longest=2, scoring=1, overlapped=1, learning=20), 60, said=said)
    assert history[:4] == [(1, 1), (1, 1), (1, 1), (2, 1)], "three steps decide"
    assert history[-1] == (6, 1)
    assert said[0] == "rollouts: 1 -> 2, because everything else waited for them at least 76% of each step"


def test_segmenters_are_added_sooner():
    """A tenth of a step is much for what costs so little."""
    history = scaled(Machine(sampling=5, longest=5, scoring=8, overlapped=0, learning=10), 60)
    assert history[-1] == (2, 5), "of 19 s they take 1.6"


def test_a_load_that_changes_is_followed_up_and_down():
    wanted = {"rollout": 1, "segmenter": 1}
    heavy = Machine(sampling=60, longest=1, scoring=30, overlapped=0, learning=10)
    light = Machine(sampling=1, longest=0.1, scoring=0.2, overlapped=0, learning=10)
    assert scaled(heavy, 100, wanted=wanted)[-1] == (8, 8)
    assert scaled(light, 100, wanted=wanted)[-1] == (1, 1)
    assert scaled(heavy, 100, wanted=wanted)[-1] == (8, 8)


def test_idle_members_are_not_joined_by_others():
    """Two rollouts of which one has work: a third would have none."""
    machine = Machine(sampling=10, longest=0, scoring=0.1, overlapped=1, learning=1)
    scaling = Scaling(
        Silence(), {"rollout": Autoscaler("rollout", Autoscale(min=1, max=4))}, wanted := {"rollout": 2}, print
    )
    for _ in range(10):
        scaling.follow({**machine.step(2, 1, random.Random(0)), "busy/rollout_awaited": 0.5, "busy/rollout": 0.4})
    assert wanted == {"rollout": 2}


def test_what_is_asked_for_stands_above_what_is_measured(run):
    """For its role; the other one is autoscaled further."""
    seconds, wanted = [0.0], {"rollout": 1, "segmenter": 1}
    said: list[str] = []
    autoscalers = {role: Autoscaler(role, Autoscale(min=1, max=8)) for role in wanted}
    scaling = Scaling(Wishes(run, lambda: seconds[0]), autoscalers, wanted, said.append)
    ask(run, ["rollout=2"])
    scaling.heed()
    machine, chance = Machine(sampling=60, longest=2, scoring=30, overlapped=0, learning=1), random.Random(0)
    for _ in range(10):
        seconds[0] += 1.0
        scaling.follow(machine.step(wanted["rollout"], wanted["segmenter"], chance))
        scaling.heed()
    assert said[:2] == ["rollouts are not autoscaled any more: 2 were asked for", "rollouts: 1 -> 2, as asked for"]
    assert wanted["rollout"] == 2 and wanted["segmenter"] > 1
