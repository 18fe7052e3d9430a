"""Who makes a run's actors, at its start and later, and ends them.

listed by the job ──► created ──► has room: says where it is ──► refused, or is brought what its node has not, and
loads ──► member of its pool
"""

import math
import time
from collections import defaultdict
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import ray

from actors.build import this_build
from actors.calls import Call, Calls, Ended, refuse
from actors.config import DeadlineConfig
from actors.delivery import Deliveries
from actors.engine_report import EngineReport
from actors.failures import ActorDied, DeadlinePassed
from actors.gpus import Lodging, Place
from actors.pool import Pool
from actors.pools import Placement
from cluster.memory import GpuNeed, Idle, Tenant, overfull, parking, summary, tenant
from cluster.nodes import cramped, object_stores, unfit
from cluster.placement import Bundle, Node, Slot, beside, described, shortage, waves
from umrg.mistake import Mistake

PATIENCE_S = 30.0
"""Seconds without room after which a run begins without an actor, and it is said what it waits for."""
SAY_EVERY_S = 10.0
"""Seconds after which it is said again what a run that cannot begin waits for."""


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
    idle: Idle | None = None
    """What it needs of its GPU while the other actor works with which it takes turns; None for one that takes none."""
    weights: int = 0
    """Bytes of the versions of weights that it is sent during the run, each; 0 if it is sent none."""
    calls: int | None = None
    """How many calls it takes at the same time, each in a thread; None for what Ray does."""
    nodes: int | None = None
    """Nodes over which the actors of its role are spread, as many on each; None for the fewest. Of the learner."""


