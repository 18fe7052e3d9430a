"""Whether the actors of a run fit on their GPUs: estimates joined with what each actor sees, in words.

need of a role × place of an actor ──tenant──► tenants ──overfull──► what does not fit, and what to change
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.config import RolloutConfig, SegmenterConfig
from actors.gpus import Gpu, Place
from learner.config import ZeroConfig

if TYPE_CHECKING:
    from reasoner.footprint import Need

GIB = 1 << 30
TRUST = 0.8
"""Share of what is estimated that counts against a GPU: to refuse what would have fitted is worse than to miss what
does not. What is certain counts in full."""

GpuNeed = Callable[[int], "Need"]
"""What an actor needs of a GPU of so many bytes. Called only where there is one: counting imports torch and
transformers."""


def learner_need(model: Path | Any, config: ZeroConfig, image_tokens: int) -> GpuNeed:
    """Of a rank. model: a folder, or a transformers configuration. image_tokens: of a packed sequence."""

    @cache
    def need(_gpu: int) -> "Need":
        from learner.memory import rank_need

        return rank_need(model, config, image_tokens)

    return need


def rollout_need(model: Path | Any, config: RolloutConfig) -> GpuNeed:
    """Of a rollout's engine, on each of its GPUs."""

    @cache
    def need(gpu: int) -> "Need":
        from actors.memory import engine_need

        return engine_need(model, config, gpu)

    return need


@dataclass(frozen=True, kw_only=True)
class Idling:
    """What an actor of a colocated run needs of its GPU while the other one of its pair works."""

    least: "Need"
    """What stays there in any case."""
    most: "Need"
    """With the optimizer state where it is, which may be put away."""


Idle = Callable[[], Idling]
"""Called only where there is a GPU, as a `GpuNeed`."""


def resting_need(model: Path | Any, config: ZeroConfig, image_tokens: int) -> Idle:
    """Of a rank while its engine samples; as for `learner_need`."""

    @cache
    def idle() -> Idling:
        from learner.memory import resting

        least, most = (resting(model, config, image_tokens, parked=parked) for parked in (True, False))
        return Idling(least=least, most=most)

    return idle


def sleeping_need(config: RolloutConfig) -> Idle:
    """Of an engine that sleeps."""

    @cache
    def idle() -> Idling:
        from actors.memory import sleeping

        return Idling(least=sleeping(config), most=sleeping(config))

    return idle


def segmenter_need(expert: str, config: SegmenterConfig) -> GpuNeed:
    """Of a segmenter's expert."""

    @cache
    def need(_gpu: int) -> "Need":
        from actors.memory import expert_need

        return expert_need(expert, config)

    return need


@dataclass(frozen=True, kw_only=True)
class Tenant:
    """An actor on its GPUs, of each of which it needs the same."""

    name: str
    place: Place
    need: "Need"
    idle: Idling | None = None
    """What it needs while the other works with which it takes turns; None for one that takes none."""

    @property
    def gpu(self) -> Gpu:
        return self.place.gpus[0]


def tenant(name: str, need: GpuNeed, place: Place, idle: Idle | None = None) -> Tenant:
    """An actor that sees at least one GPU."""
    at_work = need(min(gpu.memory for gpu in place.gpus))
    return Tenant(name=name, place=place, need=at_work, idle=idle and idle())


def taken(need: "Need") -> float:
    """Bytes of a GPU that surely go: what is reserved, or what is needed as far as that is trusted."""
    return trusted(need) if need.reserved is None else need.reserved


def trusted(need: "Need") -> float:
    """Bytes that it needs at least."""
    return sum(need.certain.values()) + TRUST * sum(need.estimated.values())


def overfull(tenants: Sequence[Tenant], *, parked: bool = True) -> str | None:
    """What cannot fit, in a sentence that says what each part needs and what to change; None if everything fits.
    parked: in a colocated run, whether optimizer state is put away while engines sample."""
    for each in tenants:
        if each.need.reserved is not None and trusted(each.need) > each.need.reserved:
            return (
                f"{each.name} may fill {in_gib(each.need.reserved)} of its {_described(each.gpu)} and needs "
                f"{in_words(each.need)}; {each.need.remedy}"
            )
    sharing: dict[tuple[str, str], list[Tenant]] = defaultdict(list)
    for each in tenants:
        for gpu in each.place.gpus:
            sharing[each.place.node, gpu.uuid].append(each)
    for together in sharing.values():
        for moment in _moments(together, parked=parked):
            if sum(taken(need) for _, need in moment) > together[0].gpu.memory:
                return _refusal(together[0].gpu, moment)
    return _overfull_node(tenants, parked=parked)


