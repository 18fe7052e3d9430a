"""What cannot fit on its GPUs is refused in words, before anything is loaded."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from actors.gpus import Gpu, Place
from bench.architectures import ARCHITECTURES
from cluster.commands.memory import print_memory, tenants
from cluster.config import TrainConfig, load_config
from cluster.hiring import ActorSpec
from cluster.memory import TRUST, overfull, parking, summary, tenant
from cluster.placement import Bundle
from cluster.workers import started_supervised
from docs import sizing
from reasoner.footprint import GIB, Need
from tests.conftest import ROOT

PUBLISHED = ROOT / "configs" / "lingshu_7b_hard.yaml"
H100 = int(79.1 * GIB)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder that holds the configuration of Qwen2.5-VL-7B, and no weights."""
    path = tmp_path_factory.mktemp("model")
    ARCHITECTURES["Qwen2.5-VL-7B"]().save_pretrained(path)
    return path


@pytest.fixture
def published(folder):
    """The published 7B training, with overrides."""

    def load(*overrides):
        return load_config(TrainConfig, PUBLISHED, [f"model={folder}", *overrides])

    return load


def test_the_published_set_up_fits_on_eight_gpus_of_80_gb(published):
    assert overfull(tenants(published("learner.gradient_checkpointing=true"), H100)) is None


@pytest.mark.parametrize(
    ("name", "model", "parks"),
    [
        ("colocated_1gpu_3b", "Qwen2.5-VL-3B", True),
        ("colocated_4gpu_7b", "Qwen2.5-VL-7B", True),
        ("colocated_8gpu_7b", "Qwen2.5-VL-7B", False),
    ],
)
def test_shared_gpus_of_80_gb_hold_engines_and_ranks_in_turn(tmp_path, name, model, parks):
    ARCHITECTURES[model]().save_pretrained(tmp_path)
    config = load_config(TrainConfig, ROOT / "configs" / f"{name}.yaml", [f"model={tmp_path}"])
    found = tenants(config, H100)
    assert overfull(found) is None and parking(found)[0] is parks
    at_once = [replace(each, idle=None) for each in found]
    assert overfull(at_once) is not None, "both at the same time would not fit"


def test_without_gradient_checkpointing_it_is_refused(published):
    fault = overfull(tenants(published("learner.gradient_checkpointing=false"), H100))
    assert fault is not None
    assert fault.startswith("learner 0 needs ")
    assert "(weights 15.4, gradients 7.7, optimizer 23.2, activations 1" in fault
    assert "its GPU of 79.1 GiB has less; set learner.gradient_checkpointing, " in fault


@pytest.mark.parametrize("way", ["learner.zero_stage", "learner.lora", "learner.offload", "learner.ranks"])
def test_seven_billion_parameters_do_not_learn_on_one_gpu_of_24_gb(published, way):
    """Whatever the token budget: what is certain alone is too much."""
    config = published("learner.ranks=1", "learner.gradient_checkpointing=true", "learner.micro_batch_tokens=4096")
    fault = overfull(tenants(config, 24 * GIB))
    assert fault is not None and way in fault


def test_an_engine_without_room_for_one_sequence_is_refused(published):
    fault = overfull(tenants(published("learner.lora={}", "learner.gradient_checkpointing=true"), 15 * GIB))
    assert fault is not None
    assert fault.startswith("rollout 0 may fill 12.0 GiB of its GPU of 15.0 GiB and needs ")
    assert "raise rollout.gpu_memory from 0.8" in fault


def test_fractions_share_a_gpu_as_ray_places_them(published):
    found = tenants(published(), H100)
    used = {each.name: [gpu.uuid for gpu in each.place.gpus] for each in found}
    assert [used[f"learner {i}"] for i in range(4)] == [["0"], ["1"], ["2"], ["3"]]
    assert [used[f"segmenter {i}"] for i in range(4)] == [used[f"rollout {i}"] for i in range(4)]


def place(uuid="a", *, node="n", gib=10.0, host=100.0):
    return Place(node=node, memory=int(host * GIB), gpus=(Gpu(name="card", uuid=uuid, memory=int(gib * GIB)),))


def need(certain=0.0, estimated=0.0, host=0.0, reserved=None):
    return Need(
        certain={"weights": int(certain * GIB)},
        estimated={"activations": int(estimated * GIB)},
        host={"optimizer": int(host * GIB)} if host else {},
        reserved=None if reserved is None else int(reserved * GIB),
        remedy="give less",
    )