class Hiring:
    """Makes the actors of a run. What it cannot begin without lies in a placement group; the others are actors of their
    own. Later ones take the place of one that has gone, or any that the cluster has."""

    def __init__(
        self,
        listed: Sequence[ActorSpec],
        group: Any,
        slots: Sequence[Slot],
        calls: Calls,
        deadlines: DeadlineConfig,
        *,
        spread: bool = False,
        cache: Path | None = None,
    ) -> None:
        """group: the placement group. slots: its bundles, in order. spread: the other actors over the nodes. cache:
        folder of each node for copies."""
        self._listed = {actor.bundle.name: actor for actor in listed}
        self._kinds = {actor.bundle.role: actor for actor in listed}
        self._group, self._slots, self._calls, self._deadlines = group, slots, calls, deadlines
        self._spread = spread
        self._deliveries = Deliveries(calls, seconds=deadlines.start, cache=cache)
        self._warned: set[str] = set()
        self._free = {name: index for index, slot in enumerate(slots) for name in slot.names}
        self._held: dict[str, tuple[str, int]] = {}
        self._sharers: dict[tuple[str, str], int] = {}
        self._tenants: dict[str, Tenant] = {}
        self._pools: dict[str, Pool] = {}
        self._pending: dict[str, float] = {}
        self._failed: dict[str, Ended] = {}
        self._now = time.monotonic
        self.handles: dict[str, Any] = {}
        self.places: dict[str, Place] = {}

    def begin(self) -> list[str]:
        """Create all actors that the job lists; the names of those that have room, which loads nothing yet. What the
        run cannot begin without is waited for, as long as `deadlines.resources`, and the others for half a minute: they
        may come later. Raises DeadlinePassed, and Mistake for what does not fit into its GPU."""
        self._await_group()
        needed = [name for slot in self._slots for name in slot.names]
        self._ask(needed)
        for wave in waves([actor.bundle for name, actor in self._listed.items() if name not in needed]) or [[]]:
            names = [bundle.name for bundle in wave]
            self._ask(names)
            needed += [bundle.name for bundle in wave if bundle.index == 0]
            self._await_places(needed, others=names)
        for line in summary(list(self._tenants.values())):
            print(line, flush=True)
        self._refuse_overfull()
        placed = [name for name in self._listed if name in self.places]
        self._bring(placed)
        return placed

    def lodging(self, name: str) -> Lodging:
        """What an actor is told of its place. Those of its role that have gone from its node count, as others will take
        their place."""
        node = self.places[name].node
        return Lodging(
            sharers=self._sharers[node, self._kind(name).bundle.role], copies=dict(self._deliveries.copies(node))
        )

    def parks(self) -> bool:
        """Whether ranks that take turns with engines must put their optimizer state away meanwhile; said in a line."""
        parks, why = parking(list(self._tenants.values()))
        print(f"learner: {why}", flush=True)
        return parks

    def expect(self, pool: Pool, begun: Container[str]) -> None:
        """Let those that had no room when the run began join a pool when they have. begun: names of those that had."""
        listed = [name for name, actor in self._listed.items() if actor.bundle.role == pool.role]
        late = {name: self.handles[name] for name in listed if name not in begun}
        self._pools |= dict.fromkeys(late, pool)
        pool.adopt(late, state="starting")
        for name in late:
            if failed := self._failed.pop(name, None):
                pool.died(name, failed.cause)
            elif name in self.places:  # it found room while others were loading
                self._load(pool, name)

    def again(self, role: str) -> dict[str, Any]:
        """Others in the place of all listed actors of a role. Raises DeadlinePassed."""
        names = [name for name, actor in self._listed.items() if actor.bundle.role == role]
        began = self._now()
        while True:
            for name in names:
                self._remove(name)
                self._calls.gone(name, f"{name} was ended")
            self._ask(names)
            try:
                self._await_places(names)
                self._bring(names)
                return {name: self.handles[name] for name in names}
            except ActorDied:
                # Ray takes some seconds to notice that a node is lost, and still places actors there.
                if self._now() > began + self._deadlines.start:
                    raise
                self._calls.turn()

    def start(self, pool: Pool, name: str) -> Any:
        """As `Starter.start`: the actor says where it is, and then loads."""
        print(f"starting {name}", flush=True)
        self._pools[name] = pool
        self._ask([name])
        return self.handles[name]

    def _make(self, name: str) -> Any:
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
            labels=kind.bundle.labels,
            node=beside(kind.bundle.gpus, self._shared()) if kind.bundle.shares_a_gpu else None,
            spread=self._spread,
            environment=kind.environment,
        )
        threads = {} if kind.calls is None else {"max_concurrency": kind.calls}
        return ray.remote(kind.actor_class).options(**placement.options(), **threads).remote(**kind.arguments)

    def _shared(self) -> dict[tuple[str, str], float]:
        """What this run's actors take of each GPU that is shared out, by its node and its id."""
        taken: dict[tuple[str, str], float] = defaultdict(float)
        for name, place in self.places.items():
            if self._kind(name).bundle.shares_a_gpu:
                for gpu in place.given:
                    taken[place.node, gpu] += self._kind(name).bundle.gpus
        return taken

    def _ask(self, names: Sequence[str]) -> None:
        """Create actors, and let each say where it is. One may wait for room as long as it takes."""
        for name in names:
            self.handles[name] = self._make(name)
            self._pending[name] = self._now() + PATIENCE_S
            call = Call(actor=name, doing="starting", seconds=math.inf, then=partial(self._placed, name))
            self._calls.add(self.handles[name].place.remote(), call)

    def _await_group(self) -> None:
        """Wait until the cluster has room for what the run cannot begin without, and say so meanwhile."""
        ready = False

        def follow(ended: Ended) -> None:
            nonlocal ready
            refuse(ended)
            ready = True

        seconds, began = self._deadlines.resources, self._now()
        call = Call(actor="the placement group", doing="waiting for room", seconds=math.inf, then=follow)
        self._calls.add(self._group.ready(), call)
        said = began + 1 - SAY_EVERY_S
        while not ready:
            self._calls.turn(min(1.0, max(0.1, began + seconds - self._now())))
            if not ready and self._now() >= began + seconds:
                raise DeadlinePassed(f"waited {seconds:g} s for {self._lack()}")
            if not ready and self._now() >= said + SAY_EVERY_S:
                said = self._now()
                print(f"waiting for {self._lack()}", flush=True)

    def _lack(self) -> str:
        free, wanted = ray.available_resources(), [slot.whole for slot in self._slots]
        cpus, gpus = sum(bundle.cpus for bundle in wanted), sum(bundle.gpus for bundle in wanted)
        lack = f"{cpus:g} CPUs and {gpus:g} GPUs; {free.get('CPU', 0):g} and {free.get('GPU', 0):g} are free"
        missing = shortage(wanted, cluster_nodes())
        return f"{lack}, and {missing}" if missing else lack

    def _await_places(self, needed: Sequence[str], others: Sequence[str] = ()) -> None:
        """Wait until the needed actors have said where they are, and the others that find room soon."""
        began = self._now()
        while True:
            for name in list(self._failed):
                refuse(self._failed.pop(name))
            missing = [name for name in needed if name not in self.places]
            late = any(name not in self.places for name in others)
            if not missing and not (late and self._now() < began + PATIENCE_S):
                return
            if missing and self._now() > began + self._deadlines.start:
                raise DeadlinePassed(f"{', '.join(missing)} did not start within {self._deadlines.start:g} s")
            self._calls.turn()

    def _bring(self, names: Sequence[str]) -> None:
        """Wait until the nodes of actors have all that these need."""
        waiting, faults = set(names), list[Ended]()

        def brought(name: str, fault: Ended | None) -> None:
            waiting.discard(name)
            faults.extend([fault] if fault else [])

        for name in names:
            self._deliveries.bring(self.places[name], partial(brought, name))
        while waiting:
            self._calls.turn()
            for fault in faults:
                if fault.fault == "error":
                    raise Mistake(f"{fault.cause}; mend that, or give cache=… another folder") from fault.error
                refuse(fault)

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
        there = [handle for name, handle in self.handles.items() if name in self.places]
        stopping = [handle.stop.remote() for handle in there if hasattr(handle, "stop")]
        if stopping:
            ray.wait(stopping, num_returns=len(stopping), timeout=20)
        for name in list(self.handles):
            self._remove(name)

    def remind(self) -> None:
        """Say of the actors that the cluster has had no room for what they wait for."""
        for name in [name for name, due in self._pending.items() if due <= self._now()]:
            self._pending[name] = self._now() + PATIENCE_S
            bundle, free = self._kind(name).bundle, ray.available_resources()
            print(
                f"{name} waits for {described(bundle)}; {free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs "
                "are free",
                flush=True,
            )

    def _placed(self, name: str, ended: Ended) -> None:
        """An actor has found room. It loads now if its pool expects it, and else when the run begins."""
        pool = self._pools.get(name)
        if name not in self.handles:
            return  # it was ended meanwhile
        if ended.fault:
            if pool:
                pool.died(name, ended.cause)
            else:
                self._failed[name] = ended  # raised by who waits for it: what follows from other calls must follow
            return
        self._pending.pop(name, None)
        if fault := unfit(name, ended.result, this_build()):
            if pool is None:
                raise Mistake(fault)
            pool.died(name, fault)
            return
        self._lodge(name, ended.result)
        if pool:
            self._load(pool, name)

    def _load(self, pool: Pool, name: str) -> None:
        self._refuse_overfull()
        self._deliveries.bring(self.places[name], partial(self._equipped, pool, name))

    def _equipped(self, pool: Pool, name: str, fault: Ended | None) -> None:
        """Its node has all that it needs."""
        if name not in self.handles:
            return  # it was ended meanwhile
        if fault:
            pool.died(name, fault.cause)
            return
        call = Call(actor=name, doing="starting", seconds=self._deadlines.start, then=partial(self._loaded, pool, name))
        self._calls.add(self.handles[name].start.remote(self.lodging(name)), call)

    def _loaded(self, pool: Pool, name: str, ended: Ended) -> None:
        if ended.fault:
            pool.died(name, ended.cause)
        elif name in self.handles:
            said = ended.result
            print(f"{name} is there{f': {said}' if isinstance(said, EngineReport) else ''}", flush=True)
            pool.has_loaded(name, said)

    def _kind(self, name: str) -> ActorSpec:
        return self._listed.get(name) or self._kinds[name.partition(" ")[0]]

    def _need(self, name: str) -> GpuNeed | None:
        kind = self._kind(name)
        return kind.need if kind.bundle.gpus > 0 else None

    def _lodge(self, name: str, place: Place) -> None:
        self.places[name] = place
        role, need = self._kind(name).bundle.role, self._need(name)
        there = sum(other.node == place.node for each, other in self.places.items() if each.startswith(role))
        self._sharers[place.node, role] = max(there, self._sharers.get((place.node, role), 0))
        if need and place.gpus:
            self._tenants[name] = tenant(name, need, place, self._kind(name).idle)
        weights = self._kind(name).weights
        if weights and place.node not in self._warned and (remark := cramped(name, place, weights, object_stores())):
            self._warned.add(place.node)
            print(f"warning: {remark}", flush=True)

    def _refuse_overfull(self) -> None:
        if fault := overfull(list(self._tenants.values())):
            raise Mistake(fault)

    def _remove(self, name: str) -> None:
        for known in (self._tenants, self._pending, self._failed, self.places, self._pools):
            known.pop(name, None)
        if name in self._held:
            slot, index = self._held.pop(name)
            self._free[slot] = index
        if handle := self.handles.pop(name, None):
            ray.kill(handle)


def cluster_nodes() -> list[Node]:
    """The resources of each living node."""
    return [
        Node(cpus=node["Resources"].get("CPU", 0.0), gpus=node["Resources"].get("GPU", 0.0))
        for node in ray.nodes()
        if node["Alive"]
    ]
