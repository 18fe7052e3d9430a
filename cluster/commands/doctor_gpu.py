"""The doctor on a machine with NVIDIA GPUs: what its driver offers and torch needs, and the network between nodes.

Every check takes what a program or the kernel printed.
"""

import re
import runpy
import shutil
import subprocess
from collections.abc import Collection, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from cluster.commands.doctor_result import CheckResult
from cluster.commands.doctor_versions import read_constraints

Output = subprocess.CompletedProcess[str]

LEAST_CAPABILITY = (7, 5)
"""Compute capability of the oldest GPUs that torch's builds for CUDA 13.0 have kernels for."""
BFLOAT16_CAPABILITY = (8, 0)
"""Compute capability from which vLLM and FlashAttention compute in bfloat16."""

DRIVER_MEND = (
    "Install NVIDIA's driver; in a container, start it with the GPUs (docker: --gpus all) and with "
    "NVIDIA_DRIVER_CAPABILITIES=compute,utility."
)
SOCKETS = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
"""Variables that name the network interfaces of collectives: NCCL's on GPUs, Gloo's on CPUs."""


def nvidia_smi(*arguments: str) -> Output | None:
    """What nvidia-smi prints; None where there is none."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        return Output(command, returncode=124, stdout="no answer within 60 s", stderr="")


def list_gpus() -> Output | None:
    """One line `name, memory, compute capability` for each GPU."""
    return nvidia_smi("--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader")


def count_gpus(listed: Output | None) -> int:
    """How many GPUs `list_gpus` names."""
    return len(listed.stdout.strip().splitlines()) if listed and listed.returncode == 0 else 0


def cuda_of_torch() -> str | None:
    """CUDA version that the installed torch was built for, without importing it; None for a CPU build."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    version: str | None = runpy.run_path(str(Path(spec.origin).with_name("version.py")))["cuda"]
    return version


def pinned_cuda(constraints: Path) -> str:
    """CUDA version of the torch that a file of constraints names: that of the runtime library beside it."""
    major, minor, *_ = read_constraints(constraints)["nvidia-cuda-runtime"].split(".")
    return f"{major}.{minor}"


def gpu_results(
    listed: Output | None, shown: Output | None, *, cuda_set: bool, needed: str | None
) -> list[CheckResult]:
    """listed: of `list_gpus`. shown: of nvidia-smi without arguments. cuda_set: whether the gpu extra is installed;
    without it no fault is a failure. needed: torch's CUDA version; None for a CPU build."""
    results = [check_gpus(listed, cuda_set=cuda_set)]
    if listed is not None and shown is not None and listed.returncode == 0:
        results += [check_capability(listed.stdout), check_driver(shown.stdout, needed=needed)]
    if cuda_set:
        return results
    return [replace(result, status="remark") if result.status == "fail" else result for result in results]


def check_gpus(listed: Output | None, *, cuda_set: bool) -> CheckResult:
    """Whether there are GPUs, and whether what is installed can use them."""
    if listed is not None and listed.returncode != 0:
        said = (listed.stdout.strip() or listed.stderr.strip() or f"exit code {listed.returncode}").splitlines()[0]
        mend = "Update NVIDIA's driver; after an update, load it anew or start the machine again."
        return CheckResult(name="GPUs", status="fail", detail=f"nvidia-smi: {said}", mend=mend)
    gpus = [line.strip() for line in (listed.stdout if listed else "").splitlines() if line.strip()]
    if not gpus and cuda_set:
        mend = f"{DRIVER_MEND} For the CPU, run `make clean setup EXTRA=cpu`."
        return CheckResult(name="GPUs", status="fail", detail="none found, and the GPU set is installed", mend=mend)
    if not gpus:
        mend = "Nothing to mend for the tiny models, which run on the CPU; 3B and 7B models need an NVIDIA GPU."
        return CheckResult(name="GPUs", status="remark", detail="none found", mend=mend)
    detail = "; ".join(gpus)
    if not cuda_set:
        mend = "Run `make clean setup EXTRA=gpu` to use it."
        return CheckResult(name="GPUs", status="remark", detail=f"{detail}; the CPU set is installed", mend=mend)
    return CheckResult(name="GPUs", status="ok", detail=detail)


def check_capability(listed: str) -> CheckResult:
    """Whether torch and vLLM have kernels for every GPU. listed: lines `name, memory, compute capability`."""
    name = "compute capability"
    found = [tuple(map(int, field.split("."))) for field in re.findall(r", *(\d+\.\d+) *$", listed, re.MULTILINE)]
    if not found:
        mend = "Update NVIDIA's driver."
        return CheckResult(name=name, status="fail", detail="nvidia-smi names none", mend=mend)
    least = min(found)
    detail = ", ".join(f"{major}.{minor}" for major, minor in sorted(set(found)))
    if least < LEAST_CAPABILITY:
        needed = ".".join(map(str, LEAST_CAPABILITY))
        mend = f"Leave out GPUs below {needed} (CUDA_VISIBLE_DEVICES): torch for CUDA 13.0 has no kernels for them."
        return CheckResult(name=name, status="fail", detail=detail, mend=mend)
    if least < BFLOAT16_CAPABILITY:
        mend = "Set rollout.dtype and learner.dtype to float32: below 8.0 there is no bfloat16."
        return CheckResult(name=name, status="remark", detail=detail, mend=mend)
    return CheckResult(name=name, status="ok", detail=detail)