def on(where, what, name="learner 0"):
    return tenant(name, lambda _: what, where)


def test_actors_of_one_gpu_are_added_up():
    apart = [on(place("a"), need(6), "learner 0"), on(place("b"), need(6), "segmenter 0")]
    assert overfull(apart) is None
    assert overfull([on(place("a"), need(6)), on(place("a", node="m"), need(6), "learner 1")]) is None
    together = [on(place("a"), need(6), "learner 0"), on(place("a"), need(6), "segmenter 0")]
    assert overfull(together) == (
        "2 actors share one card of 10.0 GiB and need more: learner 0 6.0 GiB (weights 6.0); "
        "segmenter 0 6.0 GiB (weights 6.0); give less"
    )


def test_an_engine_takes_what_it_reserves():
    engine = on(place(), need(1, reserved=8.5), "rollout 0")
    assert overfull([engine]) is None
    assert "rollout 0 reserves 8.5 GiB" in str(overfull([engine, on(place(), need(2), "segmenter 0")]))


def test_estimates_are_trusted_in_part():
    """What is certain counts in full; what is estimated may be a little too high."""
    assert overfull([on(place(), need(5, 5 / TRUST - 0.1))]) is None
    assert overfull([on(place(), need(5, 5 / TRUST + 0.1))]) is not None
    assert overfull([on(place(), need(10.1))]) is not None


def test_what_is_offloaded_must_fit_into_the_node():
    ranks = [on(place(str(i)), need(1, host=60), f"learner {i}") for i in range(2)]
    assert "cannot hold what is kept there (learner 0 60.0 GiB, learner 1 60.0 GiB)" in str(overfull(ranks))
    spread = [on(place(str(i), node=str(i)), need(1, host=60), f"learner {i}") for i in range(2)]
    assert overfull(spread) is None


def test_each_role_is_one_line():
    lines = summary([on(place(str(i)), need(6, 2), f"learner {i}") for i in range(4)])
    assert lines == ["learner: estimated 8.0 GiB (weights 6.0, activations 2.0) on card of 10.0 GiB"]


class Crowded:
    """An actor whose GPU is too small. It has no `start`: nothing gets that far."""

    def place(self):
        return place()


def test_a_run_that_cannot_fit_ends_before_anything_is_loaded(ray_cluster, demo_config, capsys):
    actor = ActorSpec(
        bundle=Bundle(role="learner", index=0, cpus=1, gpus=1),
        actor_class=Crowded,
        arguments={},
        need=lambda _: need(12),
    )
    with (
        pytest.raises(ValueError, match=r"learner 0 needs 12\.0 GiB \(weights 12\.0\), and its card of 10\.0 GiB has"),
        started_supervised([actor], demo_config()),
    ):
        raise AssertionError("it was started")
    assert "learner: estimated 12.0 GiB" in capsys.readouterr().out


def test_the_command_prints_a_table_and_a_verdict(folder):
    console = Console(record=True, width=160, file=io.StringIO())
    overrides = [f"model={folder}", "learner.gradient_checkpointing=true"]
    assert print_memory(PUBLISHED, overrides, 79.1, console) == 0
    assert print_memory(PUBLISHED, overrides, 40, console) == 1
    text = console.export_text()
    assert "on 8 GPUs of 79.1 GiB" in text
    assert "fits, as far as can be estimated" in text
    assert "does not fit: learner 0 needs" in text


def test_without_gpus_there_is_nothing_to_fit():
    console = Console(record=True, width=160, file=io.StringIO())
    assert print_memory(ROOT / "configs" / "demo.yaml", [], 80, console) == 0
    assert "no role has a GPU" in console.export_text()


def test_the_sizing_table_is_the_one_that_is_documented():
    """A row of it; the whole takes a minute."""
    assert sizing.row("Qwen2.5-VL-7B", 8, lora=False) in (ROOT / "docs" / "gpu.md").read_text()


def test_a_model_that_is_not_there_yet_is_asked_for_by_its_file(tmp_path):
    config = ROOT / "configs" / "lingshu_7b_hard.yaml"
    with pytest.raises(ValueError, match=r"config\.json is not there, from which the estimate is made; download"):
        print_memory(config, [f"model={tmp_path / 'nowhere'}"], 79.1, Console(quiet=True))
