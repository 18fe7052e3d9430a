"""The doctor with a configuration: what a run needs of a machine's memory and disk, beside hand-made machines."""

from dataclasses import replace

import pytest

from cluster.commands.doctor import check_run
from cluster.commands.doctor_demand import BUCKET, check_demand, demand, object_store, parameters
from cluster.commands.doctor_machine import Machine, this_machine
from cluster.commands.doctor_result import GIB
from cluster.config import EvaluateConfig, SftConfig, TrainConfig, load_config, schema_of
from learner.zero import BUCKET_BYTES
from tests.conftest import ROOT

SEVEN_BILLION = 7 * 10**9
LARGE = Machine(memory=1000 * GIB, shared=500 * GIB, disk=5000 * GIB)


def published(*overrides):
    return load_config(TrainConfig, ROOT / "configs" / "lingshu_7b_soft.yaml", overrides)


def test_parameters_of_the_tiny_reasoner():
    from transformers import AutoModelForImageTextToText

    folder = ROOT / "models" / "tiny-reasoner"
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert parameters(folder) == sum(parameter.numel() for parameter in model.parameters())


def test_what_the_published_run_needs():
    wanted = demand(published(), SEVEN_BILLION)
    weights, checkpoint = 2 * SEVEN_BILLION, 14 * SEVEN_BILLION  # bfloat16; masters and two moments in float32 besides
    assert wanted.weights == weights
    assert wanted.shared == weights, "one version, in the object store"
    assert wanted.memory == checkpoint + 4 * 2 * weights + weights + 4 * BUCKET, (
        "four parked reference models, page-locked, the object store, and a bucket of each engine"
    )
    assert BUCKET == BUCKET_BYTES
    assert wanted.disk == checkpoint * 5, "three newest, the best, and the one that is being written"


def test_adapters_need_no_reference_model_and_no_optimizer_state():
    wanted = demand(published("learner.lora={rank: 16}"), SEVEN_BILLION)
    assert wanted.memory == 2 * 2 * SEVEN_BILLION + 4 * BUCKET and wanted.disk == 5 * 2 * SEVEN_BILLION


@pytest.mark.parametrize(
    ("override", "more"),
    [("learner.offload=optimizer", 18), ("learner.objective.kl=0", -16), ("learner.reference=partitioned", -16)],
)
def test_what_the_host_keeps(override, more):
    """In bytes of each parameter, beside the published run's."""
    assert demand(published(override), SEVEN_BILLION).memory == (
        demand(published(), SEVEN_BILLION).memory + more * SEVEN_BILLION
    )


def test_a_supervised_run_sends_no_weights_and_an_evaluation_writes_no_checkpoints():
    path = ROOT / "configs" / "tiny_reasoner_sft.yaml"
    assert schema_of(path) is SftConfig
    supervised = demand(load_config(SftConfig, path), 1000)
    assert supervised.weights == supervised.shared == 0 and supervised.disk == 3 * 16 * 1000
    evaluation = demand(load_config(EvaluateConfig, ROOT / "configs" / "evaluate_demo.yaml"), 1000)
    assert evaluation.memory == evaluation.disk == 0 and evaluation.processes > 0


@pytest.mark.parametrize("memory", [16 * GIB, 100 * GIB, 2000 * GIB])
def test_the_object_store_is_as_large_as_ray_makes_it(memory):
    from ray._private.utils import get_shared_memory_bytes, resolve_object_store_memory

    machine = Machine(memory=memory, shared=get_shared_memory_bytes(), disk=0)
    assert object_store(machine) == pytest.approx(resolve_object_store_memory(memory), rel=0.01)


def test_a_machine_that_is_large_enough():
    config = published(f"model={ROOT / 'models' / 'tiny-reasoner'}")
    findings = check_demand(config, LARGE)
    assert [finding.status for finding in findings] == ["ok"] * 5
    assert findings[0].detail.endswith("5,292,288 parameters")


@pytest.mark.parametrize(
    ("short", "name", "says"),
    [
        ({"shared": 8 * 2**20}, "shared memory, this run", "--shm-size=1g"),
        ({"memory": 20 * 2**20}, "object store, this run", "--object-store-memory=BYTES"),
        ({"memory": 100 * 2**20}, "memory, this run", "spread the actors over more nodes"),
        ({"disk": 100 * 2**20}, "disk, this run", "keep fewer checkpoints"),
    ],
)
def test_what_is_too_small_is_named_with_its_mend(short, name, says):
    config = published(f"model={ROOT / 'models' / 'tiny-reasoner'}")
    findings = {finding.name: finding for finding in check_demand(config, replace(LARGE, **short))}
    assert findings[name].status == "fail" and says in findings[name].mend


def test_a_model_that_is_not_there():
    (finding,) = check_demand(published("model=weights/nowhere"), LARGE)
    assert finding.status == "fail" and "weights/nowhere is not a model folder" in finding.detail


def test_this_machine_is_looked_at_where_the_runs_will_be(tmp_path):
    machine = this_machine(tmp_path / "not" / "yet" / "there")
    assert min(machine.memory, machine.shared, machine.disk) > 0


def test_of_a_run_on_several_nodes_no_single_one_must_hold_everything(tmp_path):
    """Its GPUs are not here, and nothing of it is a failure."""
    model = ROOT / "models" / "tiny-reasoner"
    config = published(f"model={model}", f"runs={tmp_path}", "keep=1000000", "learner.num_gpus=1000")
    findings = {finding.name: finding for finding in check_run(config)}
    assert findings["disk, this run"].status == "remark"
    assert findings["network"].status == "remark" and "several nodes" in findings["network"].detail
