"""How many cores an actor computes on."""

import os

import torch


def share_cores(threads: int | None, actors: int) -> None:
    """Let this process, and those that it starts, compute with so many threads; with None, with an equal share of this
    machine's cores for each of `actors`. Ray would give as many as the actor's num_cpus, one by default."""
    count = threads or max(1, len(os.sched_getaffinity(0)) // actors)
    os.environ["OMP_NUM_THREADS"] = str(count)
    torch.set_num_threads(count)
