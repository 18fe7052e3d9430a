"""The doctor with a configuration: what the run needs of this machine's shared memory, memory and disk.

What it needs of GPUs is estimated by `medreasoner memory` and when a run starts.
"""

from dataclasses import dataclass
from math import prod
from pathlib import Path

from cluster.commands.doctor_machine import Machine
from cluster.commands.doctor_result import GIB, CheckResult, check_amount
from cluster.config import EvaluateConfig, SftConfig, TrainConfig
from umrg.reasoner_folder import check_reasoner_folder
from umrg.safetensors_header import read_header

JobConfig = TrainConfig | SftConfig | EvaluateConfig

BUCKET = GIB
"""Largest piece in which weights travel (`learner.zero.BUCKET_BYTES`); each engine has one in memory at a time."""
PROCESS = 3 * GIB
"""Memory of an actor's processes themselves, with CUDA's libraries; assumed, not measured."""
ROOM = 1.25
"""Free space advised above what is needed, as a factor."""

STORE_SHARE, SHARED_SHARE = 0.3, 0.95
"""Ray's object store takes this share of the free memory, and at most that share of /dev/shm."""
STORE_LIMIT, SLOW_STORE = 200 * 10**9, 10**10
"""Ray's largest object store, and the largest that it lays on disk where /dev/shm is smaller; in bytes."""


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What a run needs of a machine that all its actors are on, in bytes."""

    weights: int
    """One version of the weights, which lies in the object store until every engine has it; 0 without a learner."""
    shared: int
    """In /dev/shm, where the object store is."""
    memory: int
    """In host memory, for copies of weights and optimizer state, those in the object store included."""
    processes: int
    """In host memory besides, for the actors' processes."""
    disk: int
    """For checkpoints."""


def parameters(model: Path) -> int:
    """How many numbers the weights of a model folder are. Raises ValueError if they cannot be loaded."""
    check_reasoner_folder(model)
    headers = [read_header(file) for file in sorted(model.glob("*.safetensors"))]
    return sum(prod(shape) for header in headers for shape in header.shapes.values())


def demand(config: JobConfig, count: int) -> Demand:
    """Of a run with a model of so many parameters."""
    if isinstance(config, EvaluateConfig):
        return Demand(weights=0, shared=0, memory=0, processes=_sampling_actors(config) * PROCESS, disk=0)
    learner = config.learner
    weights = count * (2 if learner.dtype == "bfloat16" else 4)
    # Masters and two moments in float32; adapters are too small to count.
    state = 0 if learner.lora else 12 * count
    # What a checkpoint is written from, and gradients and a staging copy of what is offloaded.
    host = state + weights + (18 * count if learner.offload != "none" and not learner.lora else 0)
    if isinstance(config, SftConfig):
        # The newest, the best, and one more that is written before an older one goes.
        kept = config.keep + 2
        return Demand(
            weights=0, shared=0, memory=host, processes=learner.ranks * PROCESS, disk=kept * (state + weights)
        )
    objective = config.learner.objective
    if objective.kl > 0 and learner.lora is None and config.learner.reference_kind == "parked":
        # Page-locked memory is given in powers of two for each tensor, at the worst twice as much.
        host += learner.ranks * weights * (2 if learner.num_gpus > 0 else 1)
    if config.colocated and learner.num_gpus > 0 and learner.offload == "none":
        host += state  # where the GPU does not hold it beside an engine
    return Demand(
        weights=weights,
        shared=weights,
        memory=host + weights + min(BUCKET, weights) * config.rollout.actors,
        processes=(_sampling_actors(config) + learner.ranks) * PROCESS,
        disk=(config.keep + config.keep_best + 1) * (state + weights),
    )


def _sampling_actors(config: TrainConfig | EvaluateConfig) -> int:
    return config.rollout.actors + config.segmenter.actors


def object_store(machine: Machine) -> int:
    """Size of the object store that Ray makes by itself (`resolve_object_store_memory` in ray._private.utils)."""
    limit = min(STORE_LIMIT, max(SLOW_STORE, int(SHARED_SHARE * machine.shared)))
    return min(int(STORE_SHARE * machine.memory), limit)


def check_demand(config: JobConfig, machine: Machine) -> list[CheckResult]:
    """Whether the run fits on this machine, if all its actors are here."""
    if config.model is None:
        return []
    try:
        count = parameters(config.model)
    except ValueError as error:
        mend = "Download the model, or correct `model` in the configuration."
        return [CheckResult(name="model", status="fail", detail=str(error), mend=mend)]
    wanted = demand(config, count)
    found = CheckResult(name="model", status="ok", detail=f"{config.model}, {count:,} parameters")
    results = [_check_memory(wanted, machine)]
    if wanted.weights:
        results += [_check_store(wanted, machine), _check_shared(wanted, machine)]
    if wanted.disk:
        results.append(_check_disk(wanted, machine, config.runs))
    return [found, *results]


def _check_memory(wanted: Demand, machine: Machine) -> CheckResult:
    mend = (
        "Free memory or spread the actors over more nodes: what a checkpoint is written from, and a reference model, "
        "are kept in host memory."
    )
    return _amount("memory", machine.memory, wanted.memory, wanted.memory + wanted.processes, mend)


def _check_store(wanted: Demand, machine: Machine) -> CheckResult:
    mend = (
        "Free memory and enlarge /dev/shm, or start Ray with a larger object store (ray start --head "
        "--object-store-memory=BYTES, then RAY_ADDRESS=auto): weights that it cannot hold go through the disk."
    )
    return _amount("object store", object_store(machine), wanted.weights, ROOM * wanted.weights, mend)


def _check_shared(wanted: Demand, machine: Machine) -> CheckResult:
    advised = ROOM * wanted.shared
    mend = f"Enlarge /dev/shm (docker: --shm-size={advised / GIB + 1:.0f}g): Ray's object store is there."
    return _amount("shared memory", machine.shared, wanted.shared, advised, mend)


def _check_disk(wanted: Demand, machine: Machine, runs: Path) -> CheckResult:
    mend = f"Free space on the disk of {runs}, or keep fewer checkpoints (keep, keep_best)."
    return _amount("disk", machine.disk, wanted.disk, ROOM * wanted.disk, mend)


def _amount(name: str, has: float, need: float, wish: float, mend: str) -> CheckResult:
    unit = f"GiB, {need / GIB:.3g} needed"
    return check_amount(f"{name}, this run", has / GIB, need=need / GIB, wish=wish / GIB, unit=unit, mend=mend)
