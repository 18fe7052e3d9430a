"""Weights from the learner to rollouts that come, go and die, each way that they go: what the driver decides."""

from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest

from actors.calls import Ended
from actors.config import DeadlineConfig
from actors.engine_report import Sent, UpdateReceipt
from actors.failures import ActorFailed, TransferFailed
from actors.pool import APART_S, FAILED_STARTS
from actors.pools import LearnerDied, RolloutPool, SegmenterPool, Weights
from cluster.direct_transfer import DirectTransfer
from cluster.train import Training
from cluster.weight_sync import WeightsDiffer, publish, settle, sync_weights, tend
from cluster.workers import Workers


class Engines:
    """The actors and the driver's wait: a call ends at the next turn. fault: what all calls end in."""

    def __init__(self):
        self.held: dict[str, list[str]] = {}
        self.dead: set[str] = set()
        self.garbled: set[str] = set()
        self.flying: list[tuple[Any, Any]] = []
        self.fault: Any = None

    # As a `Starter`.
    def start(self, pool, name):
        self.held[name] = []
        take = SimpleNamespace(remote=lambda version, buckets: ("take", name, version, tuple(buckets)))
        return SimpleNamespace(update_weights=take)

    def end(self, name, handle, *, cause):
        self.dead.add(name)

    # As `Calls`.
    def add(self, ref, call):
        self.flying.append((ref, call))

    def gone(self, actor, cause):
        gone = [call for _, call in self.flying if call.actor == actor]
        self.flying = [(ref, call) for ref, call in self.flying if call.actor != actor]
        for call in gone:
            call.then(Ended(call=call, fault="died", cause=cause))

    def turn(self, seconds=1.0):
        flying, self.flying = self.flying, []
        for (_, name, version, buckets), call in flying:
            fault: Any = "died" if name in self.dead else self.fault
            if fault:
                call.then(Ended(call=call, fault=fault, cause=f"{name}: {fault}"))
                continue
            self.held[name].append(f"host {version} {' '.join(buckets)}")
            checksum = "garbled" if name in self.garbled else f"sum of {' '.join(buckets)}"
            call.then(Ended(call=call, result=UpdateReceipt(checksum=checksum, compared=1, unlike=())))


class Learner:
    """As `LearnerPool`."""

    busy, dead = False, False

    def __init__(self):
        self.exports: list[tuple[int, bool]] = []

    def weights(self, version, *, everything):
        if self.dead:
            raise LearnerDied("learner 0 died while exporting weights")
        self.exports.append((version, everything))
        buckets = (f"learning-{version}", *(["frozen"] if everything else []))
        return Weights(version=version, checksum=f"sum of {' '.join(buckets)}", buckets=buckets)


class Direct:
    """As `DirectTransfer`. fails: versions that do not arrive; kills: those that the learner dies of; meets: those
    while which another error ends the run; useless: engines that can then do nothing more."""

    given_up: str | None = None

    def __init__(self, engines, *, fails=(), kills=(), meets=(), useless=()):
        self.engines, self.fails, self.kills, self.meets, self.useless = engines, fails, kills, meets, useless
        self.sent: list[tuple[int, tuple[str, ...]]] = []

    def send(self, version, members, *, everything):
        if version in self.kills:
            raise LearnerDied(f"learner 0 did not finish sending weights to engines within {version} s")
        if version in self.meets:
            raise ActorFailed("3 segmenters in turn did not start: no such expert")
        if version in self.fails:
            raise TransferFailed(f"weights of version {version} did not arrive")
        names = tuple(member.name for member in members)
        self.sent.append((version, names))
        for name in names:
            self.engines.held[name].append(f"direct {version}")
        receipt = UpdateReceipt(checksum="sum", compared=1, unlike=())
        return Sent(checksum="sum", receipts=dict.fromkeys(names, receipt))

    def abandon(self, members):
        return {member.name: "it holds weights of two versions" for member in members if member.name in self.useless}


def driver(*, rollouts=2, **direct):
    engines = Engines()
    calls: Any = engines
    learner: Any = Learner()
    way: Any = Direct(engines, **direct) if direct else None
    pool = RolloutPool(engines, calls, DeadlineConfig(), sequences=8)
    workers = Workers(
        rollouts=pool,
        segmenters=SegmenterPool(engines, calls, DeadlineConfig()),
        learner=learner,
        calls=calls,
        wanted={"rollout": rollouts, "segmenter": 0},
        expert_digest="",
        direct=way,
    )
    tend(workers)
    come_up(workers)
    return workers, engines, learner, way


def come_up(workers):
    """All that start have loaded."""
    for member in workers.rollouts:
        workers.rollouts.has_loaded(member.name)
    tend(workers)


