"""How many threads an actor computes with."""

import math
import os
from pathlib import Path

import torch


def share_cores(threads: int | None, sharers: int) -> None:
    """Let this process and its children compute with `threads` threads or, if None, with an equal share of the cores
    for each of `sharers` on this machine. Ray would set OMP_NUM_THREADS to the actor's num_cpus, one by default."""
    count = threads or max(1, math.floor(cores()) // sharers)
    os.environ["OMP_NUM_THREADS"] = str(count)
    torch.set_num_threads(count)


def cores(process: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")) -> float:
    """The cores that this process may use: those that it is bound to, or less where its cgroup, or one that this lies
    in, has a quota of processor time, as containers have. process, mounted: where Linux tells of them."""
    bound = float(len(os.sched_getaffinity(0)))
    return max(1.0, min([bound, *_quotas(process, mounted)]))


def _quotas(process: Path, mounted: Path) -> list[float]:
    """Of the cgroup and of all that it lies in, in cores. cgroup v2 has `quota period` in cpu.max, v1 two files."""
    found = []
    for line in process.read_text().splitlines() if process.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = mounted / controllers if controllers else mounted
        # In a container the path may be that of the host; the container's own cgroup is then the root.
        here = root / path.lstrip("/")
        for folder in [here, *here.parents] if here.exists() else [root]:
            found += _quota(folder)
            if folder == root:
                break
    return found


def _quota(folder: Path) -> list[float]:
    files = [folder / "cpu.max"], [folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us"]
    for each in files:
        if all(file.exists() for file in each):
            quota, period = " ".join(file.read_text() for file in each).split()
            return [] if quota in ("max", "-1") else [int(quota) / int(period)]
    return []
