"""Placement of a run's actors: arithmetic apart from Ray, so that a table can test it.

a role's configuration ──bundles──► one Bundle an actor ──shortage(nodes)──► what is missing, in words
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from umrg.config import ActorConfig


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """The resources of one actor."""

    role: str
    """rollout, segmenter or learner."""
    index: int
    """Its number within the role."""
    cpus: float
    gpus: float

    @property
    def name(self) -> str:
        return f"{self.role} {self.index}"

    @property
    def resources(self) -> dict[str, float]:
        """For Ray's placement groups, which refuse amounts of 0 and empty bundles."""
        wanted = {"CPU": self.cpus, "GPU": self.gpus}
        return {name: amount for name, amount in wanted.items() if amount > 0} or {"CPU": 0.001}


@dataclass(frozen=True, kw_only=True)
class Node:
    """The resources of a machine of the cluster."""

    cpus: float
    gpus: float


def bundles(role: str, count: int, each: ActorConfig) -> list[Bundle]:
    """The bundles of all actors of a role."""
    return [Bundle(role=role, index=i, cpus=each.num_cpus, gpus=each.num_gpus) for i in range(count)]


_ROUNDING = 1e-6
"""Shares of a GPU that are written as decimals add up to a little more or less than 1."""


@dataclass
class _Room:
    """What is left of a node."""

    cpus: float
    gpus: list[float]
    """Of each GPU."""

    def chosen(self, bundle: Bundle) -> list[int] | None:
        """Indices of the GPUs that it would get, None where it does not fit. Ray gives a share of one GPU, that with
        the least left, or whole ones."""
        if bundle.cpus > self.cpus + _ROUNDING:
            return None
        count, share = (1, bundle.gpus) if 0 < bundle.gpus < 1 else (round(bundle.gpus), 1.0)
        fitting = [i for i in range(len(self.gpus)) if self.gpus[i] + _ROUNDING >= share]
        return sorted(fitting, key=lambda i: self.gpus[i])[:count] if len(fitting) >= count else None

    def take(self, bundle: Bundle) -> list[int]:
        """Place a bundle that fits, and return `chosen`."""
        chosen = self.chosen(bundle)
        assert chosen is not None
        self.cpus -= bundle.cpus
        for i in chosen:
            self.gpus[i] -= min(1.0, bundle.gpus)
        return chosen


def largest_first(wanted: Sequence[Bundle]) -> list[Bundle]:
    """The order in which bundles are placed. Ray places those of a group as they come; small shares that come first
    gather on one GPU, and the larger ones then lack it."""
    return sorted(wanted, key=lambda bundle: (bundle.gpus, bundle.cpus), reverse=True)


def shortage(wanted: Sequence[Bundle], nodes: Sequence[Node]) -> str | None:
    """What the cluster lacks to hold all bundles at once, in a sentence with what is needed and what there is; None if
    they fit. A bundle must fit on one node, and a share of a GPU on one GPU. The largest bundles are placed first, each
    on the node with least left."""
    need_cpus, need_gpus = sum(b.cpus for b in wanted), sum(b.gpus for b in wanted)
    have_cpus, have_gpus = sum(n.cpus for n in nodes), sum(n.gpus for n in nodes)
    rooms = [_Room(cpus=node.cpus, gpus=[1.0] * int(node.gpus)) for node in nodes]
    for bundle in largest_first(wanted):
        fitting = [room for room in rooms if room.chosen(bundle) is not None]
        if not fitting:
            return (
                f"{len(wanted)} actors need {need_cpus:g} CPUs and {need_gpus:g} GPUs, the cluster has {have_cpus:g} "
                f"and {have_gpus:g} on {len(nodes)} node{'s' if len(nodes) != 1 else ''}; there is no room for "
                f"{bundle.name} ({_described(bundle)})"
            )
        min(fitting, key=lambda room: (sum(room.gpus), room.cpus)).take(bundle)
    return None


def _described(bundle: Bundle) -> str:
    if 0 < bundle.gpus < 1:
        return f"{bundle.cpus:g} CPUs, {bundle.gpus:g} of one GPU"
    return f"{bundle.cpus:g} CPUs, {bundle.gpus:g} GPUs on one node"


def gpus_taken(wanted: Sequence[Bundle]) -> dict[str, list[int]]:
    """Indices of each actor's GPUs, by its name, on one node that has as many as are needed."""
    room = _Room(cpus=math.inf, gpus=[1.0] * sum(math.ceil(bundle.gpus) for bundle in wanted))
    return {bundle.name: room.take(bundle) for bundle in largest_first(wanted)}


def alone(role: str, wanted: Sequence[Bundle]) -> int:
    """How many GPUs hold actors of this role and no others."""
    taken = gpus_taken(wanted)
    ours, others = (
        {i for bundle in wanted if (bundle.role == role) is own for i in taken[bundle.name]} for own in (True, False)
    )
    return len(ours - others)


def turns(wanted: Sequence[Bundle]) -> list[list[str]]:
    """Names of the actors that start together, in the order of their turns. vLLM measures its GPU's memory while it
    starts, and another process that fills it meanwhile spoils that. So engines that have a part of a GPU start before
    all others, and where two fit on one GPU, one after another."""
    engines = [bundle.name for bundle in wanted if bundle.role == "rollout" and 0 < bundle.gpus < 1]
    others = [bundle.name for bundle in wanted if bundle.name not in engines]
    if any(bundle.gpus <= 0.5 for bundle in wanted if bundle.name in engines):
        return [*([name] for name in engines), others]
    return [engines, others] if engines else [others]
