"""deploy/ray-up.yaml, read as `ray up` reads it."""

import re

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster.commands.doctor_demand import ROOM, SHARED_SHARE, demand
from tests.conftest import ROOT
from tests.deploy.manifests import run_of


def read():
    return yaml.safe_load((ROOT / "deploy" / "ray-up.yaml").read_text())


def test_ray_takes_it():
    prepared = prepare_config(read())
    validate_config(prepared)
    (kind,) = prepared["available_node_types"].values()
    assert (kind["min_workers"], kind["max_workers"]) == (1, 1), "all of the machines, from the start"


@pytest.mark.parametrize("wrong", [{"head_start_ray_command": []}, {"file_mount": {}}])
def test_a_misspelt_key_is_refused(wrong):
    with pytest.raises(jsonschema.ValidationError, match=next(iter(wrong))):
        validate_config(prepare_config(read() | wrong))


def test_containers_have_the_shared_memory_that_the_model_needs():
    (size,) = [each for each in read()["docker"]["run_options"] if each.startswith("--shm-size=")]
    gib = int(size.removeprefix("--shm-size=").removesuffix("g"))
    parameters = 8_292_166_656  # of Lingshu-7B, bench.architectures
    assert gib << 30 >= ROOM * demand(run_of("train"), parameters).shared / SHARED_SHARE


def test_a_job_that_is_stopped_has_time_to_end():
    """The variable is in the environment of the head's `ray start` (test_kuberay.py has who reads it)."""
    (start,) = [each for each in read()["head_start_ray_commands"] if "ray start" in each]
    assert re.match(r"RAY_JOB_STOP_WAIT_TIME_S=(\d+) ray start --head ", start)


def test_all_machines_have_the_token():
    options = " ".join(read()["docker"]["run_options"])
    (path,) = read()["file_mounts"]
    assert "-e RAY_AUTH_MODE=token" in options and f"-e RAY_AUTH_TOKEN_PATH={path}" in options
