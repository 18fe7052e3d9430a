"""Peak memory of a run on this machine."""

import contextlib
import threading
from pathlib import Path

import psutil

_EVERY = 3.0


class MemoryWatch:
    """Samples the memory of this process and all its descendants, a local Ray cluster's actors among them. Shared pages
    count once (proportional set size, where the kernel tells it). peak: bytes."""

    def __init__(self) -> None:
        self.peak = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory-watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join(timeout=10)

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._ended.wait(_EVERY):
            with contextlib.suppress(psutil.Error):
                self.peak = max(self.peak, sum(map(_size, [me, *me.children(recursive=True)])))


def _size(process: psutil.Process) -> int:
    try:
        for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) << 10
        return 0
    except OSError:
        with contextlib.suppress(psutil.Error):
            return int(process.memory_info().rss)
        return 0
