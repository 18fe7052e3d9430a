"""Placement of a run's actors: arithmetic apart from Ray, so that a table can test it.

a role's configuration ──bundles──► one Bundle an actor ──shortage(nodes)──► what is missing, in words
"""

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


def shortage(wanted: Sequence[Bundle], nodes: Sequence[Node]) -> str | None:
    """What the cluster lacks to hold all bundles at once, in a sentence with what is needed and what there is; None if
    they fit. A bundle must fit on one node. The largest bundles are placed first, each on the node with least left."""
    need_cpus, need_gpus = sum(b.cpus for b in wanted), sum(b.gpus for b in wanted)
    have_cpus, have_gpus = sum(n.cpus for n in nodes), sum(n.gpus for n in nodes)
    left = [(node.cpus, node.gpus) for node in nodes]
    for bundle in sorted(wanted, key=lambda b: (b.gpus, b.cpus), reverse=True):
        fitting = [
            i for i, (cpus, gpus) in enumerate(left) if cpus + 1e-6 >= bundle.cpus and gpus + 1e-6 >= bundle.gpus
        ]
        if not fitting:
            return (
                f"{len(wanted)} actors need {need_cpus:g} CPUs and {need_gpus:g} GPUs, the cluster has {have_cpus:g} "
                f"and {have_gpus:g} on {len(nodes)} node{'s' if len(nodes) != 1 else ''}; there is no room for "
                f"{bundle.name} ({bundle.cpus:g} CPUs, {bundle.gpus:g} GPUs on one node)"
            )
        tightest = min(fitting, key=lambda i: (left[i][1], left[i][0]))
        left[tightest] = (left[tightest][0] - bundle.cpus, left[tightest][1] - bundle.gpus)
    return None


def turns(wanted: Sequence[Bundle]) -> list[list[str]]:
    """Names of the actors that start together, in the order of their turns. vLLM measures its GPU's memory while it
    starts, and another process that fills it meanwhile spoils that. So engines that have a part of a GPU start before
    all others, and where two fit on one GPU, one after another."""
    engines = [bundle.name for bundle in wanted if bundle.role == "rollout" and 0 < bundle.gpus < 1]
    others = [bundle.name for bundle in wanted if bundle.name not in engines]
    if any(bundle.gpus <= 0.5 for bundle in wanted if bundle.name in engines):
        return [*([name] for name in engines), others]
    return [engines, others] if engines else [others]
