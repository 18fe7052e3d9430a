"""Phases timed by name; the names are the metrics."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Clock:
    """Adds up the seconds of each phase: of the whole run, and since the last `lap`. now: seconds since any moment."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.now = now
        self.total: dict[str, float] = {}
        self._lap: dict[str, float] = {}
        self._lap_start = now()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase; phases are not nested."""
        start = self.now()
        try:
            yield
        finally:
            seconds = self.now() - start
            for sums in (self.total, self._lap):
                sums[name] = sums.get(name, 0.0) + seconds

    def lap(self) -> dict[str, float]:
        """Seconds of each phase since the last lap, and "step", of all that passed."""
        now = self.now()
        seconds = {**self._lap, "step": now - self._lap_start}
        self._lap, self._lap_start = {}, now
        return seconds
