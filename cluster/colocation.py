"""Shared GPUs: engines and ranks that take turns (`placement: colocated`).

             sampling and scoring          learning            weights           sampling …
engine i     weights, KV cache     ─sleep─► nothing    ─wake─► weights  ─wake──► weights, KV cache
rank i       weights                       weights, state      weights           weights
                                    ─unpark─►          ─park─►
"""

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from actors.calls import Calls
from actors.config import DeadlineConfig
from actors.failures import ActorFailed, DeadlinePassed
from actors.gpus import Place
from umrg.mistake import Mistake

if TYPE_CHECKING:
    from cluster.workers import Workers


class Colocation:
    """The turns of a colocated run. The driver says when each begins. now: a monotonic clock, in seconds."""

    def __init__(
        self, workers: "Workers", deadlines: DeadlineConfig, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._workers, self._deadlines, self._now = workers, deadlines, now
        # Those of the start fell asleep before the ranks loaded (`fall_asleep`).
        self._asleep = {member.name for member in workers.rollouts if member.state == "ready"}

    def before_learning(self) -> None:
        """Engines sleep, and the learner takes its state back. May be called again before `after_learning`. Raises
        DeadlinePassed if an engine that is starting does not get ready."""
        self.before_restart()
        self._workers.learner.unpark()

    def before_restart(self) -> None:
        """Engines sleep, whatever has become of the learner."""
        self._await_starting()
        for member in self._workers.rollouts.loaded:
            # It loses the weights of the model's folder, and gets the next ones with all others, before there is work.
            self._workers.rollouts.admit(member.name)
        self._asleep = {member.name for member in self._workers.rollouts}
        self._of_engines("sleep", "falling asleep")

    def after_learning(self, send: Callable[[], None]) -> None:
        """The learner gives its GPUs away, and engines go on with the weights that `send` sends them, which must be
        all."""
        self._workers.learner.park(state=self._workers.parks)
        self._of_engines("wake_weights", "waking")
        send()
        self._workers.learner.park(state=self._workers.parks)  # what the export took, before the KV cache needs it
        self._of_engines("wake", "waking")

    def _await_starting(self) -> None:
        """An engine that started beside a learner at work would find its GPU full, and one that is being sent weights
        must not fall asleep before it has them all."""
        until = self._now() + self._deadlines.start
        while starting := [each.name for each in self._workers.rollouts if each.state == "starting" or each.taking]:
            if self._now() > until:
                raise DeadlinePassed(
                    f"{', '.join(starting)} did not start within {self._deadlines.start:g} s, for which the learner "
                    "waits that shares its GPU"
                )
            self._workers.calls.turn()

    def _of_engines(self, method: str, doing: str) -> None:
        """Call a method of the engines that were put to sleep, and not of those that have come since. One that dies is
        replaced later."""
        pool = self._workers.rollouts
        refs = {each.name: getattr(each.handle, method).remote() for each in pool if each.name in self._asleep}
        for name, ended in self._workers.calls.settle(refs, seconds=self._deadlines.step, doing=doing).items():
            if ended.fault == "error":
                raise ActorFailed(ended.cause) from ended.error
            if ended.fault:
                pool.died(name, ended.cause)


def fall_asleep(engines: Mapping[str, Any], calls: Calls, deadlines: DeadlineConfig) -> None:
    """Let engines that have just started sleep, so that ranks can load beside them. engines: handles by name."""
    refs = {name: handle.sleep.remote() for name, handle in engines.items()}
    calls.gather(refs, seconds=deadlines.step, doing="falling asleep")


def refuse_apart(places: Mapping[str, Place]) -> None:
    """Raise ValueError unless each rank was given the GPU of the engine with its index."""
    for name, place in places.items():
        role, _, index = name.partition(" ")
        other = places.get(f"rollout {index}")
        if role != "learner" or other is None:
            continue
        if (place.node, place.given) != (other.node, other.given):
            raise Mistake(
                f"{name} was given {_where(place)} and rollout {index} {_where(other)}, and placement=colocated needs "
                "one GPU for both; set placement to disaggregated"
            )


def _where(place: Place) -> str:
    return f"GPU {', '.join(place.given) or 'none'} of {place.address or place.node}"
