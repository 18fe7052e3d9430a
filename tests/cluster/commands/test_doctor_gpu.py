"""The doctor on a GPU machine, from what nvidia-smi and the kernel print there."""

import inspect
import os
import shutil
import subprocess
import sys

import pytest

from cluster.commands.doctor_gpu import (
    check_capability,
    check_driver,
    check_gpus,
    check_network,
    chosen_interfaces,
    count_gpus,
    cuda_of_torch,
    default_interface,
    gpu_results,
    pinned_cuda,
)
from cluster.commands.doctor_probes import RESULT
from tests.conftest import ROOT

HEADER = """\
Tue Nov 25 10:00:00 2026
+-----------------------------------------------------------------------------------------+
| NVIDIA-SMI 550.54.15              Driver Version: 550.54.15      CUDA Version: {cuda:<10}|
|-----------------------------------------+------------------------+----------------------+
"""
NEW_HEADER = (
    "| NVIDIA-SMI 610.43.02     KMD Version: 610.43.02     Driver Version: 610.43.02     CUDA UMD Version: 13.3     |"
)
LISTED = "NVIDIA H100 80GB HBM3, 81559 MiB, 9.0\nNVIDIA H100 80GB HBM3, 81559 MiB, 9.0\n"
ROUTES = """\
Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
docker0\t000011AC\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0
wlan0\t00000000\t0102A8C0\t0003\t0\t0\t600\t00000000\t0\t0\t0
eth0\t00000000\t0100000A\t0003\t0\t0\t100\t00000000\t0\t0\t0
"""
INTERFACES = ("lo", "docker0", "eth0", "eth1")


def printed(text, exit_code=0):
    return subprocess.CompletedProcess(["nvidia-smi"], exit_code, stdout=text, stderr="")


def test_a_missing_gpu_is_a_remark_on_the_cpu_set_and_a_failure_on_the_gpu_set():
    assert check_gpus(None, cuda_set=False).status == "remark"
    missing = check_gpus(None, cuda_set=True)
    assert missing.status == "fail" and "--gpus all" in missing.mend


def test_an_unused_gpu_is_a_remark():
    unused = check_gpus(printed(LISTED), cuda_set=False)
    assert unused.status == "remark" and "EXTRA=gpu" in unused.mend
    assert check_gpus(printed(LISTED), cuda_set=True).status == "ok"
    assert count_gpus(printed(LISTED)) == 2 and count_gpus(None) == 0


def test_a_driver_that_does_not_answer_is_quoted():
    broken = printed("Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 580.1\n", 18)
    finding = check_gpus(broken, cuda_set=True)
    assert (finding.status, finding.detail) == (
        "fail",
        "nvidia-smi: Failed to initialize NVML: Driver/library version mismatch",
    )
    assert "start the machine again" in finding.mend and count_gpus(broken) == 0


@pytest.mark.parametrize(
    ("shown", "status", "says"),
    [
        (HEADER.format(cuda="13.0"), "ok", "550.54.15, for CUDA 13.0; torch is built for 13.0"),
        (NEW_HEADER, "ok", "610.43.02, for CUDA 13.3"),
        (HEADER.format(cuda="12.4"), "fail", "Update NVIDIA's driver to one for CUDA 13.0 or later."),
        (HEADER.format(cuda="N/A"), "fail", "NVIDIA_DRIVER_CAPABILITIES=compute,utility"),
    ],
)
def test_the_driver_must_be_for_the_cuda_of_torch(shown, status, says):
    finding = check_driver(shown, needed="13.0")
    assert finding.status == status and says in f"{finding.detail} {finding.mend}"


def test_a_driver_of_an_older_minor_version_is_a_remark():
    assert check_driver(HEADER.format(cuda="13.0"), needed="13.1").status == "remark"


def test_a_cpu_build_of_torch_in_the_gpu_set_is_a_failure():
    finding = check_driver(HEADER.format(cuda="13.0"), needed=None)
    assert finding.status == "fail" and "make clean setup EXTRA=gpu" in finding.mend


