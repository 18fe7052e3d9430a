"""Groups through rollouts and segmenters: dispatch to whoever has room, and what follows from how each call ends.

    ledger ──queued──► rollouts ──samples──► ledger ──sampled──► segmenters ──scored──► ledger
                     (least loaded)                             (least loaded)

A group is scored while others are sampled. Whatever becomes of the actors, each group is scored once, or put aside with
its cause.

Segmenters that have nothing to do prepare for groups that are yet to come to them, once for each, and for no more than
they can keep until then. Nothing depends on how that ends: what failed ahead fails again when the group is scored,
where it counts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from actors.calls import Call, Ended, Ref, Waiting
from actors.ledger import Entry, Ledger
from actors.pool import AHEAD, Member, Pool

Waits = Literal["queued", "sampled"]
"""Where a group waits to be dispatched."""


@dataclass(frozen=True, kw_only=True)
class Post:
    """The workers of one stage."""

    pool: Pool
    make: Callable[[Member, Entry], tuple[Ref, Ref]]
    """Calls a member to work on a group. Returns two references: of what the driver is given when it ends, and of what
    goes on to the next stage."""
    doing: str
    """As in `Call`."""
    seconds: float
    """Deadline of a call."""
    bound: int | None = None
    """Calls that a member has at the same time; None for the pool's own bound."""
    fit: Callable[[Member], bool] = lambda member: True
    """Whether a member may be given work."""
    best: Callable[[Entry, Member], bool] = lambda entry, member: False
    """Whether a group is better given to this member than to others."""
    ahead: Callable[[Member, Entry], Ref] | None = None
    """Calls a member to prepare for a group that is yet to come to it, which returns for how many groups a member keeps
    what it prepared; None where there is nothing to prepare."""
    fault: Callable[[Entry, Any], str | None] = lambda entry, given: None
    """What is wrong with what the driver was given, in words; None if it is sound."""


class Collector:
    """Takes the groups of a ledger through both stages. Between two calls of `dispatch` the caller waits."""

    def __init__(self, ledger: Ledger, sampling: Post, scoring: Post, calls: Waiting) -> None:
        self.ledger = ledger
        self._posts: dict[Waits, Post] = {"queued": sampling, "sampled": scoring}
        self._calls = calls
        self._unprepared = dict(self.ledger.entries) if scoring.ahead else {}

    def dispatch(self) -> None:
        """Make the calls that there is room for."""
        for stage, post in self._posts.items():
            for entry in self.ledger.waiting(stage):
                best = partial(post.best, entry)
                member = post.pool.pick(alone=entry.alone, bound=post.bound, fit=post.fit, best=best)
                if member is not None:
                    self._make(post, member, entry)
                elif not entry.alone:
                    break  # there is room for none of those after it
        self._look_ahead()

    def _look_ahead(self) -> None:
        """Give segmenters that have nothing to do one group each that is yet to be sampled, unless one of them is
        prepared for it by an earlier one."""
        post = self._posts["sampled"]
        idle = [member for member in post.pool.idle if self._keeps_more(member)] if self._unprepared else []
        while idle and self._unprepared:
            entry = self._unprepared.pop(next(iter(self._unprepared)))
            coming = entry.stage in ("queued", "sampling")
            if coming and not any(post.best(entry, member) for member in post.pool.ready):
                self._prepare(post, idle.pop(0), entry)

    def _keeps_more(self, member: Member) -> bool:
        """Whether a member keeps what it prepares next until the group comes to it. Half of what it keeps is left to
        groups that come to it unprepared. A member that has not said how much it keeps prepares for one."""
        ended = [entry for entry in member.prepared if entry.stage in ("scored", "aside")]
        member.prepared.difference_update(ended)
        return len(member.prepared) < (1 if member.keeps is None else member.keeps // 2)

    def _prepare(self, post: Post, member: Member, entry: Entry) -> None:
        assert post.ahead is not None
        member.prepared.add(entry)
        post.pool.took(member, entry.id, AHEAD)
        then = partial(self._was_prepared, post, entry)
        call = Call(actor=member.name, doing="preparing", seconds=post.seconds, then=then)
        self._calls.add(post.ahead(member, entry), call)

    def _was_prepared(self, post: Post, entry: Entry, ended: Ended) -> None:
        actor, cause = ended.call.actor, ended.cause
        post.pool.gave(actor, entry.id, AHEAD)
        if ended.fault is None and (member := post.pool.members.get(actor)):
            member.keeps = ended.result
        elif ended.fault in ("died", "late"):
            post.pool.died(actor, cause)
            self._calls.gone(actor, cause)

    def _make(self, post: Post, member: Member, entry: Entry) -> None:
        attempt = self.ledger.begin(entry.id)
        post.pool.took(member, entry.id, attempt)
        given, onward = post.make(member, entry)
        then = partial(self._ended, post, entry, attempt, onward)
        self._calls.add(given, Call(actor=member.name, doing=post.doing, seconds=post.seconds, then=then))

    def _ended(self, post: Post, entry: Entry, attempt: int, onward: Ref, ended: Ended) -> None:
        actor, fault, cause = ended.call.actor, ended.fault, ended.cause
        if fault is None and (wrong := post.fault(entry, ended.result)):
            fault, cause = "error", f"{actor}, {post.doing}: {wrong}"
        post.pool.gave(actor, entry.id, attempt, error=fault == "error")
        match fault:
            case None:
                self.ledger.end(entry.id, attempt, (ended.result, onward))
            case "error":
                self.ledger.failed(entry.id, attempt, cause)
            case "lost":
                self.ledger.lost(entry.id, attempt)
            case "mistake":
                pass  # the run ends
            case "died" | "late":
                self.ledger.died(entry.id, attempt, cause)
                post.pool.died(actor, cause)
                self._calls.gone(actor, cause)