def test_a_rollout_that_is_at_work_takes_the_weights_once_it_has_ended_it():
    workers, engines, _, _ = driver()
    busy, idle = workers.rollouts.ready
    workers.rollouts.took(busy, "group", 1)
    publish(workers, version=1)
    tend(workers)
    workers.calls.turn()
    assert engines.held == {busy.name: [], idle.name: ["host 1 learning-1"]}
    assert workers.rollouts.pick(fit=workers.rollouts.renewed) is idle, "the other gets nothing more"
    workers.rollouts.gave(busy.name, "group", 1)
    settle(workers)
    assert engines.held[busy.name] == ["host 1 learning-1"]


def test_two_versions_in_a_row_are_taken_one_after_the_other():
    workers, engines, _, _ = driver(rollouts=1)
    publish(workers, version=1)
    tend(workers)
    publish(workers, version=2)
    settle(workers)
    assert engines.held["rollout 0"] == ["host 1 learning-1", "host 2 learning-2"]


def test_a_rollout_that_joins_between_two_updates_gets_everything():
    workers, engines, learner, _ = driver()
    sync_weights(workers, version=1)
    workers.wanted["rollout"] = 3
    tend(workers)
    come_up(workers)
    settle(workers)
    assert engines.held["rollout 2"] == ["host 1 learning-1 frozen"] and learner.exports == [(1, False), (1, True)]
    assert len(workers.rollouts.ready) == 3


def test_a_rollout_joins_without_weights_before_there_are_any():
    workers, engines, learner, _ = driver()
    assert len(workers.rollouts.ready) == 2 and learner.exports == [] and engines.held["rollout 0"] == []


def test_nothing_is_exported_for_one_that_joins_while_the_learner_is_waited_for():
    workers, engines, learner, _ = driver(rollouts=1)
    sync_weights(workers, version=1)
    workers.wanted["rollout"] = 2
    learner.busy = True
    tend(workers)
    come_up(workers)
    assert learner.exports == [(1, False)] and len(workers.rollouts.ready) == 1
    learner.busy = False
    settle(workers)
    assert engines.held["rollout 1"] == ["host 1 learning-1 frozen"]


def test_one_that_dies_meanwhile_is_replaced_and_the_others_go_on():
    workers, engines, _, _ = driver()
    engines.dead.add("rollout 1")
    sync_weights(workers, version=1)
    assert [member.name for member in workers.rollouts.ready] == ["rollout 0"]
    assert [member.state for member in workers.rollouts] == ["ready", "starting"]


def test_other_weights_than_were_sent_end_the_run():
    workers, engines, _, _ = driver()
    engines.garbled.add("rollout 1")
    with pytest.raises(WeightsDiffer, match="weights of version 1 arrived at rollout 1 with checksum garbled"):
        sync_weights(workers, version=1)


def test_direct_weights_reach_all_that_work_at_once_and_one_that_joins_through_host_memory():
    """Also those that are at work; and the next group has the one that joined."""
    workers, engines, learner, direct = driver(fails=())
    workers.rollouts.took(workers.rollouts.ready[0], "group", 1)
    publish(workers, version=1)
    assert direct.sent == [(1, ("rollout 0", "rollout 1"))] and learner.exports == []
    workers.wanted["rollout"] = 3
    tend(workers)
    come_up(workers)
    settle(workers)
    assert engines.held["rollout 2"] == ["host 1 learning-1 frozen"]
    assert engines.held["rollout 0"] == engines.held["rollout 1"] == ["direct 1"], "nobody is sent them twice"
    publish(workers, version=2)
    assert direct.sent[-1] == (2, ("rollout 0", "rollout 1", "rollout 2"))


def test_where_a_direct_transfer_fails_the_weights_go_through_host_memory(capsys):
    """What it left of no use is replaced, and the version after goes directly again."""
    workers, engines, _, direct = driver(fails=[1], useless=["rollout 1"])
    sync_weights(workers, version=1)
    assert engines.held["rollout 0"] == ["host 1 learning-1"] and "rollout 1" in engines.dead
    assert "weights of version 1 did not arrive; the weights go through host memory" in capsys.readouterr().out
    come_up(workers)
    settle(workers)
    assert engines.held["rollout 2"] == ["host 1 learning-1 frozen"]
    sync_weights(workers, version=2)
    assert direct.sent == [(2, ("rollout 0", "rollout 2"))]


def test_a_learner_that_dies_of_a_direct_transfer_is_not_asked_for_weights_again():
    workers, _, learner, _ = driver(kills=[1], useless=["rollout 0"])
    with pytest.raises(LearnerDied):
        publish(workers, version=1)
    assert learner.exports == [] and [member.name for member in workers.rollouts] == ["rollout 1"]


def test_what_has_nothing_to_do_with_a_direct_transfer_ends_the_run_during_one_too():
    workers, _, learner, _ = driver(meets=[1])
    with pytest.raises(ActorFailed, match="3 segmenters in turn did not start"):
        publish(workers, version=1)
    assert learner.exports == []