@pytest.mark.parametrize(
    ("capability", "status", "says"),
    [
        ("9.0", "ok", ""),
        ("12.0", "ok", ""),
        ("7.5", "remark", "float32"),
        ("7.0", "fail", "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_compute_capability(capability, status, says):
    finding = check_capability(f"Some card, 16384 MiB, {capability}\n{LISTED}")
    assert finding.status == status and says in finding.mend


def test_faults_of_gpus_are_no_failures_where_the_cpu_set_is_installed():
    old, listed = HEADER.format(cuda="12.4"), printed(LISTED)
    on_gpu = gpu_results(listed, printed(old), cuda_set=True, needed="13.0")
    assert [result.status for result in on_gpu] == ["ok", "ok", "fail"]
    on_cpu = gpu_results(listed, printed(old), cuda_set=False, needed="13.0")
    assert [result.status for result in on_cpu] == ["remark", "ok", "remark"]
    assert all(result.mend for result in on_cpu if result.status != "ok")


def test_cuda_of_torch_is_read_without_importing_it():
    import torch

    code = "import sys, cluster.commands.doctor_gpu as gpu; print(gpu.cuda_of_torch(), 'torch' in sys.modules)"
    outcome = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert outcome.stdout.split() == [str(torch.version.cuda), "False"]
    assert cuda_of_torch() == torch.version.cuda
    assert pinned_cuda(ROOT / "constraints" / "gpu.txt") == "13.0"


def test_the_default_route_of_least_metric():
    assert default_interface(ROUTES) == "eth0"
    assert default_interface("Iface\tDestination\n") is None and default_interface("") is None


@pytest.mark.parametrize(
    ("value", "chosen"),
    [
        ("eth", ["eth0", "eth1"]),
        ("=eth", []),
        ("=eth1,lo", ["lo", "eth1"]),
        ("^docker,lo", ["eth0", "eth1"]),
        ("^=eth1", ["lo", "docker0", "eth0"]),
        ("ib0", []),
    ],
)
def test_interfaces_are_named_as_nccl_reads_them(value, chosen):
    assert chosen_interfaces(value, INTERFACES) == chosen


def network(environment=None, exported=None, several_nodes=False):
    return check_network(
        ROUTES, INTERFACES, environment=environment or {}, exported=exported or {}, several_nodes=several_nodes
    )


def test_ranks_on_several_nodes_need_named_interfaces():
    assert network().status == "ok" and "eth0" in network().detail
    unnamed = network(several_nodes=True)
    assert unnamed.status == "remark"
    assert "learner.environment to {NCCL_SOCKET_IFNAME: eth0, GLOO_SOCKET_IFNAME: eth0}" in unnamed.mend
    named = {"NCCL_SOCKET_IFNAME": "eth", "GLOO_SOCKET_IFNAME": "eth0"}
    assert network(named, several_nodes=True).status == "ok"


def test_an_interface_that_is_not_there_fails():
    absent = network({"NCCL_SOCKET_IFNAME": "bond0"})
    assert absent.status == "fail" and "eth1" in absent.detail and "NCCL_SOCKET_IFNAME: eth0" in absent.mend
    assert network({"GLOO_SOCKET_IFNAME": "eth"}).status == "fail", "Gloo takes whole names"


def test_what_the_shell_exports_belongs_into_the_configuration():
    unheard = network(exported={"NCCL_SOCKET_IFNAME": "eth1"})
    assert unheard.status == "remark" and "learner.environment to {NCCL_SOCKET_IFNAME: eth1}" in unheard.mend


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no C compiler")
def test_the_probe_of_triton_compiles_c_and_fails_without_a_compiler():
    def probe(**variables):
        command = [sys.executable, "-m", "cluster.commands.doctor_probes", "triton"]
        return subprocess.run(
            command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, check=False
        )

    works = probe()
    assert works.returncode == 0 and works.stdout.splitlines()[-1].startswith(f"{RESULT}compiles C")
    without = probe(CC="/nowhere/cc")
    assert without.returncode == 1 and "/nowhere/cc" in without.stderr.splitlines()[-1]


def test_what_the_probe_of_triton_calls_on_a_gpu():
    from vllm.v1.worker.gpu.sample.logprob import compute_token_logprobs

    assert list(inspect.signature(compute_token_logprobs).parameters) == ["logits", "token_ids"]
    source = inspect.getsource(compute_token_logprobs)
    assert "batch_size, vocab_size = logits.shape" in source and "token_ids.shape[1]" in source
