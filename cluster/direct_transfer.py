"""Weights from GPU to GPU: the driver's part, the same for every way that vLLM has.

A group has fixed members, so one that joins, leaves or dies is a matter of the next group. Whoever calls sees to it
that no member is given other weights meanwhile.
"""

from collections.abc import Sequence
from typing import Any

from actors.calls import Calls
from actors.engine_report import Receiver, Sent
from actors.failures import TransferFailed
from actors.pool import Member
from actors.pools import LearnerDied, LearnerPool
from cluster.config import TrainConfig

ANSWER = 60
"""Seconds within which an engine answers whose update was given up; one that does not is blocked by it."""
FAILURES = 3
"""Transfers that fail one after another before no other is tried."""


class DirectTransfer:
    """The group of the learner and the engines that it sends weights to. `forget` must be called where the learner has
    started again."""

    def __init__(self, learner: LearnerPool, config: TrainConfig) -> None:
        self._learner, self._direct = learner, config.transfer
        self._workers, self._seconds = config.rollout.tensor_parallel, min(ANSWER, config.deadlines.step)
        self._handles: dict[str, Any] = {}
        self._failures = 0
        self.given_up: str | None = None
        """Why no other transfer is to be tried, in words."""

    @property
    def members(self) -> tuple[str, ...]:
        """Names of the engines in the group; () for no group."""
        return tuple(self._handles)

    def send(self, version: int, members: Sequence[Member], *, everything: bool) -> Sent:
        """Send the learner's weights to these engines, in another group if they are not those of the last. everything:
        as in `LearnerPool.weights`; needed by engines that have received none. Raises TransferFailed if they did not
        arrive; `abandon` then says which engines are of no use. The caller compares the receipts."""
        wanted = {member.name: member.handle for member in members}
        try:
            if wanted != self._handles:
                self.forget()
                self._learner.connect(self._direct, self._receivers(wanted))
                self._handles = wanted
            sent = self._learner.send(version, everything=everything)
        except (TransferFailed, LearnerDied) as error:
            self.forget()
            self._failures += 1
            if self._failures == FAILURES:
                self.given_up = (
                    f"transfer={self._direct} failed {FAILURES} times in turn, and the weights go through host memory "
                    f"from now on; mend it, or set transfer to host: {error}"
                )
            raise
        self._failures = 0
        return sent

    def abandon(self, members: Sequence[Member]) -> dict[str, str]:
        """Let engines go on after a transfer that failed. Returns why one cannot, by its name: it holds weights of two
        versions, waits for the rest of them, or has died."""
        calls = {member.name: member.handle.abandon_update.remote() for member in members}
        found = Calls().settle(calls, seconds=self._seconds, doing="giving an update of weights up")
        return {name: ended.cause for name, ended in found.items() if ended.fault}

    def forget(self) -> None:
        """The next weights go through another group."""
        self._handles = {}

    def _receivers(self, handles: dict[str, Any]) -> list[Receiver]:
        return [Receiver(name=name, handle=handle, workers=self._workers) for name, handle in handles.items()]