def test_a_direct_transfer_that_was_given_up_is_not_tried_again():
    workers, engines, _, direct = driver(fails=())
    direct.given_up = "it failed too often"
    sync_weights(workers, version=1)
    assert direct.sent == [] and engines.held["rollout 0"] == ["host 1 learning-1"]


def test_three_direct_transfers_in_turn_that_fail_are_the_last(demo_config):
    """One that arrives in between begins the count anew."""
    arrives = iter([False, False, True, False, False, False])

    def send(version, *, everything):
        if not next(arrives):
            raise TransferFailed(f"weights of version {version} did not arrive")

    learner: Any = SimpleNamespace(connect=lambda direct, receivers: None, send=send)
    transfer = DirectTransfer(learner, demo_config().model_copy(update={"transfer": "nccl"}))
    for version in range(1, 7):
        assert transfer.given_up is None
        with suppress(TransferFailed):
            transfer.send(version, [], everything=True)
    assert transfer.given_up == (
        "transfer=nccl failed 3 times in turn, and the weights go through host memory from now on; mend it, or set "
        "transfer to host: weights of version 6 did not arrive"
    )


def test_that_a_direct_transfer_was_given_up_is_an_alarm_of_the_run():
    workers, _, _, direct = driver(fails=())
    shown: list[str] = []
    journal, display = SimpleNamespace(alarms={"drift": "apart"}), SimpleNamespace(warning=shown.append)
    training: Any = SimpleNamespace(workers=workers, journal=journal, display=display)
    Training.warn(training)
    assert shown == ["apart"]
    direct.given_up = "it failed too often"
    Training.warn(training)
    assert (
        journal.alarms == {"drift": "apart", "transfer": "it failed too often"}
        and shown[-1] == journal.alarms["transfer"]
    )


def test_where_the_learner_died_after_its_export_its_death_is_met_and_the_engines_stay():
    """The references of its buckets are dead with it."""
    workers, engines, learner, _ = driver()
    publish(workers, version=1)
    learner.dead, engines.fault = True, "lost"
    with pytest.raises(LearnerDied):
        settle(workers)
    assert len(workers.rollouts.ready) == 2 and not engines.dead
    learner.dead, engines.fault = False, None
    sync_weights(workers, version=0, everything=True)
    assert engines.held["rollout 0"] == engines.held["rollout 1"] == ["host 0 learning-0 frozen"]


def test_buckets_that_were_lost_are_exported_anew_while_others_take_the_old_ones():
    """Whose checksum is another, as everything is exported then."""
    workers, engines, learner, _ = driver()
    publish(workers, version=1)
    tend(workers)
    (_, first), other = engines.flying
    engines.flying = [other]
    first.then(Ended(call=first, fault="lost", cause="a node went"))
    tend(workers)
    settle(workers)
    assert learner.exports == [(1, False), (1, True)]
    assert engines.held == {"rollout 0": ["host 1 learning-1 frozen"], "rollout 1": ["host 1 learning-1"]}


@pytest.mark.parametrize("fault", ["lost", "died"])
def test_engines_that_never_take_their_first_weights_end_the_run(fault):
    """Whatever starts in their place fails too."""
    workers, engines, _, _ = driver()
    clock = apart(workers)
    engines.fault = fault
    publish(workers, version=1)
    with pytest.raises(ActorFailed, match=f"3 rollouts in turn did not start: rollout .: {fault}"):
        for _ in range(10 * FAILED_STARTS):
            clock.append(clock[-1] + APART_S)
            tend(workers)
            workers.calls.turn()
            come_up(workers)
    assert len(engines.dead) <= 2 + 2 * FAILED_STARTS


def test_an_engine_that_works_ends_the_count_of_those_that_did_not_come_to_it():
    workers, _, _, _ = driver(rollouts=1)
    clock = apart(workers)
    sync_weights(workers, version=1)
    for _ in range(2 * FAILED_STARTS):
        for _ in range(FAILED_STARTS - 1):
            workers.wanted["rollout"] += 1
            tend(workers)
            come_up(workers)
            for member in workers.rollouts.loaded:
                clock.append(clock[-1] + APART_S)
                workers.rollouts.died(member.name, "killed")
            workers.wanted["rollout"] -= 1
        workers.wanted["rollout"] += 1
        tend(workers)
        come_up(workers)
        settle(workers)
    assert len(workers.rollouts.ready) == 1 + 2 * FAILED_STARTS


def apart(workers):
    """Sets a clock of the test's own: the times so far, of which the last is now."""
    clock = [0.0]
    workers.rollouts._now = lambda: clock[-1]
    return clock


def test_one_that_is_too_many_ends_the_update_that_it_is_at_first():
    workers, engines, _, _ = driver()
    publish(workers, version=1)
    tend(workers)
    workers.wanted["rollout"] = 1
    tend(workers)
    assert len(workers.rollouts.members) == 2 and not engines.dead
    workers.calls.turn()
    tend(workers)
    assert len(workers.rollouts.ready) == len(workers.rollouts.members) == 1