def check_driver(shown: str, *, needed: str | None) -> CheckResult:
    """Whether the driver runs what torch was built for. shown: the output of nvidia-smi without arguments."""
    name = "driver"
    version = re.search(r"Driver Version *: *([\d.]+)", shown, re.IGNORECASE)
    driver = version[1] if version else "unknown"
    if needed is None:
        mend = "Run `make clean setup EXTRA=gpu`; in this environment torch sees no GPU."
        return CheckResult(name=name, status="fail", detail=f"{driver}, beside a CPU build of torch", mend=mend)
    # Newer drivers print "CUDA UMD Version".
    offered = re.search(r"CUDA (?:\w+ )?Version *: *(\d+)\.(\d+)", shown, re.IGNORECASE)
    if offered is None:
        detail = f"{driver}, which names no CUDA version: libcuda.so.1 is missing"
        return CheckResult(name=name, status="fail", detail=detail, mend=DRIVER_MEND)
    has, wants = (int(offered[1]), int(offered[2])), tuple(map(int, needed.split(".")))
    detail = f"{driver}, for CUDA {has[0]}.{has[1]}; torch is built for {needed}"
    if has[0] < wants[0]:
        mend = f"Update NVIDIA's driver to one for CUDA {needed} or later."
        return CheckResult(name=name, status="fail", detail=detail, mend=mend)
    if has < wants:
        mend = f"Update the driver to one for CUDA {needed} if a kernel fails to load: an older one runs most of them."
        return CheckResult(name=name, status="remark", detail=detail, mend=mend)
    return CheckResult(name=name, status="ok", detail=detail)


def default_interface(routes: str) -> str | None:
    """The network interface of the default route of least metric; None without one. routes: text of /proc/net/route."""
    rows = [line.split() for line in routes.splitlines()[1:]]
    # Columns: interface, destination, gateway, flags, two counters, metric, mask, …
    defaults = [(int(row[6]), row[0]) for row in rows if len(row) > 7 and row[1] == row[7] == "00000000"]
    return min(defaults)[1] if defaults else None


def chosen_interfaces(value: str, interfaces: Collection[str]) -> list[str]:
    """The interfaces that a value of NCCL_SOCKET_IFNAME lets NCCL use: prefixes separated by commas, whole names after
    `=`, all others after `^` (NCCL's manual, environment variables)."""
    others, whole = value.startswith("^"), value.lstrip("^").startswith("=")
    names = [name for name in value.lstrip("^=").split(",") if name]
    named = [each for each in interfaces if any(each == name if whole else each.startswith(name) for name in names)]
    return [each for each in interfaces if (each in named) != others]


def check_network(
    routes: str,
    interfaces: Collection[str],
    *,
    environment: Mapping[str, str],
    exported: Mapping[str, str],
    several_nodes: bool,
) -> CheckResult:
    """The interface through which the learner's ranks of several nodes meet.

    interfaces: names of this machine's. environment: the learner's, of the configuration. exported: this process's.
    """
    default = default_interface(routes)
    advised = ", ".join(f"{name}: {default or 'NAME'}" for name in SOCKETS)
    for name in SOCKETS:
        value = environment.get(name, "")
        # Gloo takes whole names only.
        if value and not chosen_interfaces(value if name.startswith("NCCL") else f"={value}", interfaces):
            detail = f"learner.environment has {name}={value}; here are {', '.join(sorted(interfaces))}"
            mend = f"Set learner.environment to {{{advised}}}, with an interface that every node has."
            return CheckResult(name="network", status="fail", detail=detail, mend=mend)
    unheard = [name for name in SOCKETS if name in exported and name not in environment]
    if unheard:
        detail = f"{' and '.join(unheard)} is exported here, which actors of a running cluster do not inherit"
        mend = f"Set learner.environment to {{{', '.join(f'{name}: {exported[name]}' for name in unheard)}}}."
        return CheckResult(name="network", status="remark", detail=detail, mend=mend)
    detail = f"the default route is through {default}" if default else "there is no default route"
    if several_nodes and not all(environment.get(name) for name in SOCKETS):
        mend = (
            f"Set learner.environment to {{{advised}}}: NCCL may else take an interface that other nodes cannot reach."
        )
        detail = f"{detail}; the learner's ranks need several nodes"
        return CheckResult(name="network", status="remark", detail=detail, mend=mend)
    return CheckResult(name="network", status="ok", detail=detail)
