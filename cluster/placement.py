"""Placement of a run's actors: arithmetic apart from Ray, so that a table can test it.

                                          ┌─core──► slots of one placement group, without which a run cannot begin
a role's configuration ──bundles──► one Bundle an actor
                                          └─waves─► actors of their own, which may come later
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from umrg.config import ActorConfig

_ROUNDING = 1e-6
"""Shares of a GPU that are written as decimals add up to a little more or less than 1."""


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """The resources of one actor."""

    role: str
    """rollout, segmenter or learner."""
    index: int
    """Its number within the role."""
    cpus: float
    gpus: float
    labels: Mapping[str, str] = field(default_factory=dict)
    """That its node must have, as Ray's label selectors."""

    @property
    def name(self) -> str:
        return f"{self.role} {self.index}"

    @property
    def shares_a_gpu(self) -> bool:
        return 0 < self.gpus < 1


@dataclass(frozen=True, kw_only=True)
class Slot:
    """A bundle of the placement group: what actors that share it take together, on one node."""

    together: tuple[Bundle, ...]

    @property
    def names(self) -> list[str]:
        return [bundle.name for bundle in self.together]

    @property
    def whole(self) -> Bundle:
        """As if it were one actor's."""
        first = self.together[0]
        cpus, gpus = sum(each.cpus for each in self.together), sum(each.gpus for each in self.together)
        labels = {name: value for each in self.together for name, value in each.labels.items()}
        return Bundle(role=first.role, index=first.index, cpus=cpus, gpus=gpus, labels=labels)

    @property
    def resources(self) -> dict[str, float]:
        """For Ray's placement groups, which refuse amounts of 0 and empty bundles."""
        wanted = {"CPU": self.whole.cpus, "GPU": self.whole.gpus}
        return {name: amount for name, amount in wanted.items() if amount > 0} or {"CPU": 0.001}


@dataclass(frozen=True, kw_only=True)
class Node:
    """The resources of a machine of the cluster."""

    cpus: float
    gpus: float


def bundles(role: str, count: int, each: ActorConfig) -> list[Bundle]:
    """The bundles of all actors of a role."""
    return [
        Bundle(role=role, index=i, cpus=each.num_cpus, gpus=each.num_gpus, labels=each.node_labels)
        for i in range(count)
    ]


def pairs(listed: Sequence[Bundle]) -> list[Slot]:
    """Of a colocated run: a slot for each rank and the engine of the same index, in which Ray gives both one GPU. A
    bundle of at most one GPU is of one GPU, and actors are given shares of the bundle's own."""
    engines = {bundle.index: bundle for bundle in listed if bundle.role == "rollout"}
    ranks = [bundle for bundle in listed if bundle.role == "learner"]
    return [Slot(together=(rank, engines[rank.index])) for rank in ranks]


def joined(listed: Sequence[Bundle], *, colocated: bool = False) -> list[Bundle]:
    """Bundles that are placed one by one: of a colocated run, those of each pair are one."""
    if not colocated:
        return list(listed)
    return [
        *(pair.whole for pair in pairs(listed)),
        *(bundle for bundle in listed if bundle.role not in ("learner", "rollout")),
    ]


def core(
    listed: Sequence[Bundle],
    nodes: Sequence[Node],
    *,
    asked: int | None = None,
    spread: bool = False,
    colocated: bool = False,
) -> list[Slot]:
    """What a run cannot begin without and must have together, the largest first: a slot for the ranks of each of the
    learner's nodes, and one each for the first rollout and the first segmenter; one that has a share of a GPU asks
    later (`waves`) where others take whole ones. Of a colocated run: its `pairs`, and the first segmenter. asked: nodes
    for the ranks; None for the fewest of those that are there or, with `spread`, one each."""
    if colocated:
        slots, paired = pairs(listed), {"learner", "rollout"}
    else:
        ranks = [bundle for bundle in listed if bundle.role == "learner"]
        each = len(ranks) // (asked or (len(ranks) if spread else _fewest(ranks, nodes))) if ranks else 1
        slots = [Slot(together=tuple(ranks[i : i + each])) for i in range(0, len(ranks), each)]
        paired = {"learner"}
    others = [bundle for bundle in listed if bundle.role not in paired]
    first = [bundle for bundle in others if bundle.index == 0]
    if any(bundle.gpus >= 1 for bundle in others if bundle.index > 0):
        # Ray packs a group by itself, and a share in it may break a GPU that one outside needs whole.
        first = [bundle for bundle in first if not bundle.shares_a_gpu]
    slots += [Slot(together=(bundle,)) for bundle in first]
    return sorted(slots, key=lambda slot: _size(slot.whole), reverse=True)


