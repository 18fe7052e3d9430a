"""An elastic pool: the actors of one role, of which any may come, go or die at any time.

    starting ──► loaded ──► ready ──► draining ──► ended
        └───────────┴─────────┴──────────┴──► ended (died, or given up)

Scaling and death are the same event: `reconcile` compares the members with how many are wanted, starts what is missing
and drains what is too much. A member is `loaded` once its model is; whoever runs the pool admits it to work, a rollout
not before it has the current weights. The pool decides and remembers, and measures how busy its members are; a
`Starter` makes actors and ends them, so that the pool itself does not know Ray.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol
from weakref import WeakSet

from actors.failures import ActorFailed

State = Literal["starting", "loaded", "ready", "draining"]

FAILED_STARTS = 3
"""Members that die one after another before they are admitted, until the pool gives up."""
APART_S = 10.0
"""Seconds within which starts that fail count once: with a node all that start there die, and for some seconds Ray
places others there."""
AHEAD = 0
"""In place of an attempt's number, which is above it."""
ERRORS = 2
"""Errors of a member one after another before it is replaced."""


class Starter(Protocol):
    """Makes and ends the actors of a role."""

    def start(self, pool: "Pool", name: str) -> Any:
        """Make an actor and begin to load it. Returns its handle; the pool is told by `has_loaded` or `died`."""
        ...

    def end(self, name: str, handle: Any, *, cause: str | None) -> None:
        """End an actor and what it started. cause: what it died of, or why it is given up; None for one that lives and
        has nothing to do."""
        ...


@dataclass(kw_only=True, eq=False)
class Member:
    """One actor."""

    name: str
    handle: Any
    state: State = "starting"
    flying: set[tuple[str, int]] = field(default_factory=set)
    """Group and attempt of each call of work that it has; attempt `AHEAD` of those that prepare for a group."""
    reserved: bool = False
    """Nothing is dispatched to it beside the suspected group that it has, or waits for."""
    said: Any = None
    """What its start returned."""
    errors: int = 0
    """Calls of work that ended in errors, since the last one that did not."""
    lost: int = 0
    """Weights that were lost on their way to it, since the last that were not."""
    holds: Any = None
    """The weights that it works with; None for those of the model's folder."""
    taking: Any = None
    """The weights that it is being sent."""
    keeps: int | None = None
    """For how many groups it keeps what it prepared; None as long as it has not said."""
    prepared: WeakSet[Any] = field(default_factory=WeakSet)
    """Groups that it prepared for, of all ledgers that are still looked at."""
    images: dict[str, None] = field(default_factory=dict)
    """Keys of the images that it was given and may have kept, that of longest disuse first."""

    def remember(self, image: str) -> None:
        """It was given an image."""
        self.images.pop(image, None)
        self.images[image] = None

    def forget(self, kept: int) -> None:
        """It has kept no more images than these, of which it was given the last."""
        for image in list(self.images)[: max(0, len(self.images) - kept)]:
            del self.images[image]


@dataclass(frozen=True, kw_only=True)
class Worked:
    """Seconds of all members of a pool together."""

    there: float = 0.0
    """In which they could work: they were ready, or drained."""
    busy: float = 0.0
    """Of these, in which they had work."""

    def __add__(self, other: "Worked") -> "Worked":
        return Worked(there=self.there + other.there, busy=self.busy + other.busy)

    def __sub__(self, other: "Worked") -> "Worked":
        return Worked(there=self.there - other.there, busy=self.busy - other.busy)


