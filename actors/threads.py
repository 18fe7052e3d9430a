"""How many threads an actor computes with."""

import os

import torch


def share_cores(threads: int | None, actors: int) -> None:
    """Let this process and its children compute with `threads` threads or, if None, with an equal share of this
    machine's cores for each of `actors`. Ray would set OMP_NUM_THREADS to the actor's num_cpus, one by default."""
    count = threads or max(1, len(os.sched_getaffinity(0)) // actors)
    os.environ["OMP_NUM_THREADS"] = str(count)
    torch.set_num_threads(count)
