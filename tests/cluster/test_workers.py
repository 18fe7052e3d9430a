"""What is seen before an actor starts, in which order actors do, and with which variables."""

import os
import shutil
import time

import psutil
import pytest
import ray

from actors.gpus import Place
from cluster import evaluate, sft, train
from cluster.config import EvaluateConfig, SftConfig
from cluster.hiring import ActorSpec
from cluster.placement import Bundle
from cluster.weight_sync import tend
from cluster.workers import started
from tests.conftest import TINY_REASONER
from umrg.mistake import Mistake


@pytest.mark.parametrize("job", ["train", "evaluate", "sft"])
def test_a_model_that_cannot_be_loaded_is_named_before_any_actor_starts(tmp_path, demo_config, job):
    """Without a cluster: the check comes when the job lists its actors."""
    model = tmp_path / "model"
    shutil.copytree(TINY_REASONER, model, ignore=shutil.ignore_patterns("model.safetensors"))
    (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 21\n")
    given = {"name": "x", "model": model, "data": {"eval": "rows.parquet"}}
    supervised = {"name": "x", "model": model, "data": {"train": "rows.parquet"}, "learner": {"lr": 1e-4}, "steps": 1}
    listed = {
        "train": lambda: train.actors(demo_config(f"model={model}")),
        "evaluate": lambda: evaluate.actors(EvaluateConfig.model_validate({**given, "expert": "tiny"})),
        "sft": lambda: sft.actors(SftConfig.model_validate(supervised), tmp_path),
    }[job]
    with pytest.raises(ValueError, match=r"model\.safetensors is a Git LFS pointer"):
        listed()


@pytest.mark.parametrize(
    ("preset", "segmenter", "said"),
    [
        ("soft", 1, "the reward looks at no mask, and segmenters have a GPU for themselves"),
        ("soft", 0.1, None),  # with an engine
        ("soft", 0, None),
        ("mask", 1, None),
    ],
)
def test_segmenters_that_idle_on_a_gpu_are_remarked(demo_config, preset, segmenter, said):
    engine = 0.9 if segmenter == 0.1 else 1
    config = demo_config(f"reward.preset={preset}", f"segmenter.num_gpus={segmenter}", f"rollout.num_gpus={engine}")
    remark = train.idle_segmenters(config, train.actors(config))
    assert remark is None if said is None else remark is not None and remark.startswith(said)


@pytest.mark.parametrize(
    ("overrides", "advice"),
    [
        ("segmenter.actors=2", "set rollout.num_gpus to 0.8 and segmenter.num_gpus to 0.1"),
        ("segmenter.actors=5", "set segmenter.num_gpus to 0, and"),
        ("rollout={tensor_parallel: 2, num_gpus: 2}", "set segmenter.num_gpus to 0, and"),
    ],
)
def test_the_remark_advises_what_a_configuration_may_say(demo_config, overrides, advice):
    config = demo_config("reward.preset=soft", "segmenter.num_gpus=1", "rollout.num_gpus=1", overrides)
    assert advice in str(train.idle_segmenters(config, train.actors(config)))


class Log:
    """What the actors did, in order."""

    def __init__(self):
        self.lines = []

    def add(self, line):
        self.lines.append(line)

    def read(self):
        return self.lines


class Fake:
    """An actor of any role, which loads nothing and says when it starts, when it has started, and on which GPU."""

    def __init__(self, log, name):
        self.log, self.name = log, name

    def address(self):
        return "127.0.0.1", 1

    def place(self):
        return Place(node="", memory=1, gpus=())

    def start(self, *_):
        ray.get(self.log.add.remote(f"{self.name} begins on GPU {os.environ.get('CUDA_VISIBLE_DEVICES')}"))
        time.sleep(0.2)
        ray.get(self.log.add.remote(f"{self.name} is up"))
        return os.environ.get("OF_A_USER")

    def stop(self):
        pass


def test_engines_that_share_a_gpu_start_one_after_another_and_before_all_others(ray_cluster, demo_config):
    """On the cluster's one GPU, whatever the order in which they are listed; each with its role's variables."""
    log = ray.remote(Log).options(num_cpus=0).remote()
    shares = [("segmenter", 0, 0.1), ("learner", 0, 0.1), ("rollout", 0, 0.4), ("rollout", 1, 0.4)]
    listed = [
        ActorSpec(
            bundle=(bundle := Bundle(role=role, index=index, cpus=0, gpus=share)),
            actor_class=Fake,
            arguments={"log": log, "name": bundle.name},
            environment={"OF_A_USER": role},
        )
        for role, index, share in shares
    ]
    with started(listed, demo_config()) as workers:
        assert workers.expert_digest == "segmenter", "its variable, which the fake returns in place of a digest"
    lines = ray.get(log.read.remote())
    assert lines[:4] == [
        *("rollout 0 begins on GPU 0", "rollout 0 is up"),
        *("rollout 1 begins on GPU 0", "rollout 1 is up"),
    ]
    assert sorted(lines[4:]) == [
        *("learner 0 begins on GPU 0", "learner 0 is up"),
        *("segmenter 0 begins on GPU 0", "segmenter 0 is up"),
    ]


def test_what_a_local_cluster_will_never_hold_is_refused_at_once(ray_cluster, demo_config):
    """No node will join it (Ray's private record of who started it tells)."""
    config = demo_config("learner.num_cpus=100")
    with (
        pytest.raises(Mistake, match=r"no room for learner 0 \(100 CPUs.*; ask for fewer"),
        started(train.actors(config), config),
    ):
        pass


def test_an_actor_that_finds_no_room_says_what_it_waits_for(ray_cluster, demo_config, monkeypatch, capsys):
    """Another one that is asked for on a cluster that has no CPU left for it; it does not end the run."""
    monkeypatch.setattr("cluster.hiring.PATIENCE_S", 0.0)
    log = ray.remote(Log).options(num_cpus=0).remote()
    free = ray.available_resources()["CPU"]
    listed = [
        ActorSpec(
            bundle=(bundle := Bundle(role=role, index=0, cpus=cpus, gpus=0)),
            actor_class=Fake,
            arguments={"log": log, "name": bundle.name},
        )
        for role, cpus in (("learner", 0), ("rollout", 0), ("segmenter", 0.6 * free))
    ]
    with started(listed, demo_config()) as workers:
        workers.wanted["segmenter"] = 2
        for _ in range(3):
            tend(workers)
            workers.calls.turn(0.2)
        assert [member.state for member in workers.segmenters] == ["ready", "starting"]
    said = capsys.readouterr().out
    assert f"starting segmenter 1\nsegmenter 1 waits for {0.6 * free:g} CPUs, 0 GPUs on one node; " in said


def test_a_run_begins_without_those_that_have_no_room_yet(ray_cluster, demo_config, monkeypatch, capsys):
    """They stay asked for: here on a node of a kind that the cluster has none of."""
    monkeypatch.setattr("cluster.hiring.PATIENCE_S", 0.5)
    log = ray.remote(Log).options(num_cpus=0).remote()
    listed = [
        ActorSpec(
            bundle=(bundle := Bundle(role=role, index=index, cpus=0, gpus=0, labels=labels)),
            actor_class=Fake,
            arguments={"log": log, "name": bundle.name},
        )
        for role, index, labels in (
            *((role, 0, {}) for role in ("learner", "rollout", "segmenter")),
            ("segmenter", 1, {"kind": "elsewhere"}),
        )
    ]
    with started(listed, demo_config()) as workers:
        assert [member.state for member in workers.segmenters] == ["ready", "starting"]
        assert workers.wanted == {"rollout": 1, "segmenter": 2}
        tend(workers)
    assert "segmenter 1 waits for 0 CPUs, 0 GPUs on one node, kind=elsewhere; " in capsys.readouterr().out


class Slow(Fake):
    """Finds room after the run has begun to load others, or loads for long."""

    def place(self):
        time.sleep(3 if self.name == "segmenter 1" else 0)
        return super().place()

    def start(self, *_):
        time.sleep(5 if self.name == "rollout 0" else 0)
        return super().start()


def test_whoever_finds_room_while_others_load_joins(ray_cluster, demo_config, monkeypatch):
    monkeypatch.setattr("cluster.hiring.PATIENCE_S", 0.5)
    log = ray.remote(Log).options(num_cpus=0).remote()
    listed = [
        ActorSpec(
            bundle=(bundle := Bundle(role=role, index=index, cpus=0, gpus=0)),
            actor_class=Slow,
            arguments={"log": log, "name": bundle.name},
        )
        for role, index in (("learner", 0), ("rollout", 0), ("segmenter", 0), ("segmenter", 1))
    ]
    with started(listed, demo_config()) as workers:
        assert workers.wanted == {"rollout": 1, "segmenter": 2}
        deadline = time.monotonic() + 120
        while len(workers.segmenters.ready) < 2:
            assert time.monotonic() < deadline
            tend(workers)
            workers.calls.turn(0.2)
        assert {member.name for member in workers.segmenters} == {"segmenter 0", "segmenter 1"}


def test_a_variable_of_a_role_reaches_the_engines_own_processes(workers):
    """vLLM's core and worker, which the actor starts (the variable is in conftest.py)."""
    engines = [each for each in psutil.Process().children(recursive=True) if "VLLM::" in each.name()]
    assert len(engines) >= 2
    assert {process.environ().get("OF_A_USER") for process in engines} == {"7"}
