"""Waiting for actors: what failed is named, and nothing waits for ever."""

import errno
import time
from typing import Any

import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group

from actors.pools import ActorFailed, DeadlinePassed, Placement, as_completed, gather


class _Worker:
    def quick(self, value):
        return value

    def slow(self):
        time.sleep(60)

    def mistake(self):
        raise ValueError("the image of row 3 cannot be decoded")

    def full(self):
        raise OSError(errno.ENOSPC, "No space left on device", "/data/step-000002/model.safetensors")

    def fault(self):
        raise RuntimeError("out of memory")

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


def test_something_can_be_done_while_actors_are_waited_for(worker):
    done = []
    with pytest.raises(DeadlinePassed):
        dict(
            as_completed(
                {"a": worker.slow.remote()},
                {"a": "rollout 0"},
                seconds=2.5,
                doing="sampling",
                meanwhile=lambda: done.append(1),
            )
        )
    assert len(done) >= 3


def test_a_mistake_in_the_data_stays_a_mistake(worker):
    with pytest.raises(ValueError, match="segmenter 0, scoring: the image of row 3 cannot be decoded"):
        gather({"segmenter 0": worker.mistake.remote()}, seconds=30, doing="scoring")


def test_a_fault_names_the_actor_and_what_it_did(worker):
    with pytest.raises(ActorFailed, match="learner 0 failed while updating: RuntimeError: out of memory"):
        gather({"learner 0": worker.fault.remote()}, seconds=30, doing="updating")


def test_a_death_names_the_actor(worker):
    with pytest.raises(ActorFailed, match="rollout 0 died while sampling"):
        gather({"rollout 0": worker.die.remote()}, seconds=30, doing="sampling")


def test_a_placement_gives_an_actor_its_share_of_a_gpu_and_its_environment(ray_cluster):
    group = placement_group([{"CPU": 0.5, "GPU": 0.25}, {"CPU": 0.5}])
    ray.get(group.ready(), timeout=30)
    try:
        shared = Placement(
            name="segmenter 0", group=group, bundle=0, num_cpus=0.5, num_gpus=0.25, environment={"OMP_NUM_THREADS": "3"}
        )
        alone = Placement(name="rollout 0", group=group, bundle=1, num_cpus=0.5, num_gpus=0.0, environment={})
        actors = [Worker.options(**placed.options()).remote() for placed in (shared, alone)]
        (devices, gpus, threads), (none, no_gpus, _) = ray.get([a.environment.remote() for a in actors], timeout=60)
        assert devices == "0" and [int(gpu) for gpu in gpus] == [0] and threads == "3"
        assert not none and no_gpus == []
        for actor in actors:
            ray.kill(actor)
    finally:
        remove_placement_group(group)
