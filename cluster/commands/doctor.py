"""`medreasoner doctor`: whether this machine is ready and, where it is not, how to fix it.

Versions are compared with the tested set under `constraints/`. The heavy libraries are tried by
`cluster.commands.doctor_probes`, each in a process of its own with a deadline, so that a crash or a hang is reported
instead of ending the doctor. With a configuration, the machine is compared with what that run needs.
"""

import json
import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import psutil
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.commands.doctor_demand import JobConfig, check_demand
from cluster.commands.doctor_gpu import (
    DRIVER_MEND,
    check_network,
    count_gpus,
    cuda_of_torch,
    gpu_results,
    list_gpus,
    nvidia_smi,
    pinned_cuda,
)
from cluster.commands.doctor_machine import check_machine, this_machine
from cluster.commands.doctor_probes import PROBES, RESULT
from cluster.commands.doctor_result import CheckResult
from cluster.commands.doctor_versions import (
    REINSTALL,
    check_python,
    check_versions,
    installed_versions,
    read_constraints,
)
from cluster.config import EvaluateConfig, SftConfig
from cluster.fetching import fetched

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 300.0
AUDIO_MEND = (
    "Uninstall torchaudio or torchcodec if the message names it (a CUDA build of either breaks this import "
    "beside CPU torch); otherwise run `make clean setup`."
)
PROBE_MENDS = {
    "transformers": AUDIO_MEND,
    "torchvision": "Run `python -m cluster.commands.torchvision_shim`, which makes a CUDA build of torchvision import "
    "beside CPU torch; if it still fails, run `make clean setup`.",
    "triton": "Install a C compiler and Python's headers (Debian: apt-get install gcc python3-dev), or name a compiler "
    "in CC: Triton compiles at run time.",
    "vllm": AUDIO_MEND,
    "deepspeed": "Unset DS_ACCELERATOR, or set it to cpu on a machine without GPU; if it still fails, run "
    "`make clean setup`.",
    "ray": "Run `ray stop --force` to clear the remains of an earlier cluster, free /tmp and memory, and see "
    "/tmp/ray/session_latest/logs for the cause.",
}
DEADLINE_MEND = "Stop other heavy work on this machine and run the doctor again."


def cause_of_death(output: str, exit_code: int) -> str:
    """The line of `output` that names the exception, else its last line, with the exit code or signal."""
    lines = [line for line in output.splitlines() if line.strip()] or ["no output"]
    exceptions = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    ending = f"signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"
    return f"{(exceptions or lines)[-1]} ({ending})"


def run_probe(name: str, command: list[str], *, deadline_s: float) -> CheckResult:
    """Run `command` in a process group of its own, and read the line `RESULT …` that it ends with."""
    what = f"{name} works"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=deadline_s)
        except subprocess.TimeoutExpired:
            detail = f"no answer within {deadline_s:g} s"
            return CheckResult(name=what, status="fail", detail=detail, mend=DEADLINE_MEND)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    printed = [line.removeprefix(RESULT) for line in output.splitlines() if line.startswith(RESULT)]
    if process.returncode == 0 and printed:
        return CheckResult(name=what, status="ok", detail=printed[-1])
    detail = cause_of_death(output, process.returncode)
    mend = DRIVER_MEND if "libcuda" in detail else PROBE_MENDS.get(name, REINSTALL)
    return CheckResult(name=what, status="fail", detail=detail, mend=mend)


def check_library(name: str, command: list[str], *, deadline_s: float) -> list[CheckResult]:
    """The result of one probe, as a list of one."""
    return [run_probe(name, command, deadline_s=deadline_s)]


def check_gpu_machine(*, cuda_set: bool) -> list[CheckResult]:
    """GPUs and driver of this machine. cuda_set: whether the gpu extra is installed."""
    needed = cuda_of_torch() if cuda_set else pinned_cuda(ROOT / "constraints" / "gpu.txt")
    return gpu_results(list_gpus(), nvidia_smi(), cuda_set=cuda_set, needed=needed)


def check_run(config: JobConfig) -> list[CheckResult]:
    """What a run needs of this machine and of its network."""
    config = fetched(config)
    results = check_demand(config, this_machine(config.runs))
    if isinstance(config, EvaluateConfig):
        return results
    here = count_gpus(list_gpus())
    learner = config.learner
    wanted = learner.ranks * learner.num_gpus
    if not isinstance(config, SftConfig):
        wanted += config.rollout.actors * config.rollout.num_gpus + config.segmenter.actors * config.segmenter.num_gpus
    if wanted > here:
        # Of a run on several nodes, each needs a part.
        results = [replace(each, status="remark") if each.status == "fail" else each for each in results]
    routes = Path("/proc/net/route")
    network = check_network(
        routes.read_text() if routes.exists() else "",
        psutil.net_if_addrs().keys(),
        environment=learner.environment,
        exported=os.environ,
        several_nodes=learner.ranks * learner.num_gpus > here,
    )
    return [*results, network]


def checks(
    config: JobConfig | None, deadline_s: float = DEADLINE_S
) -> Iterator[tuple[str, Callable[[], list[CheckResult]]]]:
    """All checks in the order of the report: the name of what is checked, and the function that checks it."""
    installed = installed_versions()
    cuda_set = "vllm" in installed
    constraints = ROOT / "constraints" / ("gpu.txt" if cuda_set else "cpu.txt")
    yield "Python", lambda: [check_python(sys.version_info[:3])]
    if constraints.exists():
        yield "versions", lambda: check_versions(read_constraints(constraints), installed)
    yield "machine", check_machine
    yield "GPUs", lambda: check_gpu_machine(cuda_set=cuda_set)
    if config is not None:
        yield "configuration", lambda: check_run(config)
    for name in PROBES:
        if name == "triton" and not cuda_set:
            continue
        command = [sys.executable, "-m", "cluster.commands.doctor_probes", name]
        yield name, partial(check_library, name, command, deadline_s=deadline_s)


def examine(config: JobConfig | None, console: Console) -> list[CheckResult]:
    """Run every check, and name the current one on `console` (stderr)."""
    results: list[CheckResult] = []
    for what, check in checks(config):
        if not console.is_terminal:
            console.print(f"checking {what} …")
        with console.status(f"checking {what} …") if console.is_terminal else nullcontext():
            results += check()
    return results


def report(results: list[CheckResult]) -> Table:
    """The results as a table: status, name, what was seen and how to fix it."""
    colours = {"ok": "green", "remark": "yellow", "fail": "red"}
    table = Table("", "check", "finding", title=f"medreasoner on {platform.node()} ({platform.machine()})")
    for result in results:
        detail = f"{result.detail}\n→ {result.mend}" if result.mend else result.detail
        table.add_row(f"[{colours[result.status]}]{result.status}[/]", result.name, escape(detail))
    return table


def run_doctor(config: JobConfig | None = None, *, as_json: bool) -> int:
    """Examine this machine, print the results on stdout, and return the exit code: 1 if any check failed. config: of a
    run that is to be made here."""
    results = examine(config, Console(stderr=True))
    if as_json:
        print(json.dumps([asdict(result) for result in results], indent=2))
    else:
        Console().print(report(results))
    return int(any(result.status == "fail" for result in results))
