"""How the time of training steps is spent, by phase and by role.

phase      who works                                      everything else waits for
rollout    rollouts, and segmenters on what is sampled    rollouts
score      segmenters, on what is left                    segmenters
learn      the learner                                    the learner
sync       learner and rollouts, on new weights           both
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from actors.experts.desk import CacheUse
from actors.pool import Pool, Worked

AWAITED = {"rollout": "rollout", "segmenter": "score", "learner": "learn"}
"""The phase in which everything else waits for a role."""
PHASES = ("rollout", "score", "learn", "sync")
"""Whose seconds are a step's time, evaluations and checkpoints left out."""


class Clock:
    """Sums the seconds of each phase, over the whole run and since the last `lap`. now: a monotonic clock, in
    seconds."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.now = now
        self.total: dict[str, float] = {}
        self._lap: dict[str, float] = {}
        self._lap_start = now()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase. Phases do not nest."""
        start = self.now()
        try:
            yield
        finally:
            seconds = self.now() - start
            for sums in (self.total, self._lap):
                sums[name] = sums.get(name, 0.0) + seconds

    def lap(self) -> dict[str, float]:
        """Seconds of each phase since the last lap and, as "step", of all the time that passed."""
        now = self.now()
        seconds = {**self._lap, "step": now - self._lap_start}
        self._lap, self._lap_start = {}, now
        return seconds


@dataclass(frozen=True, kw_only=True)
class _Spell:
    """One phase, once."""

    phase: str
    seconds: float
    worked: Mapping[str, Worked]
    """By role."""


class Timesheet:
    """Times the phases of a step by the run's clock, and the members of pools meanwhile. What happens outside of its
    phases, such as an evaluation, does not count."""

    def __init__(self, clock: Clock, pools: Sequence[Pool], *, ranks: int) -> None:
        """ranks: of the learner."""
        self._clock, self._pools, self._ranks = clock, pools, ranks
        self._spells: list[_Spell] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase; one that raises is not counted."""
        start, before = self._clock.now(), [pool.worked() for pool in self._pools]
        with self._clock.phase(name):
            yield
        worked = {pool.role: pool.worked() - was for pool, was in zip(self._pools, before, strict=True)}
        self._spells.append(_Spell(phase=name, seconds=self._clock.now() - start, worked=worked))

    def lap(self) -> dict[str, float]:
        """The metrics of the step that ends here, in which all phases since the last lap were.

        actors/ROLE: how many there were, on average over the step.
        busy/ROLE: share of the step in which they had work, on average.
        busy/ROLE_awaited: the same of the time in which everything else waited for them.
        """
        spells, self._spells = self._spells, []
        step = sum(each.seconds for each in spells)
        metrics = {}
        for role in [pool.role for pool in self._pools]:
            worked = _worked(spells, role)
            metrics[f"actors/{role}"] = share(worked.there, step)
            metrics[f"busy/{role}"] = share(worked.busy, worked.there)
            worked = _worked([each for each in spells if each.phase == AWAITED[role]], role)
            metrics[f"busy/{role}_awaited"] = share(worked.busy, worked.there)
        learn = sum(each.seconds for each in spells if each.phase == AWAITED["learner"])
        return {**metrics, "actors/learner": float(self._ranks), "busy/learner": share(learn, step)}


def cache_metrics(use: CacheUse) -> dict[str, float]:
    """The metrics of a step's use of the segmenters' caches of embeddings.

    segmenter/embedded: images that the expert embedded.
    segmenter/cache_hits, segmenter/cache_misses: images that were looked up and found, or not. One that is embedded
    ahead is missed then, and found when its group is scored.
    segmenter/cache_read: of the hits, those that came from disk.
    segmenter/cache_hit_rate: share of hits.
    segmenter/cache_mib: what all segmenters keep in memory at the step's end.
    """
    return {
        "segmenter/embedded": float(use.embedded),
        "segmenter/cache_hits": float(use.hits),
        "segmenter/cache_misses": float(use.misses),
        "segmenter/cache_read": float(use.read),
        "segmenter/cache_hit_rate": share(use.hits, use.hits + use.misses),
        "segmenter/cache_mib": use.bytes / 2**20,
    }


def _worked(spells: Sequence[_Spell], role: str) -> Worked:
    return sum((each.worked[role] for each in spells), Worked())


def share(part: float, whole: float) -> float:
    """0 of nothing."""
    return part / whole if whole else 0.0
