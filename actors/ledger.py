"""The ledger of groups that are sampled and scored: where each is, and what became of it.

    queued ──► sampling ──► sampled ──► scoring ──► scored
       ▲          │            ▲           │
       │          ▼            │           ▼
       └──── once more ◄───────┴──── once more, or put aside

An attempt is one call to one actor. Its result counts only while it is the group's current attempt, so that an answer
that comes late, from an actor that was given up, changes nothing, and the first score closes a group. The ledger knows
neither Ray nor a clock.

An actor that dies, or misses a deadline, takes all its groups down with it, and one of them may be what killed it. So a
group that was there at two deaths is dispatched alone: if it kills again, it is put aside, and if not, it was merely
beside the culprit. An error, by contrast, belongs to its own group; two put it aside.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

Stage = Literal["queued", "sampling", "sampled", "scoring", "scored", "aside"]

SUSPECT = 2
"""Deaths after which a group is dispatched alone, and errors after which it is put aside."""


@dataclass(kw_only=True, eq=False)
class Entry:
    """One group."""

    id: str
    stage: Stage = "queued"
    attempt: int = 0
    """Number of the current attempt, counted over both stages."""
    deaths: int = 0
    """Actors that died or were given up in this stage while they had it."""
    errors: int = 0
    """Errors that its calls in this stage ended in."""
    cause: str = ""
    """What the last of these said."""
    samples: Any = None
    """From `sampled` on, what sampling left."""
    scored: Any = None
    """At `scored`, what scoring left."""

    @property
    def alone(self) -> bool:
        """It must have an actor to itself."""
        return self.deaths >= SUSPECT


class Ledger:
    """Groups by id, in their order."""

    def __init__(self, ids: Iterable[str]) -> None:
        self.entries = {id: Entry(id=id) for id in ids}
        self._waiting = {"queued": dict(self.entries), "sampled": {}}
        self._open = len(self.entries)

    @property
    def closed(self) -> bool:
        """Every group is scored or put aside."""
        return self._open == 0

    @property
    def sampled(self) -> bool:
        """No group is left to be sampled."""
        return not any(entry.stage in ("queued", "sampling") for entry in self.entries.values())

    @property
    def aside(self) -> list[Entry]:
        """The groups that were put aside."""
        return [entry for entry in self.entries.values() if entry.stage == "aside"]

    def waiting(self, stage: Literal["queued", "sampled"]) -> Iterator[Entry]:
        """Those that wait to be sampled (`queued`) or to be scored (`sampled`); suspects first, so that they find an
        idle actor at all."""
        found = list(self._waiting[stage].values())
        yield from (entry for entry in found if entry.alone)
        yield from (entry for entry in found if not entry.alone)

    def begin(self, id: str) -> int:
        """A waiting group is dispatched. Returns the number of the attempt."""
        entry = self.entries[id]
        del self._waiting[entry.stage][id]
        entry.stage = "sampling" if entry.stage == "queued" else "scoring"
        entry.attempt += 1
        return entry.attempt

    def end(self, id: str, attempt: int, result: Any) -> bool:
        """An attempt succeeded. Returns whether it counts. result: what it left."""
        entry = self._current(id, attempt)
        if entry is None:
            return False
        if entry.stage == "sampling":
            entry.samples = result
            self._wait(entry, "sampled")
        else:
            entry.scored = result
            self._close(entry, "scored")
        entry.deaths = entry.errors = 0  # what killed a rollout is not what kills a segmenter
        return True

    def died(self, id: str, attempt: int, cause: str) -> None:
        """The actor of an attempt died, or was given up."""
        if entry := self._current(id, attempt):
            suspected, entry.cause = entry.alone, cause
            entry.deaths += 1
            self._again(entry, aside=suspected)

    def failed(self, id: str, attempt: int, cause: str) -> None:
        """An attempt ended in an error."""
        if entry := self._current(id, attempt):
            entry.cause = cause
            entry.errors += 1
            self._again(entry, aside=entry.errors >= SUSPECT)

    def lost(self, id: str, attempt: int) -> None:
        """What an attempt needed or made is no longer there, because a node went: nobody's fault."""
        if entry := self._current(id, attempt):
            entry.samples = None
            self._wait(entry, "queued")

    def _current(self, id: str, attempt: int) -> Entry | None:
        entry = self.entries.get(id)
        if entry is None or entry.stage not in ("sampling", "scoring") or entry.attempt != attempt:
            return None
        return entry

    def _again(self, entry: Entry, *, aside: bool) -> None:
        if aside:
            self._close(entry, "aside")
        else:
            self._wait(entry, "queued" if entry.stage == "sampling" else "sampled")

    def _wait(self, entry: Entry, stage: Stage) -> None:
        entry.stage = stage
        self._waiting[stage][entry.id] = entry

    def _close(self, entry: Entry, stage: Stage) -> None:
        entry.stage = stage
        self._open -= 1
