"""`medreasoner memory`: what each role of a configuration needs of its GPU, before there is one."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from actors.gpus import Gpu, Place
from cluster.config import EvaluateConfig, SftConfig, TrainConfig, load_config, schema_of
from cluster.fetching import fetched
from cluster.memory import (
    GIB,
    GpuNeed,
    Idle,
    Tenant,
    learner_need,
    overfull,
    parking,
    resting_need,
    rollout_need,
    segmenter_need,
    sleeping_need,
    summary,
    tenant,
)
from cluster.placement import Bundle, bundles, gpus_taken
from umrg.mistake import Mistake


class Role(NamedTuple):
    """The actors of a role, which are alike."""

    bundles: list[Bundle]
    need: GpuNeed
    idle: Idle | None = None
    """What each needs while the other of its pair works; None for one that takes no turns."""


Roles = Sequence[Role]

_UNBOUNDED = 1 << 62  # bytes: how much memory the nodes will have is not known


def roles(config: TrainConfig | SftConfig | EvaluateConfig) -> Roles:
    """The actors of each role, and what they need, in the order in which a run starts them. Of the model's folder,
    config.json alone is read."""
    found: list[Role] = []
    if isinstance(config, TrainConfig | SftConfig):
        learner = config.learner
        need = learner_need(config.model, learner, config.image_tokens)
        resting = resting_need(config.model, learner, config.image_tokens) if config.colocated else None
        found.append(Role(bundles("learner", learner.ranks, learner), need, resting))
    if isinstance(config, TrainConfig | EvaluateConfig):
        if config.model is not None:
            rollout = config.engines
            sleeping = sleeping_need(rollout) if rollout.sleeps else None
            found.append(
                Role(bundles("rollout", rollout.actors, rollout), rollout_need(config.model, rollout), sleeping)
            )
        segmenter = config.segmenter
        found.append(Role(bundles("segmenter", segmenter.actors, segmenter), segmenter_need(config.expert, segmenter)))
    return found


def tenants(config: TrainConfig | SftConfig | EvaluateConfig, gpu: int) -> list[Tenant]:
    """The actors of a run that have GPUs, as `tenants_of`."""
    return tenants_of(roles(config), gpu)


def tenants_of(found: Roles, gpu: int) -> list[Tenant]:
    """The actors that have GPUs, on as many GPUs of so many bytes as they ask for, placed as Ray places them."""
    needs = [(bundle, role.need, role.idle) for role in found for bundle in role.bundles]
    taken = gpus_taken([bundle for bundle, _, _ in needs], colocated=any(role.idle for role in found))
    return [
        tenant(
            bundle.name,
            need,
            Place(node="", memory=_UNBOUNDED, gpus=tuple(_gpu(i, gpu) for i in taken[bundle.name])),
            idle,
        )
        for bundle, need, idle in needs
        if bundle.gpus > 0
    ]


def print_memory(path: Path, overrides: Sequence[str], gib: float, console: Console) -> int:
    """Print the estimate for a configuration file, as `print_estimate`. Raises ValueError if its model has no
    config.json."""
    config = fetched(load_config(schema_of(path), path, overrides))
    if config.model is not None and not (config.model / "config.json").is_file():
        raise Mistake(
            f"{config.model / 'config.json'} is not there, from which the estimate is made; download that file, "
            "without any weights, or give model=…"
        )
    return print_estimate(roles(config), gib, console)


def print_estimate(of: Roles, gib: float, console: Console) -> int:
    """Print the estimate and its verdict. Returns the exit code, 1 if something cannot fit."""
    found = tenants_of(of, int(gib * GIB))
    if not found:
        console.print("no role has a GPU (num_gpus), so there is nothing to fit")
        return 0
    count = len({gpu.uuid for each in found for gpu in each.place.gpus})
    console.print(_table(found, f"estimated GiB of each actor, on {count} GPUs of {gib:g} GiB"))
    for line in summary(found):
        console.print(line, soft_wrap=True)
    if any(role.idle for role in of):
        console.print(f"learner: {parking(found)[1]}", soft_wrap=True)
    fault = overfull(found)
    console.print(f"does not fit: {fault}" if fault else "fits, as far as can be estimated", soft_wrap=True)
    return int(fault is not None)


def _table(found: Sequence[Tenant], title: str) -> Table:
    """One row a role: its actors are alike."""
    of_role: dict[str, list[Tenant]] = {}
    for each in found:
        of_role.setdefault(each.name.split()[0], []).append(each)
    parts = list(dict.fromkeys(name for each in found for name in each.need.parts))
    table = Table("role", "actors", *parts, "sum", "host", title=title)
    for role, alike in of_role.items():
        need = alike[0].need
        sizes = [*(need.parts.get(name, 0) for name in parts), need.total, sum(need.host.values())]
        table.add_row(role, str(len(alike)), *(f"{size / GIB:.1f}" if size else "" for size in sizes))
    return table


def _gpu(index: int, memory: int) -> Gpu:
    return Gpu(name="GPU", uuid=str(index), memory=memory)
