"""The driver's one wait: every call in flight, whoever it was made to, and what follows when it ends.

A call ends in a result, or in one of four ways that mean different things:

    died     its actor is gone, or cannot work any more          its other calls are gone too
    late     it missed its own deadline                          the actor is given up, as if it had died
    error    the call raised                                     the actor lives; the traceback is kept
    lost     an object that it needed, or made, is gone          a node went; nobody's fault

A mistake of the user's (`umrg.mistake`) is none of these: it is raised, once all that has ended is dealt
with. A library's ValueError is an error like any other.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, Literal, Protocol

import ray
from ray.exceptions import (
    GetTimeoutError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from actors.failures import ActorDied, ActorFailed, Broken, DeadlinePassed, Lost
from umrg.mistake import Mistake

_KILLED = (RayActorError, OutOfMemoryError, WorkerCrashedError, NodeDiedError)
"""What Ray says of a call whose actor's process is gone; by the second, because its node ran out of memory."""

Ref = Any
"""A Ray object reference; Ray's own type says nothing of what it refers to."""

Fault = Literal["died", "late", "error", "lost", "mistake"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """One call in flight."""

    actor: str
    """Name of the actor that it was made to."""
    doing: str
    """What the actor does, phrased to follow "while"."""
    seconds: float
    """Its deadline, from the moment that it was made."""
    then: "Callable[[Ended], None]"
    """What follows when it ends."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a call ended."""

    call: Call
    result: Any = None
    fault: Fault | None = None
    cause: str = ""
    """Of a fault, in a line, with the actor's name."""
    error: BaseException | None = None
    """Of a fault, with the actor's traceback."""


class Waiting(Protocol):
    """Calls that somebody waits for."""

    def add(self, ref: Ref, call: Call) -> None:
        """A call was made. ref: of its result, which is fetched to the driver, so it should be small."""
        ...

    def gone(self, actor: str, cause: str) -> None:
        """An actor died, or is given up: all its calls end as `died`."""
        ...


class Calls:
    """Calls to Ray's actors. now: a monotonic clock, in seconds."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._flying: dict[Ref, tuple[Call, float]] = {}
        self._now = now

    def __len__(self) -> int:
        return len(self._flying)

    def add(self, ref: Ref, call: Call) -> None:
        self._flying[ref] = (call, self._now() + call.seconds)

    def gone(self, actor: str, cause: str) -> None:
        gone = {ref: call for ref, (call, _) in self._flying.items() if call.actor == actor}
        for ref in gone:
            del self._flying[ref]
        for call in gone.values():
            call.then(Ended(call=call, fault="died", cause=cause))

    def turn(self, seconds: float = 1.0) -> None:
        """Wait until a call ends, for so many seconds at most, and let follow what follows from all that have ended.
        Then raises the first error that this raised, or Mistake for one of the user's."""
        ended, raised = self._ended(seconds), list[Exception]()
        for each in chain(ended, iter(self._late, None)):
            try:
                each.call.then(each)
            except Exception as error:  # noqa: BLE001  # raised below: the other calls must be heeded too
                raised.append(error)
        if raised:
            raise raised[0]
        for each in ended:
            if each.fault == "mistake":
                raise Mistake(each.cause) from each.error

    def settle(self, calls: Mapping[str, Ref], *, seconds: float, doing: str) -> dict[str, Ended]:
        """How calls ended, by the name of the actor that each was made to; other calls go on meanwhile."""
        found: dict[str, Ended] = {}
        for name, ref in calls.items():
            self.add(ref, Call(actor=name, doing=doing, seconds=seconds, then=partial(_keep, found)))
        while len(found) < len(calls):
            self.turn()
        return {name: found[name] for name in calls}

    def gather(
        self,
        calls: Mapping[str, Ref],
        *,
        seconds: float,
        doing: str,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> list[Any]:
        """The results of calls, in order, as `settle`. Raises ActorFailed or DeadlinePassed for the first fault.
        meanwhile: called before each turn; it may make calls, but not wait."""
        found: dict[str, Ended] = {}
        for name, ref in calls.items():
            self.add(ref, Call(actor=name, doing=doing, seconds=seconds, then=partial(_keep, found)))
        while len(found) < len(calls):
            meanwhile()
            self.turn()
            for ended in found.values():
                refuse(ended)
        return [found[name].result for name in calls]

    def _ended(self, seconds: float) -> list[Ended]:
        if not self._flying:
            time.sleep(min(seconds, 0.1))
            return []
        refs = list(self._flying)
        due = min(due for _, due in self._flying.values()) - self._now()
        ready, _ = ray.wait(refs, num_returns=1, timeout=max(0.0, min(seconds, due)), fetch_local=False)
        if ready:
            ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0, fetch_local=False)
        return [outcome(ref, self._flying.pop(ref)[0]) for ref in ready]

    def _late(self) -> Ended | None:
        """One call that missed its deadline."""
        now = self._now()
        for ref, (call, due) in self._flying.items():
            if due <= now:
                del self._flying[ref]
                cause = f"{call.actor} did not finish {call.doing} within {call.seconds:g} s"
                return Ended(call=call, fault="late", cause=cause)
        return None


def refuse(ended: Ended) -> None:
    """Raise DeadlinePassed, ActorDied, Lost or ActorFailed for a call that ended in a fault."""
    kinds = {"late": DeadlinePassed, "died": ActorDied, "lost": Lost}
    if ended.fault and ended.fault != "mistake":
        raise kinds.get(ended.fault, ActorFailed)(ended.cause) from ended.error


def outcome(ref: Ref, call: Call) -> Ended:
    """How a call that is over ended."""
    try:
        return Ended(call=call, result=ray.get(ref, timeout=60))
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, Mistake):
            said = f"{call.actor}, {call.doing}: {cause}"
            return Ended(call=call, fault="mistake", cause=said, error=error)
        fault: Fault = (
            "lost" if isinstance(cause, ObjectLostError) else "died" if isinstance(cause, Broken) else "error"
        )
        said = f"{call.actor} failed while {call.doing}: {type(cause).__name__}: {_first(cause)}"
        return Ended(call=call, fault=fault, cause=said, error=error)
    except _KILLED as error:
        return Ended(
            call=call, fault="died", cause=f"{call.actor} died while {call.doing}: {_first(error)}", error=error
        )
    except (ObjectLostError, GetTimeoutError) as error:
        return Ended(call=call, fault="lost", cause=f"{call.actor}, {call.doing}: {_first(error)}", error=error)
    except RayError as error:
        said = f"{call.actor} failed while {call.doing}: {_first(error)}"
        return Ended(call=call, fault="error", cause=said, error=error)


def _keep(found: dict[str, Ended], ended: Ended) -> None:
    found[ended.call.actor] = ended


def _first(error: BaseException | None) -> str:
    """The first line of an error's text."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