class Pool:
    """The members of one role, by name. bound: calls of work that a member has at the same time. now: a monotonic
    clock, in seconds."""

    def __init__(self, role: str, starter: Starter, *, bound: int, now: Callable[[], float] = time.monotonic) -> None:
        self.role, self.bound = role, bound
        self.members: dict[str, Member] = {}
        self._starter = starter
        self._made = 0
        self._failed_starts, self._failed_at = 0, -math.inf
        self._now, self._counted_until = now, now()
        self._worked = Worked()

    def __iter__(self) -> Iterator[Member]:
        return iter(list(self.members.values()))

    @property
    def ready(self) -> list[Member]:
        """Those that work is dispatched to."""
        return [member for member in self if member.state == "ready"]

    @property
    def loaded(self) -> list[Member]:
        """Those that wait to be admitted."""
        return [member for member in self if member.state == "loaded"]

    @property
    def staying(self) -> list[Member]:
        """Those that are not on their way out."""
        return [member for member in self if member.state != "draining"]

    @property
    def idle(self) -> list[Member]:
        """Those that have nothing to do, and of which nothing speaks against giving them something."""
        return [member for member in self.ready if not (member.flying or member.reserved or member.errors)]

    def worked(self) -> Worked:
        """Since the pool was made."""
        # Called before any member comes, goes, gets work or ends it, and so nothing has changed since the last call.
        now = self._now()
        passed, self._counted_until = now - self._counted_until, now
        there = [member for member in self if member.state in ("ready", "draining")]
        busy = sum(bool(member.flying) for member in there)
        self._worked += Worked(there=passed * len(there), busy=passed * busy)
        return self._worked

    def reconcile(self, wanted: int) -> None:
        """Start what is missing, drain what is too much, and end what is drained."""
        surplus = len(self.staying) - wanted
        for _ in range(-surplus):
            name = f"{self.role} {self._made}"
            self._made += 1
            self.members[name] = Member(name=name, handle=self._starter.start(self, name))
        if surplus > 0:
            leaving = sorted(self.staying, key=lambda member: (member.state == "ready", len(member.flying)))
            for member in leaving[:surplus]:
                member.state = "draining"
        for member in self:
            if member.state == "draining" and not member.flying and member.taking is None:
                self._remove(member)

    def adopt(self, handles: Mapping[str, Any], *, state: State = "ready") -> None:
        """Take in actors that others made: those that may work, or those that are yet starting. handles: by name."""
        self.worked()
        for name, handle in handles.items():
            self.members[name] = Member(name=name, handle=handle, state=state)
        self._made = max([self._made, *(int(name.split()[-1]) + 1 for name in handles)])

    def has_loaded(self, name: str, said: Any = None) -> None:
        """A member's model is loaded. said: what its start returned."""
        if (member := self.members.get(name)) and member.state == "starting":
            member.state, member.said = "loaded", said

    def admit(self, name: str) -> None:
        """A loaded member may work."""
        self.worked()
        if (member := self.members.get(name)) and member.state == "loaded":
            member.state, self._failed_starts = "ready", 0

    def pick(
        self,
        *,
        alone: bool = False,
        bound: int | None = None,
        fit: Callable[[Member], bool] = lambda member: True,
        best: Callable[[Member], bool] = lambda member: False,
    ) -> Member | None:
        """The ready member with the least work that takes one more call; None if there is none now. alone: one that has
        no other work and gets none; the least loaded one is kept free for it. bound: in place of the pool's own. fit:
        members that it returns False for get nothing. best: one that it returns True for comes before the others, as
        long as it has room."""
        ready = [member for member in self.ready if fit(member)]
        if alone:
            free = [member for member in ready if not member.reserved or not member.flying]
            if not free:
                return None
            chosen = min(free, key=lambda member: (not member.reserved, len(member.flying)))
            chosen.reserved = True
            return None if chosen.flying else chosen
        most = self.bound if bound is None else bound
        free = [member for member in ready if len(member.flying) < most and not member.reserved]
        # What failed at a member is tried elsewhere, if it can be.
        return min(free, key=lambda member: (member.errors > 0, not best(member), len(member.flying)), default=None)

    def took(self, member: Member, id: str, attempt: int) -> None:
        """A call of work was made to a member."""
        self.worked()
        member.flying.add((id, attempt))

    def gave(self, name: str, id: str, attempt: int, *, error: bool = False) -> None:
        """A call of work ended. error: in an error; after some of them the member is replaced. What is done ahead says
        nothing of that, as it is done again where it failed."""
        member = self.members.get(name)
        if member is None:
            return
        self.worked()
        member.flying.discard((id, attempt))
        member.reserved = member.reserved and bool(member.flying)
        if attempt != AHEAD:
            member.errors = member.errors + 1 if error else 0
        if member.errors >= ERRORS and not member.flying:
            self._remove(member, cause=f"{name} failed {ERRORS} times in turn")

    def died(self, name: str, cause: str) -> None:
        """A member died, or is given up. Raises ActorFailed if members keep dying before they are admitted."""
        member = self.members.get(name)
        if member is None:
            return
        self._remove(member, cause=cause)
        if member.state in ("starting", "loaded"):
            if self._now() >= self._failed_at + APART_S:
                self._failed_starts, self._failed_at = self._failed_starts + 1, self._now()
            if self._failed_starts >= FAILED_STARTS:
                raise ActorFailed(f"{self._failed_starts} {self.role}s in turn did not start: {cause}")

    def end(self) -> None:
        """End all members."""
        for member in self:
            self._remove(member)

    def _remove(self, member: Member, *, cause: str | None = None) -> None:
        self.worked()
        del self.members[member.name]
        self._starter.end(member.name, member.handle, cause=cause)
