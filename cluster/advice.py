"""Who waits for whom in a run, and which of its pools should be larger, from the metrics of its steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

from cluster.timesheet import AWAITED, PHASES, share

RECENT = 20
"""Steps that advice looks back at."""
FEWEST = 3
"""Steps without which there is no advice: the first ones are slow in their own ways."""
AT_WORK = 0.7
"""Share of a pool's members that work while everything else waits for it, below which more of them would not help."""
WORTH = 0.05
"""Share of a step that one more actor must save to be advised."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """How a role spent the time of some steps."""

    seconds: float
    """Of these steps."""
    actors: float
    """How many there were, on average."""
    busy: float
    """Share of the time in which they had work, on average."""
    awaited: float
    """Share of the time in which everything else waited for them."""
    at_work: float = 1.0
    """Share of them that had work while everything else waited, on average."""

    @property
    def gain(self) -> float:
        """Share of a step that one more of them would save, at most: where all are at work and it is divided evenly."""
        return self.awaited / (round(self.actors) + 1) if self.at_work >= AT_WORK else 0.0


def loads(lines: Sequence[Mapping[str, float]]) -> dict[str, Load]:
    """By role, from the metrics of steps; empty if they have none of time by role, as those of earlier versions."""
    lines = [line for line in lines if "busy/learner" in line]
    steps = [sum(line.get(f"seconds/{phase}", 0.0) for phase in PHASES) for line in lines]
    if not (total := sum(steps)):
        return {}

    def load(role: str, phase: str) -> Load:
        waits = [line.get(f"seconds/{phase}", 0.0) for line in lines]
        at_work = [line.get(f"busy/{role}_awaited", 1.0) for line in lines]
        return Load(
            seconds=total,
            actors=_mean([line[f"actors/{role}"] for line in lines], steps),
            busy=_mean([line[f"busy/{role}"] for line in lines], steps),
            awaited=sum(waits) / total,
            at_work=_mean(at_work, waits),
        )

    return {role: load(role, phase) for role, phase in AWAITED.items()}


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    return share(sum(value * weight for value, weight in zip(values, weights, strict=True)), sum(weights))


@dataclass(frozen=True, kw_only=True)
class Advice:
    """Which actors a run should have more of."""

    role: str | None
    """None if none."""
    text: str


def advice_after(lines: Sequence[Mapping[str, float]]) -> Advice | None:
    """From the metrics of a run's steps: its newest ones, in which there were as many actors as in the last. None if
    they are too few."""
    newest = lines[-RECENT:]
    alike = list(takewhile(lambda line: _as_many(line, newest[-1]), reversed(newest)))
    found = loads(alike)
    return advice(found) if found and len(alike) >= FEWEST else None


def _as_many(line: Mapping[str, float], other: Mapping[str, float]) -> bool:
    return all(same(line.get(name, 0.0), other.get(name, 0.0)) for name in (f"actors/{role}" for role in AWAITED))


def same(actors: float, others: float) -> bool:
    """Whether two counts, of which one may be measured, are of as many actors."""
    return abs(actors - others) < 0.05


def advice(found: Mapping[str, Load]) -> Advice:
    """Which role one more actor of would shorten a step the most, in words, or why none would."""
    role = max(found, key=lambda each: found[each].gain)
    if found[role].gain >= WORTH:
        return Advice(role=role, text=_more(role, found[role]))
    awaited = max(found, key=lambda each: found[each].awaited)
    if found[awaited].at_work < AT_WORK:
        return Advice(role=None, text=_idle(awaited, found[awaited]))
    return Advice(role=None, text=f"no pool stands out: one more actor would save less than {WORTH:.0%} of a step")


def _more(role: str, load: Load) -> str:
    more = round(load.actors) + 1
    saved = f"would shorten a step the most, by {load.gain:.0%} at most"
    if role == "learner":
        return (
            f"everything else waited for the learner {load.awaited:.0%} of the time; one more rank {saved} "
            f"(learner.ranks={more} when the run starts or resumes)"
        )
    return (
        f"{role}s were busy {load.busy:.0%} of the time, and everything else waited for them {load.awaited:.0%}; one "
        f"more {saved} ({role}.actors={more}, or medreasoner scale RUN {role}={more} while it runs)"
    )


def _idle(role: str, load: Load) -> str:
    return (
        f"everything else waited for {role}s {load.awaited:.0%} of the time, but only {load.at_work:.0%} of them had "
        f"work meanwhile; more of them would not help, more groups a step (batch) would"
    )