def parking(tenants: Sequence[Tenant]) -> tuple[bool, str]:
    """Whether ranks of a colocated run must put their optimizer state into host memory while engines sample, and why,
    in words. Without GPUs they do, so that a rehearsal takes the same way."""
    ranks = [each for each in tenants if each.idle and each.name.startswith("learner")]
    if not ranks:
        return True, "optimizer state waits in host memory while engines sample, as a rehearsal without GPUs"
    idle = ranks[0].idle
    assert idle is not None
    size = in_gib(idle.most.total - idle.least.total)
    if idle.most.total == idle.least.total:
        return False, "no optimizer state lies on the GPU while engines sample"
    if overfull(tenants, parked=False) is None:
        return False, f"optimizer state of {size} stays on the GPU while engines sample, beside which it fits"
    return True, f"optimizer state of {size} waits in host memory while engines sample, beside which it does not fit"


def _moments(together: Sequence[Tenant], *, parked: bool) -> list[list[tuple[str, "Need"]]]:
    """Who needs what of one GPU, by name: at any time or, where actors take turns, while each of them works."""
    working: list[Tenant | None] = [each for each in together if each.idle]

    def of(each: Tenant, worker: Tenant | None) -> tuple[str, "Need"]:
        if each.idle is None or each is worker:
            return each.name, each.need
        return f"{each.name}, idle,", each.idle.least if parked else each.idle.most

    return [[of(each, worker) for each in together] for worker in working or [None]]


def summary(tenants: Sequence[Tenant]) -> list[str]:
    """One line a role."""
    first = {each.name.split()[0]: each for each in reversed(tenants)}
    return [
        f"{role}: estimated {in_words(each.need)} on {_described(each.gpu)}{_reservation(each.need)}"
        for role, each in sorted(first.items())
    ]


def in_words(need: "Need") -> str:
    """`71.2 GiB (weights 15.4, gradients 7.7, …)`."""
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in need.parts.items() if size)
    return f"{in_gib(need.total)} ({parts})"


def in_gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"


def _reservation(need: "Need") -> str:
    return "" if need.reserved is None else f", of which it reserves {in_gib(need.reserved)}: {need.note}"


def _described(gpu: Gpu) -> str:
    return f"{gpu.name} of {in_gib(gpu.memory)}"


def _refusal(gpu: Gpu, moment: Sequence[tuple[str, "Need"]]) -> str:
    remedies = "; or ".join(dict.fromkeys(need.remedy for _, need in moment if need.remedy))
    if len(moment) == 1:
        name, need = moment[0]
        return f"{name} needs {in_words(need)}, and its {_described(gpu)} has less; {remedies}"
    needs = "; ".join(
        f"{name} {in_words(need)}" if need.reserved is None else f"{name} reserves {in_gib(need.reserved)}"
        for name, need in moment
    )
    return f"{len(moment)} actors share one {_described(gpu)} and need more: {needs}; {remedies}"


def _overfull_node(tenants: Sequence[Tenant], *, parked: bool) -> str | None:
    """What a node's own memory cannot hold, of what actors keep there."""
    nodes: dict[str, list[Tenant]] = defaultdict(list)
    for each in tenants:
        nodes[each.place.node].append(each)
    for together in nodes.values():
        held = {each.name: _host(each, parked=parked) for each in together}
        kept: Mapping[str, int] = {name: sum(host.values()) for name, host in held.items() if host}
        if sum(kept.values()) > together[0].place.memory:
            listed = ", ".join(f"{name} {in_gib(size)}" for name, size in kept.items())
            parts = {part for host in held.values() for part in host}
            remedies = [
                *(["set learner.reference to partitioned"] if "reference" in parts else []),
                *(["set learner.offload to none"] if parts - {"reference", "parked"} else []),
                *(["set placement to disaggregated"] if "parked" in parts else []),
                "train adapters (learner.lora), or spread the ranks over more nodes",
            ]
            return (
                f"a node's memory of {in_gib(together[0].place.memory)} cannot hold what is kept there ({listed}); "
                f"{', '.join(remedies)}"
            )
    return None


def _host(each: Tenant, *, parked: bool) -> dict[str, int]:
    """What an actor keeps in its node's memory."""
    return {**each.need.host, **(each.idle.least.host if each.idle and parked else {})}
