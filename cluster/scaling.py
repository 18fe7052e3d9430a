"""Scaling a run that is under way: by `medreasoner scale RUN rollout=N segmenter=M`, from wherever the run's folder is,
and by itself (`autoscale`), as waiting is measured.

The command leaves its wish in the folder, and the run's driver looks for one every second. Either changes how many
actors are wanted: those that are missing are started and join when they are ready; those that are too many end their
work first.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from actors.config import Autoscale
from cluster.advice import AT_WORK, Load, loads, same
from cluster.run_folder import kept_values
from umrg.atomic import write_text
from umrg.mistake import Mistake

ROLES = ("rollout", "segmenter")
_FILE = "scale.json"
_EVERY_S = 1.0

STEPS = 3
"""Steps with a constant number of actors that must agree before it changes."""
LONG = {"rollout": 0.4, "segmenter": 0.1}
"""Share of a step above which everything else waits too long for a role. Segmenters cost little."""
IDLE = 0.15
"""Share of a step below which a role is hardly busy."""


def ask(run: Path, wishes: Sequence[str]) -> dict[str, int]:
    """Leave a wish for a run. wishes: `role=count`. Raises ValueError for one that is none, and if the run is not under
    way."""
    wanted = dict(_wish(text) for text in wishes)
    if not wanted:
        raise Mistake("say how many, such as rollout=2 segmenter=4")
    summary = run / "summary.json"
    if not summary.exists():
        raise Mistake(f"{run} is no run's folder; give one that has a summary.json")
    status = json.loads(summary.read_text()).get("status")
    if status != "running":
        raise Mistake(f"the run {run} is {status}; only one that is running can be scaled")
    if "rollout" in wanted and (run / "config.yaml").exists() and kept_values(run).get("placement") == "colocated":
        raise Mistake(f"the run {run} has one engine beside each rank of its learner; only its segmenters are scaled")
    write_text(run / _FILE, json.dumps({**_read(run / _FILE), **wanted}))
    return wanted


def _wish(text: str) -> tuple[str, int]:
    role, _, count = text.partition("=")
    if role not in ROLES or not count.isdecimal() or int(count) < 1:
        raise Mistake(f"{text!r} is not understood; give {' or '.join(f'{role}=N' for role in ROLES)}, N from 1 on")
    return role, int(count)


def _read(path: Path) -> dict[str, int]:
    return dict(json.loads(path.read_text())) if path.exists() else {}


class Wishes:
    """What a run was asked for since it began. now: a monotonic clock, in seconds."""

    def __init__(self, run: Path, now: Callable[[], float] = time.monotonic) -> None:
        self._path, self._now = run / _FILE, now
        self._path.unlink(missing_ok=True)  # what an earlier driver was asked for
        self._next = now()

    def heard(self) -> dict[str, int]:
        """Counts by role; looks once a second, and hears nothing in between."""
        if self._now() < self._next:
            return {}
        self._next = self._now() + _EVERY_S
        return _read(self._path)


class Autoscaler:
    """One role's number of actors, by what each step's waiting was."""

    def __init__(self, role: str, bounds: Autoscale) -> None:
        self._bounds, self._long = bounds, LONG[role]
        self._loads: list[Load] = []

    def after(self, load: Load, wanted: int) -> tuple[int, str] | None:
        """How many there should be after one more step, and why; None for as many as before. load: of that step."""
        # Whoever came, went or died in this step distorts it; and the number changes only once the last change is felt.
        self._loads = [*self._loads, load][-STEPS:] if same(load.actors, wanted) else []
        change = self._change(wanted) if len(self._loads) == STEPS else None
        if change:
            self._loads = []
        return change

    def _change(self, wanted: int) -> tuple[int, str] | None:
        awaited, busy = [load.awaited for load in self._loads], [load.busy for load in self._loads]
        at_work = min(load.at_work for load in self._loads)
        if min(awaited) > self._long and at_work >= AT_WORK and wanted < self._bounds.max:
            return wanted + 1, f"because everything else waited for them at least {min(awaited):.0%} of each step"
        # With one fewer they would be waited for so much longer, at most; it must not make the pool grow again.
        fewer = wanted - 1
        if max(busy) < IDLE and fewer >= self._bounds.min and max(awaited) * wanted / fewer < 0.8 * self._long:
            return fewer, f"because they were busy at most {max(busy):.0%} of each step"
        return None


class Scaling:
    """Changes how many actors a run wants. Whoever asks for a number ends that role's autoscaling."""

    def __init__(
        self,
        wishes: Wishes,
        autoscalers: Mapping[str, Autoscaler],
        wanted: dict[str, int],
        say: Callable[[str], None],
    ) -> None:
        """wanted: by role; changed in place. say: prints a line."""
        self._wishes, self._autoscalers, self._wanted, self._say = wishes, dict(autoscalers), wanted, say

    def heed(self) -> None:
        """What the run was asked for."""
        for role, count in self._wishes.heard().items():
            if self._autoscalers.pop(role, None):
                self._say(f"{role}s are not autoscaled any more: {count} were asked for")
            self._want(role, count, "as asked for")

    def follow(self, metrics: Mapping[str, float]) -> None:
        """What a step's metrics say."""
        found = loads([metrics])
        for role, autoscaler in self._autoscalers.items():
            if change := autoscaler.after(found[role], self._wanted[role]):
                self._want(role, *change)

    def _want(self, role: str, count: int, why: str) -> None:
        if count != self._wanted[role]:
            self._say(f"{role}s: {self._wanted[role]} -> {count}, {why}")
            self._wanted[role] = count
