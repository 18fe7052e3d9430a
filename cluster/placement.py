"""Where a run's actors sit: arithmetic apart from Ray, so that a table can test it.

TrainConfig ──bundles──► one Bundle an actor ──shortage(nodes)──► what is missing, in words
"""

from collections.abc import Sequence
from dataclasses import dataclass

from actors.config import RolloutConfig, SegmenterConfig
from cluster.config import EvaluateConfig, SftConfig, TrainConfig
from learner.config import ZeroConfig


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """What one actor takes. role: rollout, segmenter or learner. index: which of its role."""

    role: str
    index: int
    cpus: float
    gpus: float

    @property
    def name(self) -> str:
        return f"{self.role} {self.index}"

    @property
    def resources(self) -> dict[str, float]:
        """As Ray's placement groups want it: nothing that is 0, and not nothing at all."""
        wanted = {"CPU": self.cpus, "GPU": self.gpus}
        return {name: amount for name, amount in wanted.items() if amount > 0} or {"CPU": 0.001}


@dataclass(frozen=True, kw_only=True)
class Node:
    """What a machine of the cluster has, or has left."""

    cpus: float
    gpus: float


def bundles(config: TrainConfig | EvaluateConfig | SftConfig) -> list[Bundle]:
    """One bundle an actor: the learner's ranks, the hardest to place, then rollouts, then segmenters."""
    found = [] if isinstance(config, EvaluateConfig) else _bundles("learner", config.learner.ranks, config.learner)
    if isinstance(config, SftConfig):
        return found
    return [
        *found,
        *_bundles("rollout", config.rollout.actors, config.rollout),
        *_bundles("segmenter", config.segmenter.actors, config.segmenter),
    ]


def _bundles(role: str, count: int, part: ZeroConfig | RolloutConfig | SegmenterConfig) -> list[Bundle]:
    return [Bundle(role=role, index=i, cpus=part.num_cpus, gpus=part.num_gpus) for i in range(count)]


def shortage(wanted: Sequence[Bundle], nodes: Sequence[Node]) -> str | None:
    """What the cluster lacks for all bundles at once, in a sentence that says what is needed and what there is; None
    where they fit. A bundle must fit on one node; the largest are placed first, each where least is left."""
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
