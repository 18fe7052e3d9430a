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

    @property
    def gpu(self) -> Gpu:
        return self.place.gpus[0]

    @property
    def taken(self) -> float:
        """Bytes of a GPU that it surely takes: what it reserves, or what it needs as far as that is trusted."""
        return trusted(self.need) if self.need.reserved is None else self.need.reserved


def tenant(name: str, need: GpuNeed, place: Place) -> Tenant:
    """An actor that sees at least one GPU."""
    return Tenant(name=name, place=place, need=need(min(gpu.memory for gpu in place.gpus)))


def trusted(need: "Need") -> float:
    """Bytes that it needs at least."""
    return sum(need.certain.values()) + TRUST * sum(need.estimated.values())


def overfull(tenants: Sequence[Tenant]) -> str | None:
    """What cannot fit, in a sentence that says what each part needs and what to change; None if everything fits."""
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
        if sum(each.taken for each in together) > together[0].gpu.memory:
            return _refusal(together)
    return _overfull_node(tenants)


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


def _refusal(together: Sequence[Tenant]) -> str:
    remedies = "; or ".join(dict.fromkeys(each.need.remedy for each in together))
    gpu = _described(together[0].gpu)
    if len(together) == 1:
        return f"{together[0].name} needs {in_words(together[0].need)}, and its {gpu} has less; {remedies}"
    needs = "; ".join(
        f"{each.name} {in_words(each.need)}"
        if each.need.reserved is None
        else f"{each.name} reserves {in_gib(each.need.reserved)}"
        for each in together
    )
    return f"{len(together)} actors share one {gpu} and need more: {needs}; {remedies}"


def _overfull_node(tenants: Sequence[Tenant]) -> str | None:
    """What a node's own memory cannot hold, of what actors keep there."""
    nodes: dict[str, list[Tenant]] = defaultdict(list)
    for each in tenants:
        nodes[each.place.node].append(each)
    for together in nodes.values():
        kept: Mapping[str, int] = {each.name: sum(each.need.host.values()) for each in together if each.need.host}
        if sum(kept.values()) > together[0].place.memory:
            listed = ", ".join(f"{name} {in_gib(size)}" for name, size in kept.items())
            parts = {part for each in together for part in each.need.host}
            remedies = [
                *(["set learner.reference to partitioned"] if "reference" in parts else []),
                *(["set learner.offload to none"] if parts - {"reference"} else []),
                "train adapters (learner.lora), or spread the ranks over more nodes",
            ]
            return (
                f"a node's memory of {in_gib(together[0].place.memory)} cannot hold what is kept there ({listed}); "
                f"{', '.join(remedies)}"
            )
    return None