def _fewest(ranks: Sequence[Bundle], nodes: Sequence[Node]) -> int:
    """Nodes over which ranks can be spread, as many on each. Where no node holds a single one, a cluster may yet start
    nodes that do: they are asked for together. Ray's bundles hold no parts of GPUs beside whole ones."""
    if ranks[0].shares_a_gpu:
        return len(ranks)
    holds = max((_ranks_on(node, ranks[0]) for node in nodes), default=0) or len(ranks)
    return next(count for count in range(1, len(ranks) + 1) if len(ranks) % count == 0 and len(ranks) // count <= holds)


def _ranks_on(node: Node, rank: Bundle) -> int:
    parts = [(node.cpus, rank.cpus), (node.gpus, rank.gpus)]
    return min((math.floor(there / each + _ROUNDING) for there, each in parts if each), default=1 << 20)


def waves(listed: Sequence[Bundle]) -> list[list[Bundle]]:
    """The order in which actors ask for room: first those that take whole GPUs, or none, and then those that share
    one, the largest shares first. A small share that came before would break a GPU that another needs whole."""
    shares = sorted({bundle.gpus for bundle in listed if bundle.shares_a_gpu}, reverse=True)
    found = [[each for each in listed if not each.shares_a_gpu]]
    found += [[each for each in listed if each.gpus == share] for share in shares]
    return [wave for wave in found if wave]


def beside(share: float, taken: Mapping[tuple[str, str], float]) -> str | None:
    """The node for an actor that takes a share of a GPU: that of the fullest one, of those that are shared out, with
    room for it. None if there is none. taken: what is taken of each shared GPU, by its node and its id."""
    fitting = {place: used for place, used in taken.items() if used + share <= 1 + _ROUNDING}
    return max(fitting, key=lambda place: fitting[place])[0] if fitting else None


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
        count, share = (1, bundle.gpus) if bundle.shares_a_gpu else (round(bundle.gpus), 1.0)
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
    return sorted(wanted, key=_size, reverse=True)


def _size(bundle: Bundle) -> tuple[float, float]:
    return bundle.gpus, bundle.cpus


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
                f"{bundle.name} ({described(bundle)})"
            )
        min(fitting, key=lambda room: (sum(room.gpus), room.cpus)).take(bundle)
    return None


def described(bundle: Bundle) -> str:
    """What it takes, in words."""
    labels = "".join(f", {name}={value}" for name, value in bundle.labels.items())
    if bundle.shares_a_gpu:
        return f"{bundle.cpus:g} CPUs, {bundle.gpus:g} of one GPU{labels}"
    return f"{bundle.cpus:g} CPUs, {bundle.gpus:g} GPUs on one node{labels}"


def gpus_taken(wanted: Sequence[Bundle], *, colocated: bool = False) -> dict[str, list[int]]:
    """Indices of each actor's GPUs, by its name, on one node that has as many as are needed."""
    room = _Room(cpus=math.inf, gpus=[1.0] * sum(math.ceil(bundle.gpus) for bundle in wanted))
    taken = {bundle.name: room.take(bundle) for bundle in largest_first(joined(wanted, colocated=colocated))}
    of_pairs = pairs(wanted) if colocated else []
    return taken | {name: taken[pair.whole.name] for pair in of_pairs for name in pair.names}


def alone(role: str, wanted: Sequence[Bundle], *, colocated: bool = False) -> int:
    """How many GPUs hold actors of this role and no others."""
    taken = gpus_taken(wanted, colocated=colocated)
    ours, others = (
        {i for bundle in wanted if (bundle.role == role) is own for i in taken[bundle.name]} for own in (True, False)
    )
    return len(ours - others)


def turns(wanted: Sequence[Bundle], *, colocated: bool = False) -> list[list[str]]:
    """Names of the actors that start together, in the order of their turns. vLLM measures its GPU's memory while it
    starts, and another process that fills it meanwhile spoils that. So engines that have a part of a GPU start before
    all others, and where two fit on one GPU, one after another. In a colocated run engines always start before ranks,
    beside which they sleep then, and together, as each has a GPU of its own."""
    engines = [bundle.name for bundle in wanted if bundle.role == "rollout" and (bundle.shares_a_gpu or colocated)]
    others = [bundle.name for bundle in wanted if bundle.name not in engines]
    if not colocated and any(bundle.gpus <= 0.5 for bundle in wanted if bundle.name in engines):
        return [*([name] for name in engines), others]
    return [engines, others] if engines else [others]
