"""What an actor's node must have: seen before anything is loaded, copied there if the driver has it, and else said."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from actors.build import this_build
from actors.gpus import ALONE, Lodging, Place, this_place
from cluster.hiring import ActorSpec
from cluster.nodes import cramped, unfit
from cluster.placement import Bundle
from cluster.workers import started
from umrg.mistake import Mistake

PLACE = Place(node="n", memory=1, gpus=(), address="10.0.0.2 (b)", shared=20 << 30)
GIB = 1 << 30


def test_a_node_that_has_all_is_fit(tmp_path):
    assert unfit("rollout 0", PLACE, this_build()) is None
    missing = {"model": tmp_path}
    assert unfit("rollout 0", replace(PLACE, missing=missing), this_build()) is None, "it is copied there"


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (
            replace(PLACE, build=replace(this_build(), versions={**this_build().versions, "torch": "1.0"})),
            r"^node 10\.0\.0\.2 \(b\), where rollout 1 lies, has torch 1\.0, and the driver 2\.\S+; give all nodes one "
            r"image, .*\(rollout\.node_labels\)$",
        ),
        (replace(PLACE, missing={"runs": Path("/r/x")}), r"has no /r/x: the learner's ranks write .* give runs=… on"),
        (replace(PLACE, missing={"resume": Path("/c")}), r"has no /c: the learner's ranks .* give resume=… on storage"),
        (replace(PLACE, missing={"model": Path("/m")}), r"has no /m, and neither has the driver's; correct model$"),
    ],
)
def test_what_cannot_work_is_said_in_a_sentence(place, said):
    with pytest.raises(Mistake, match=said):
        raise Mistake(str(unfit("rollout 1", place, this_build())))


@pytest.mark.parametrize(
    ("store", "shared", "said"),
    [
        (16 * GIB, 16 * GIB, None),
        (8 * GIB, 16 * GIB, "has 8.0 GiB of shared memory"),
        (16 * GIB, GIB // 16, "has 0.1 GiB of shared memory"),
    ],
)
def test_shared_memory_that_holds_no_version_is_remarked(store, shared, said):
    found = cramped("rollout 0", replace(PLACE, shared=shared), 15 * GIB, {"n": store})
    assert found is None if said is None else said in str(found) and "enlarge /dev/shm there to 18.8 GiB" in str(found)


class Reading:
    """An actor of any role, which opens a file when it starts and returns what is in it. away: whether its node has not
    got the driver's file, which it has, as all nodes of the tests are one machine."""

    def __init__(self, path: Path, *, away: bool) -> None:
        self._path, self._away = path, away

    def place(self) -> Place:
        place = this_place({"model": self._path})
        return replace(place, missing={"model": self._path}) if self._away else place

    def address(self):
        return "127.0.0.1", 1

    def start(self, *told):
        lodging = next((each for each in told if isinstance(each, Lodging)), ALONE)
        path = lodging.local(self._path)
        return f"{path}: {(path / 'weights').read_text()}"

    def stop(self):
        pass


def listed(path: Path, *, away: bool, environment=None):
    return [
        ActorSpec(
            bundle=Bundle(role=role, index=index, cpus=0, gpus=0),
            actor_class=Reading,
            arguments={"path": path, "away": away},
            environment=environment or {},
        )
        for role, index in (("learner", 0), ("rollout", 0), ("segmenter", 0), ("segmenter", 1))
    ]


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_text("one, two")
    return folder


def test_what_a_node_has_is_neither_read_nor_copied(ray_cluster, demo_config, model, tmp_path, capsys):
    with started(listed(model, away=False), demo_config(f"cache={tmp_path / 'cache'}")) as workers:
        assert workers.expert_digest == f"{model}: one, two"
    assert not (tmp_path / "cache").exists() and "copying" not in capsys.readouterr().out


def test_what_only_the_driver_has_is_copied_once_a_node(ray_cluster, demo_config, model, tmp_path, capsys):
    cache = tmp_path / "cache"
    for _ in range(2):
        with started(listed(model, away=True), demo_config(f"cache={cache}")) as workers:
            (copy,) = cache.glob("*/model")
            assert workers.expert_digest == f"{copy}: one, two"
        said = capsys.readouterr().out
        assert said.count(f"reading {model}, which is to be copied") == 1
    assert not list(cache.glob(".*.part"))


def test_a_cache_that_cannot_be_written_is_named(ray_cluster, demo_config, model, tmp_path):
    (tmp_path / "cache").write_text("in the way")
    with (
        pytest.raises(
            Mistake, match=r"^node \S+ \(.*\) failed while copying model .*cache'; mend that, or give cache=…"
        ),
        started(listed(model, away=True), demo_config(f"cache={tmp_path / 'cache'}")),
    ):
        pass


def test_another_version_at_an_actor_is_named_before_it_loads(ray_cluster, demo_config, model, tmp_path):
    """The actors' processes find other metadata of one package before the true one."""
    other = tmp_path / "other" / "transformers-4.0.0.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.0.0\n")
    path = os.pathsep.join([str(other.parent), os.environ.get("PYTHONPATH", "")])
    with (
        pytest.raises(Mistake, match=r"where \w+ 0 lies, has transformers 4\.0\.0, and the driver 5\."),
        started(listed(model, away=False, environment={"PYTHONPATH": path}), demo_config()),
    ):
        raise AssertionError("it was started")
