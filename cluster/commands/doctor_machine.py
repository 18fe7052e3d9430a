"""The doctor's checks of the machine itself: cores, memory, shared memory and disk."""

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster.commands.doctor_result import GIB, CheckResult, check_amount

SHARED = Path("/dev/shm")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a machine has, in bytes."""

    memory: int
    """That is free, within its container's limit."""
    shared: int
    """Size of /dev/shm."""
    disk: int
    """Free on the disk of the runs."""


def this_machine(runs: Path) -> Machine:
    """This machine. runs: folder of all runs, which need not be there yet."""
    folder = next(each for each in (runs.absolute(), *runs.absolute().parents) if each.exists())
    free = min(psutil.virtual_memory().available, memory_limit())
    return Machine(memory=free, shared=_size_of_shared(), disk=shutil.disk_usage(folder).free)


def memory_limit() -> int:
    """Bytes of memory this process may use: the machine's, or its container's (cgroup v2) if less."""
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    total: int = psutil.virtual_memory().total
    return min(total, int(text)) if text.isdigit() else total


def check_machine() -> list[CheckResult]:
    """Cores, memory, shared memory and disk of this machine."""
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
            _size_of_shared() / GIB,
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


def _size_of_shared() -> int:
    return shutil.disk_usage(SHARED).total if SHARED.exists() else 0
