"""Files written by a thread while training goes on."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from umrg.durable import Disk, FileRecord, parents, write_durably

Records = Mapping[str, FileRecord]


@dataclass(frozen=True, kw_only=True)
class FilePart:
    """A file to write. name: its path in the folder. data: makes its bytes; called by the thread, once."""

    name: str
    data: Callable[[], bytes]


class BackgroundWriter:
    """Writes one set of files at a time."""

    def __init__(self, disk: Disk | None = None) -> None:
        self._disk = disk or Disk()
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[Records] | None = None

    def begin(self, folder: Path, parts: Sequence[FilePart]) -> None:
        """Start to write; what was begun before must have been collected by `written`."""
        assert self._writing is None, "the files begun before are still being written"
        self._writing = self._pool.submit(self._write, folder, list(parts))

    def written(self, seconds: float = 0.0) -> Records | None:
        """Once, what `begin` wrote; None where it is not written within so many seconds. Raises whatever stopped it."""
        assert self._writing is not None, "nothing is being written"
        if not wait([self._writing], timeout=seconds).done:
            return None
        writing, self._writing = self._writing, None
        return writing.result()

    def _write(self, folder: Path, parts: list[FilePart]) -> Records:
        records = {}
        for parent in parents([part.name for part in parts]):
            self._disk.make_folder(folder / parent)
        while parts:
            # Given up one by one, for each holds memory.
            part = parts.pop(0)
            records[part.name] = write_durably(self._disk, folder / part.name, part.data())
        for parent in parents(records):
            self._disk.sync(folder / parent)
        return records
