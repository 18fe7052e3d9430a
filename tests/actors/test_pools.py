"""Waiting for actors: what failed is named, and nothing waits for ever."""

import errno
import time
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group

from actors.calls import Call, Calls, Ended
from actors.config import DeadlineConfig
from actors.experts.desk import CacheUse
from actors.failures import ActorDied, ActorFailed, Broken, DeadlinePassed
from actors.ledger import Entry
from actors.pools import GroupRefs, LearnerPool, Placement, RolloutPool, SegmenterPool
from umrg.group import SamplingParams
from umrg.mistake import Mistake


class _Worker:
    def quick(self, value):
        return value

    def slow(self):
        time.sleep(60)

    def mistake(self):
        raise Mistake("the image of row 3 cannot be decoded")

    def library(self):
        return int("many")

    def full(self):
        raise OSError(errno.ENOSPC, "No space left on device", "/data/step-000002/model.safetensors")

    def fault(self):
        raise RuntimeError("out of memory")

    def broken(self):
        raise Broken("its engine has died")

    def die(self):
        import os

        os._exit(1)

    def environment(self):
        import os

        return os.environ.get("CUDA_VISIBLE_DEVICES"), ray.get_gpu_ids(), os.environ.get("OMP_NUM_THREADS")


Worker: Any = ray.remote(num_cpus=0)(_Worker)


@pytest.fixture
def worker(ray_cluster):
    actor = Worker.remote()
    yield actor
    ray.kill(actor)


def gather(calls, *, seconds, doing):
    return Calls().gather(calls, seconds=seconds, doing=doing)


def test_results_come_in_the_order_of_the_calls(worker):
    calls = {f"worker {i}": worker.quick.remote(i) for i in range(3)}
    assert gather(calls, seconds=30, doing="counting") == [0, 1, 2]


def test_a_slow_actor_is_named_at_the_deadline(worker):
    with pytest.raises(DeadlinePassed, match="rollout 1 did not finish sampling within 1 s"):
        gather({"rollout 1": worker.slow.remote()}, seconds=1, doing="sampling")


def test_a_full_disk_is_named_with_the_file(worker):
    said = "learner 0 failed while writing a checkpoint: OSError: .*No space left on device: '/data/step-000002/model"
    with pytest.raises(ActorFailed, match=said):
        gather({"learner 0": worker.full.remote()}, seconds=30, doing="writing a checkpoint")


def test_other_calls_go_on_while_some_are_waited_for(worker):
    clock = [0.0]  # of the test's own: a new actor's process may take longer to start than any deadline here
    calls = Calls(lambda: clock[0])
    ended: list[Ended] = []
    other = Worker.remote()
    calls.add(worker.quick.remote(1), Call(actor="rollout 0", doing="sampling", seconds=30, then=ended.append))
    calls.add(other.slow.remote(), Call(actor="rollout 1", doing="sampling", seconds=2, then=ended.append))
    assert calls.gather({"learner 0": worker.quick.remote(2)}, seconds=30, doing="updating") == [2]
    clock[0] = 2.0
    while len(calls):
        calls.turn()
    assert [(each.call.actor, each.result, each.fault) for each in ended] == [
        ("rollout 0", 1, None),
        ("rollout 1", None, "late"),
    ]
    ray.kill(other)


def test_how_calls_end(worker):
    """Each in its own way; none of them ends the others."""
    methods = {"quick": None, "fault": "error", "broken": "died"}
    calls = {name: getattr(worker, name).remote(*([3] if name == "quick" else [])) for name in methods}
    found = Calls().settle(calls, seconds=30, doing="working")
    assert {name: each.fault for name, each in found.items()} == methods
    assert found["fault"].cause == "fault failed while working: RuntimeError: out of memory"
    assert 'raise RuntimeError("out of memory")' in str(found["fault"].error), "with the actor's traceback"


def test_the_calls_of_an_actor_that_is_given_up_end_with_it(worker):
    calls = Calls()
    ended: list[Ended] = []
    for _ in range(2):
        calls.add(worker.slow.remote(), Call(actor="rollout 0", doing="sampling", seconds=60, then=ended.append))
    calls.gone("rollout 0", "it was given up")
    assert len(calls) == 0 and [(each.fault, each.cause) for each in ended] == [("died", "it was given up")] * 2


def test_a_mistake_in_the_data_stays_a_mistake(worker):
    with pytest.raises(ValueError, match="segmenter 0, scoring: the image of row 3 cannot be decoded"):
        gather({"segmenter 0": worker.mistake.remote()}, seconds=30, doing="scoring")


def test_a_librarys_value_error_is_the_actors_own(worker):
    with pytest.raises(ActorFailed, match=r"segmenter 0 failed while scoring: ValueError: invalid literal") as failed:
        gather({"segmenter 0": worker.library.remote()}, seconds=30, doing="scoring")
    assert "in library" in str(failed.value.__cause__), "with the actor's traceback"


def test_a_fault_names_the_actor_and_what_it_did(worker):
    with pytest.raises(ActorFailed, match="learner 0 failed while updating: RuntimeError: out of memory"):
        gather({"learner 0": worker.fault.remote()}, seconds=30, doing="updating")


def test_a_death_names_the_actor(worker):
    with pytest.raises(ActorDied, match="rollout 0 died while sampling"):
        gather({"rollout 0": worker.die.remote()}, seconds=30, doing="sampling")


