"""Copies of the driver's files on nodes that have not got them: each node makes one, into its own cache.

    what an actor misses ──bring──► a Porter on its node ──go_on──► bytes so far, …, the copy's path ──► its start

A porter reads the driver's file through Ray's object store, a piece at a time, or the URI that the driver's own copy is
of.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.calls import Call, Calls, Ended
from actors.gpus import Place
from umrg.copies import Cache, Contents, Reader, progress
from umrg.remote import PIECE, Remote

TURN_S = 2.0
"""Seconds of copying between two reports of a porter."""
SAY_EVERY_S = 10.0
AHEAD = 2
"""Pieces that are in the object store at the same time."""


@dataclass(frozen=True, kw_only=True)
class Parcel:
    """What is to be copied, and from where."""

    contents: Contents
    path: Path
    """The driver's."""
    home: str
    """Id of the driver's node."""
    uri: str | None
    """From which it is read instead, if there is one."""

    def reader(self) -> Reader:
        """Called where the copy is made."""
        return Remote.of(self.uri).read if self.uri else partial(_through_ray, self)


class Porter:
    """Makes a copy on its node. cache: as `Cache`."""

    def __init__(self, parcel: Parcel, cache: Path | None) -> None:
        self._parcel, self._cache = parcel, Cache(cache)
        self._steps: Any = None

    def go_on(self) -> int | Path:
        """Copy for some seconds. Returns how many bytes are there, and when all are, the copy's path. Raises
        ValueError where the URI cannot be read from this node, or the copy is damaged."""
        parcel, began = self._parcel, time.monotonic()
        contents = parcel.contents
        if self._steps is None:
            if there := self._cache.found(contents.digest, contents.name):
                return there
            self._steps = self._cache.copying(
                contents.name, contents.sizes, parcel.reader(), key=contents.digest, digest=contents.digest
            )
        try:
            while True:
                done = next(self._steps)
                if time.monotonic() > began + TURN_S:
                    return int(done)
                if not done:
                    time.sleep(0.2)  # another process makes it
        except StopIteration as stop:
            path: Path = stop.value
            return path


class Deliveries:
    """The copies of a run. cache: folder of each node; None for its user's own. seconds: that one may take."""

    def __init__(self, calls: Calls, *, seconds: float, cache: Path | None = None) -> None:
        self._calls, self._seconds, self._cache = calls, seconds, cache
        self._parcels: dict[Path, Parcel] = {}
        self._reading: dict[Path, list[Callable[[Ended | None], None]]] = {}
        self._copies: dict[str, dict[Path, Path]] = {}
        self._awaited: dict[tuple[str, Path], list[Callable[[Ended | None], None]]] = {}
        self._now = time.monotonic

    def copies(self, node: str) -> Mapping[Path, Path]:
        """What a node has in place of the driver's files."""
        return self._copies.get(node, {})

    def bring(self, place: Place, then: Callable[[Ended | None], None]) -> None:
        """Bring what is missing at a place. then: what follows, once; it is given the fault of a copy that was not
        made, or of the driver's own that could not be read."""
        left = [path for path in place.missing.values() if path not in self.copies(place.node)]
        if not left:
            then(None)
            return
        path = left[0]
        waiting = self._awaited.setdefault((place.node, path), [])
        waiting.append(lambda fault: then(fault) if fault else self.bring(place, then))
        if len(waiting) == 1:
            key = next(key for key, each in place.missing.items() if each == path)
            self._read(path, partial(self._send, place, f"copying {key}", path))

    def _send(self, place: Place, doing: str, path: Path, unread: Ended | None) -> None:
        """unread: the fault where the driver's could not be read."""
        if unread:
            self._done(place.node, path, unread)
            return
        parcel = self._parcels[path]
        porter = _on(Porter, place.node).remote(parcel, self._cache)
        began, said, total = self._now(), self._now() - SAY_EVERY_S, sum(parcel.contents.sizes.values())

        def go_on() -> None:
            left = max(1.0, began + self._seconds - self._now())
            call = Call(actor=f"node {place.address}", doing=f"{doing} ({path})", seconds=left, then=follow)
            self._calls.add(porter.go_on.remote(), call)

        def follow(ended: Ended) -> None:
            nonlocal said
            if ended.fault is None and not isinstance(ended.result, Path):
                if self._now() >= said + SAY_EVERY_S:
                    said = self._now()
                    there = progress(ended.result, total)
                    print(f"node {place.address} is {doing} from {parcel.uri or path}: {there}", flush=True)
                go_on()
                return
            ray.kill(porter)
            if ended.fault is None:
                print(f"node {place.address} has a copy of {parcel.uri or path}", flush=True)
                self._copies.setdefault(place.node, {})[path] = ended.result
            elif ended.fault == "late":
                late = f"node {place.address} did not finish {doing} ({path}) within {self._seconds:g} s"
                ended = replace(ended, cause=late)
            self._done(place.node, path, ended if ended.fault else None)

        go_on()

    def _done(self, node: str, path: Path, fault: Ended | None) -> None:
        for then in self._awaited.pop((node, path)):
            then(fault)

    def _read(self, path: Path, then: Callable[[Ended | None], None]) -> None:
        """Read all of the driver's once, for its digest, in a task beside the driver: that of a large model takes
        minutes. then: what follows; it is given the fault if it cannot be read."""
        if path in self._parcels:
            then(None)
            return
        waiting = self._reading.setdefault(path, [])
        waiting.append(then)
        if len(waiting) > 1:
            return
        home = ray.get_runtime_context().get_node_id()

        def follow(ended: Ended) -> None:
            if ended.fault is None:
                source = Cache(self._cache).source(path)
                self._parcels[path] = Parcel(contents=ended.result, path=path, home=home, uri=source)
            for each in self._reading.pop(path):
                each(ended if ended.fault else None)

        print(f"reading {path}, which is to be copied to nodes that have not got it", flush=True)
        call = Call(actor="the driver's node", doing=f"reading {path}", seconds=self._seconds, then=follow)
        self._calls.add(_on(_contents, home).remote(path), call)


def _on(what: Any, node: str, **options: Any) -> Any:
    strategy = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
    return ray.remote(what).options(num_cpus=0, scheduling_strategy=strategy, **options)


def _contents(path: Path) -> Contents:
    return Contents.of(path)


def _through_ray(parcel: Parcel, file: str) -> Iterator[memoryview]:
    """The pieces of one of the driver's files."""
    ahead = {"num_returns": "streaming", "_generator_backpressure_num_objects": AHEAD, "max_retries": 0}
    for ref in _on(_pieces, parcel.home, **ahead).remote(parcel.path.parent / file):
        yield memoryview(ray.get(ref))


def _pieces(path: Path) -> Iterator[NDArray[np.uint8]]:
    with path.open("rb") as file:
        while data := file.read(PIECE):
            # Ray shows arrays to readers of a node without a copy of its own.
            yield np.frombuffer(data, dtype=np.uint8)
