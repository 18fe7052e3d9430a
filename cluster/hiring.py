"""Who makes a run's actors, at its start and later, and ends them.

listed by the job ──► created ──► looks at its GPU ──► refused, or loads ──► member of its pool
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from actors.calls import Call, Calls, Ended, Ref
from actors.engine_report import EngineReport
from actors.gpus import Place
from actors.pool import Pool
from actors.pools import Placement
from cluster.memory import GpuNeed, Tenant, overfull, summary, tenant
from cluster.placement import Bundle
from umrg.mistake import Mistake

PATIENCE_S = 30.0
"""Seconds without room after which it is said what an actor waits for."""


@dataclass(frozen=True, kw_only=True)
class ActorSpec:
    """One actor of a job."""

    bundle: Bundle
    """Its role and index, and the CPUs and GPUs that it takes."""
    actor_class: type
    arguments: Mapping[str, Any]
    """Of its constructor, by name."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that its process has from the start."""
    need: GpuNeed | None = None
    """What it needs of its GPU; None if that is not known."""


class Hiring:
    """Makes the actors of a run: at its start those that the job lists, each in its bundle of the placement group, and
    later others of the same kinds, in the bundle of one that has gone, or wherever the cluster has room."""

    def __init__(self, listed: Sequence[ActorSpec], group: Any, wanted: Sequence[Bundle], calls: Calls, seconds: float):
        """wanted: the bundles, in the order of the placement group. seconds: deadline of a start."""
        self._listed = {actor.bundle.name: actor for actor in listed}
        self._kinds = {actor.bundle.role: actor for actor in listed}
        self._group, self._calls, self._seconds = group, calls, seconds
        self._free = {bundle.name: i for i, bundle in enumerate(wanted)}
        self._held: dict[str, tuple[str, int]] = {}
        self._tenants: dict[str, Tenant] = {}
        self._pending: dict[str, float] = {}
        self._now = time.monotonic
        self.handles: dict[str, Any] = {}

    def make(self, name: str) -> Any:
        """Create an actor; it loads nothing yet."""
        kind = self._kind(name)
        slot = next((each for each in self._free if each == name), None) or next(
            (each for each in self._free if each.partition(" ")[0] == kind.bundle.role), None
        )
        if slot is not None:
            self._held[name] = (slot, self._free.pop(slot))
        placement = Placement(
            group=self._group,
            bundle=self._held[name][1] if slot is not None else None,
            num_cpus=kind.bundle.cpus,
            num_gpus=kind.bundle.gpus,
            environment=kind.environment,
        )
        self.handles[name] = ray.remote(kind.actor_class).options(**placement.options()).remote(**kind.arguments)
        return self.handles[name]

    def begin(self) -> dict[str, Any]:
        """All actors that the job lists, by name, once it is known that they fit into their GPUs."""
        for name in self._listed:
            self.make(name)
        on_gpus = {name: self.handles[name].place.remote() for name in self._listed if self._need(name)}
        places = self._calls.gather(on_gpus, seconds=self._seconds, doing="looking at its GPU")
        for name, place in zip(on_gpus, places, strict=True):
            self._lodge(name, place)
        for line in summary(list(self._tenants.values())):
            print(line, flush=True)
        self._refuse_overfull()
        return self.handles

    def again(self, role: str) -> dict[str, Any]:
        """Others in the place of all listed actors of a role."""
        names = [name for name, actor in self._listed.items() if actor.bundle.role == role]
        for name in names:
            self._remove(name)
        return {name: self.make(name) for name in names}

    def start(self, pool: Pool, name: str) -> Any:
        """As `Starter.start`: the actor looks at its GPU, and then loads."""
        print(f"starting {name}", flush=True)
        handle = self.make(name)
        self._pending[name] = self._now() + PATIENCE_S
        # An actor may wait for room as long as it takes; its start has a deadline.
        self._call(pool, name, handle.place.remote(), self._placed, seconds=math.inf)
        return handle

    def end(self, name: str, handle: Any, *, cause: str | None) -> None:
        """As `Starter.end`."""
        print(cause or f"{name} has nothing more to do, and is ended", flush=True)
        if cause is None and hasattr(handle, "stop"):
            self._calls.add(
                handle.stop.remote(),
                Call(actor=name, doing="stopping", seconds=20.0, then=lambda _: self._remove(name)),
            )
        else:
            self._remove(name)

    def close(self) -> None:
        """Kill all actors; engines are given a moment to end their processes."""
        stopping = [handle.stop.remote() for handle in self.handles.values() if hasattr(handle, "stop")]
        if stopping:
            ray.wait(stopping, num_returns=len(stopping), timeout=20)
        for name in list(self.handles):
            self._remove(name)

    def _call(self, pool: Pool, name: str, ref: Ref, then: Callable[[Pool, str, Any], None], *, seconds: float) -> None:
        def follow(ended: Ended) -> None:
            if ended.fault:
                pool.died(name, ended.cause)
            elif name in self.handles:  # it may have been ended meanwhile
                then(pool, name, ended.result)

        self._calls.add(ref, Call(actor=name, doing="starting", seconds=seconds, then=follow))

    def remind(self) -> None:
        """Say of the actors that the cluster has had no room for what they wait for."""
        for name in [name for name, due in self._pending.items() if due <= self._now()]:
            self._pending[name] = self._now() + PATIENCE_S
            bundle, free = self._kind(name).bundle, ray.available_resources()
            print(
                f"{name} waits for {bundle.cpus:g} CPUs and {bundle.gpus:g} GPUs; {free.get('CPU', 0):g} and "
                f"{free.get('GPU', 0):g} are free",
                flush=True,
            )

    def _placed(self, pool: Pool, name: str, place: Place) -> None:
        self._pending.pop(name, None)
        if self._need(name):
            self._lodge(name, place)
            self._refuse_overfull()
        self._call(pool, name, self.handles[name].start.remote(), self._loaded, seconds=self._seconds)

    def _loaded(self, pool: Pool, name: str, said: Any) -> None:
        print(f"{name} is there{f': {said}' if isinstance(said, EngineReport) else ''}", flush=True)
        pool.has_loaded(name)

    def _kind(self, name: str) -> ActorSpec:
        return self._listed.get(name) or self._kinds[name.partition(" ")[0]]

    def _need(self, name: str) -> GpuNeed | None:
        kind = self._kind(name)
        return kind.need if kind.bundle.gpus > 0 else None

    def _lodge(self, name: str, place: Place) -> None:
        need = self._need(name)
        if need and place.gpus:
            self._tenants[name] = tenant(name, need, place)

    def _refuse_overfull(self) -> None:
        if fault := overfull(list(self._tenants.values())):
            raise Mistake(fault)

    def _remove(self, name: str) -> None:
        self._tenants.pop(name, None)
        self._pending.pop(name, None)
        if name in self._held:
            slot, index = self._held.pop(name)
            self._free[slot] = index
        if handle := self.handles.pop(name, None):
            ray.kill(handle)
