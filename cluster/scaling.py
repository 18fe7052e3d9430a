"""Scaling a run that is under way: `medreasoner scale RUN rollout=N segmenter=M`, from wherever the run's folder is.

The command leaves its wish in the folder, and the run's driver looks for one every second. Actors that are missing are
started and join when they are ready; those that are too many end their work first.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from umrg.atomic import write_text
from umrg.mistake import Mistake

ROLES = ("rollout", "segmenter")
_FILE = "scale.json"
_EVERY_S = 1.0


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

    def changed(self, wanted: Mapping[str, int]) -> dict[str, int]:
        """The counts that are to differ from `wanted`; looks once a second."""
        if self._now() < self._next:
            return {}
        self._next = self._now() + _EVERY_S
        return {role: count for role, count in _read(self._path).items() if wanted[role] != count}
