"""The driver's one wait: every call in flight, whoever it was made to, and how each ended.

A call ends in a result, or in one of four ways that mean different things:

    died     its actor is gone                                   the actor's other calls are gone too
    late     it missed its own deadline                          the actor is given up, as if it had died
    error    the call raised                                     the actor lives; the traceback is kept
    lost     an object that it needed, or made, is gone          a node went; nobody's fault

A mistake of the user's is none of these: it is raised at once.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayError, RayTaskError

from umrg.mistake import Mistake

Ref = Any
"""A Ray object reference; Ray's own type says nothing of what it refers to."""

Fault = Literal["died", "late", "error", "lost"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """One call in flight."""

    actor: str
    """Name of the actor that it was made to."""
    doing: str
    """What the actor does, phrased to follow "while"."""
    seconds: float
    """Its deadline, from the moment that it was made."""
    key: Any = None
    """The caller's own name for it."""


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
    """Makes calls, and waits for all of them at once."""

    def add(self, ref: Ref, call: Call) -> None:
        """A call was made. ref: of its result, which must be small: it is fetched here."""
        ...

    def wait(self, seconds: float) -> list[Ended]:
        """The calls that have ended; none if none does within so many seconds."""
        ...

    def forget(self, actor: str) -> None:
        """Wait no more for an actor's calls."""
        ...


class Calls:
    """Calls to Ray's actors."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._flying: dict[Ref, tuple[Call, float]] = {}
        self._now = now

    def __len__(self) -> int:
        return len(self._flying)

    def add(self, ref: Ref, call: Call) -> None:
        self._flying[ref] = (call, self._now() + call.seconds)

    def wait(self, seconds: float) -> list[Ended]:
        """Raises Mistake for a user's."""
        if not self._flying:
            time.sleep(min(seconds, 0.2))
            return []
        refs = list(self._flying)
        ready, _ = ray.wait(refs, num_returns=1, timeout=seconds, fetch_local=False)
        if ready:
            ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0, fetch_local=False)
        return [*(self._ended(ref) for ref in ready), *self._late()]

    def forget(self, actor: str) -> None:
        self._flying = {ref: (call, due) for ref, (call, due) in self._flying.items() if call.actor != actor}

    def _ended(self, ref: Ref) -> Ended:
        call, _ = self._flying.pop(ref)
        return outcome(ref, call)

    def _late(self) -> Iterator[Ended]:
        now = self._now()
        for ref in [ref for ref, (_, due) in self._flying.items() if due <= now]:
            call, _ = self._flying.pop(ref)
            yield Ended(
                call=call, fault="late", cause=f"{call.actor} did not finish {call.doing} within {call.seconds:g} s"
            )


def outcome(ref: Ref, call: Call) -> Ended:
    """How a call that is over ended. Raises Mistake for a user's."""
    try:
        return Ended(call=call, result=ray.get(ref, timeout=60))
    except RayTaskError as error:
        if isinstance(error.cause, Mistake):
            raise Mistake(f"{call.actor}, {call.doing}: {error.cause}") from error
        fault: Fault = "lost" if isinstance(error.cause, ObjectLostError) else "error"
        cause = f"{call.actor} failed while {call.doing}: {type(error.cause).__name__}: {_first(error.cause)}"
        return Ended(call=call, fault=fault, cause=cause, error=error)
    except RayActorError as error:
        fault, cause = "died", f"{call.actor} died while {call.doing}: {_first(error)}"
        return Ended(call=call, fault=fault, cause=cause, error=error)
    except (ObjectLostError, GetTimeoutError) as error:
        return Ended(call=call, fault="lost", cause=f"{call.actor}, {call.doing}: {_first(error)}", error=error)
    except RayError as error:
        cause = f"{call.actor} failed while {call.doing}: {_first(error)}"
        return Ended(call=call, fault="error", cause=cause, error=error)


def _first(error: BaseException | None) -> str:
    """The first line of an error's text."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