@pytest.mark.parametrize(("n", "groups"), [(1, 24), (4, 6), (5, 4), (100, 1)])
def test_an_engine_has_as_many_groups_as_it_samples_at_once(n, groups):
    starter: Any = None
    pool = RolloutPool(starter, Calls(), DeadlineConfig(), sequences=24)
    post = pool.sampling({}, SamplingParams(n=n, temperature=1.0, max_tokens=8))
    assert post.bound == groups


def test_a_placement_gives_an_actor_its_share_of_a_gpu_and_its_environment(ray_cluster):
    group = placement_group([{"CPU": 0.5, "GPU": 0.25}, {"CPU": 0.5}])
    ray.get(group.ready(), timeout=30)
    try:
        shared = Placement(
            group=group, bundle=0, num_cpus=0.5, num_gpus=0.25, environment={"OMP_NUM_THREADS": "3"}, labels={}
        )
        alone = Placement(group=group, bundle=1, num_cpus=0.5, num_gpus=0.0, environment={}, labels={})
        actors = [Worker.options(**placed.options()).remote() for placed in (shared, alone)]
        (devices, gpus, threads), (none, no_gpus, _) = ray.get([a.environment.remote() for a in actors], timeout=60)
        assert devices == "0" and [int(gpu) for gpu in gpus] == [0] and threads == "3"
        assert not none and no_gpus == []
        for actor in actors:
            ray.kill(actor)
    finally:
        remove_placement_group(group)


def test_the_learner_waits_as_all_others_do():
    """In the same wait, also where that is empty yet: what ends while the learner learns is dealt with at once."""
    calls = Calls()
    assert LearnerPool({}, DeadlineConfig(), calls)._calls is calls


class Over(Calls):
    """Calls that have all ended when they are waited for."""

    def _ended(self, seconds):
        flying, self._flying = self._flying, {}
        return [Ended(call=call, result=ref) for ref, (call, _) in flying.items()]


@pytest.mark.parametrize("late", [False, True])
def test_what_follows_from_one_call_may_fail_and_the_others_are_heeded(late):
    """Also from those that missed their deadlines."""
    calls, heeded = (Calls if late else Over)(), list[str]()

    def fail(ended):
        raise ActorFailed(f"{ended.call.actor} was the last")

    for name, then in {"a": fail, "b": lambda ended: heeded.append(ended.call.actor), "c": fail}.items():
        calls.add(name, Call(actor=name, doing="sampling", seconds=0, then=then))
    if late:
        calls._ended = lambda seconds: []  # type: ignore[method-assign]
    with pytest.raises(ActorFailed, match="a was the last"):
        calls.turn()
    assert heeded == ["b"] and len(calls) == 0


class Told(Calls):
    """Calls that have ended before they are waited for."""

    def settle(self, calls, *, seconds, doing):
        found = {name: Call(actor=name, doing=doing, seconds=seconds, then=lambda _: None) for name in calls}
        return {
            name: Ended(call=call, result=calls[name], fault=None if calls[name] else "died", cause="it died")
            for name, call in found.items()
        }


class Handle:
    """Of a segmenter that is no more than what it was asked."""

    def __init__(self, use=None):
        self.asked: list[tuple[Any, ...]] = []
        self.cache_use = SimpleNamespace(remote=lambda: use)
        self.score = SimpleNamespace(remote=lambda *args: self.asked.append(("score", *args)))
        self.embed = SimpleNamespace(remote=lambda *args: self.asked.append(("embed", *args)))


class Ends:
    def __init__(self):
        self.ended = []

    def end(self, name, handle, *, cause):
        self.ended.append((name, cause))


def test_the_use_of_caches_is_summed_and_puts_right_who_has_which_image():
    starter: Any = Ends()
    pool = SegmenterPool(starter, Told(), DeadlineConfig())
    uses = [CacheUse(hits=3, misses=1, kept=2, bytes=64), CacheUse(hits=1, read=1, kept=1, bytes=32), None]
    pool.adopt({f"segmenter {i}": Handle(use) for i, use in enumerate(uses)})
    for member in pool:
        for image in ("liver", "lung", "heart"):
            member.remember(image)
    assert pool.cache_use() == CacheUse(hits=4, misses=1, read=1, kept=3, bytes=96)
    assert [list(member.images) for member in pool] == [["lung", "heart"], ["heart"]]
    assert starter.ended == [("segmenter 2", "it died")]


def test_a_segmenter_is_given_the_group_with_its_masks_and_ahead_without_them():
    starter: Any = Ends()
    pool = SegmenterPool(starter, Told(), DeadlineConfig())
    pool.adopt({"segmenter 0": Handle(), "segmenter 1": Handle()})
    post = pool.scoring({"g": GroupRefs(group="group", masks="masks", image="liver")}, "reward")
    first, second = pool
    entry = Entry(id="g", samples=("receipt", "samples"))
    assert post.ahead is not None and not post.best(entry, first)
    post.ahead(first, entry)
    assert post.best(entry, first) and not post.best(entry, second)
    post.make(second, entry)
    assert post.best(entry, second)
    assert first.handle.asked == [("embed", "group", "reward")]
    assert second.handle.asked == [("score", "group", "masks", "samples", "reward")]
