"""Groups through rollouts and segmenters: dispatch to whoever has room, and what follows from how each call ended.

    ledger ──queued──► rollouts ──samples──► ledger ──sampled──► segmenters ──scored──► ledger
                     (least loaded)                             (least loaded)

A group is scored while others are sampled. Whatever becomes of the actors, each group is scored once, or put aside with
its cause.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from actors.calls import Call, Ended, Ref, Waiting
from actors.ledger import Entry, Ledger
from actors.pool import Member, Pool

Make = Callable[[Member, Entry], tuple[Ref, Ref]]
"""Calls a member to work on a group. Returns references of a receipt, which is small, and of what the call makes, which
stays where it is made."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """The key of a call of work."""

    stage: Literal["queued", "sampled"]
    """Where the group was when it was dispatched."""
    id: str
    attempt: int
    result: Ref


@dataclass(frozen=True, kw_only=True)
class Post:
    """One stage's workers."""

    pool: Pool
    make: Make
    doing: str
    seconds: float
    """Deadline of a call."""


class Collector:
    """Takes the groups of a ledger through both stages. The caller waits, and gives what ended to `heed`."""

    def __init__(self, ledger: Ledger, sampling: Post, scoring: Post, calls: Waiting) -> None:
        self.ledger = ledger
        self._posts: dict[Literal["queued", "sampled"], Post] = {"queued": sampling, "sampled": scoring}
        self._calls = calls

    def dispatch(self) -> None:
        """Make the calls that there is room for."""
        for stage, post in self._posts.items():
            for entry in self.ledger.waiting(stage):
                member = post.pool.pick(alone=entry.alone)
                if member is not None:
                    self._make(stage, post, member, entry)
                elif not entry.alone:
                    break  # there is room for none of those after it

    def _make(self, stage: Literal["queued", "sampled"], post: Post, member: Member, entry: Entry) -> None:
        attempt = self.ledger.begin(entry.id)
        post.pool.took(member, entry.id, attempt)
        receipt, result = post.make(member, entry)
        work = Work(stage=stage, id=entry.id, attempt=attempt, result=result)
        self._calls.add(receipt, Call(actor=member.name, doing=post.doing, seconds=post.seconds, key=work))

    def heed(self, ended: Ended) -> None:
        """A call of work ended."""
        work: Any = ended.call.key
        pool = self._posts[work.stage].pool
        pool.gave(ended.call.actor, work.id, work.attempt, error=ended.fault == "error")
        match ended.fault:
            case None:
                self.ledger.end(work.id, work.attempt, work.result)
            case "error":
                self.ledger.failed(work.id, work.attempt, ended.cause)
            case "lost":
                self.ledger.lost(work.id, work.attempt)
            case "died" | "late":
                self.gone(pool, ended.call.actor, ended.cause, (work.id, work.attempt))

    def gone(self, pool: Pool, actor: str, cause: str, *also: tuple[str, int]) -> None:
        """An actor died or is given up: all that it had is dispatched again. also: work of it that is no longer counted
        as in flight."""
        self._calls.forget(actor)
        for id, attempt in (*also, *pool.died(actor, cause)):
            self.ledger.died(id, attempt, cause)
