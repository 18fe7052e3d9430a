"""Copies of files and folders that are elsewhere: each once on a machine, whole and checked, or not there.

    cache/SHA256/manifest.json   size and sha256 of each file; SHA256 is its own
    cache/SHA256/NAME            the file or folder
    cache/SHA256/uri             where it came from, if that is known to all machines
    cache/STAMP.uri              SHA256 of what a URI held, by the names, sizes and times of its files then

A copy is written aside under a lock and renamed. One that a killed process left is begun anew.
"""

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from umrg.atomic import named, write_text
from umrg.config import uri
from umrg.durable import MANIFEST, Damaged, FileRecord, manifest, manifest_digest
from umrg.mistake import Mistake
from umrg.remote import Remote

P = TypeVar("P", str, Path)

Reader = Callable[[str], Iterator[memoryview]]
"""The bytes of a file in pieces, by its name."""
SAY_EVERY_S = 10.0
PATIENCE_S = 3600.0
"""Seconds that a copy may take where no deadline is given."""
GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a file or folder holds, whose name begins the names of its files."""

    name: str
    files: Mapping[str, FileRecord]

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        return {name: record.size for name, record in self.files.items()}

    @property
    def digest(self) -> str:
        return hashlib.sha256(manifest(self.files)).hexdigest()

    @classmethod
    def of(cls, path: Path) -> "Contents":
        """Reads all of it. Hidden files are left out, and what links lead to is taken for them."""
        names = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())
        kept = [each for each in names if not any(part.startswith(".") for part in each.relative_to(path).parts)]
        with ThreadPoolExecutor(max_workers=4) as pool:
            records = list(pool.map(_record, kept))
        relative = [each.relative_to(path.parent).as_posix() for each in kept]
        return cls(name=path.name, files=dict(zip(relative, records, strict=True)))


class Cache:
    """The copies of a machine. folder: None for the user's own."""

    def __init__(self, folder: Path | None = None) -> None:
        own = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medreasoner"
        self.folder = (folder or own).absolute()

    def found(self, digest: str, name: str) -> Path | None:
        """The copy with a digest; None if there is none."""
        path = self.folder / digest / name
        return path if path.exists() else None

    def source(self, path: Path) -> str | None:
        """The URI that a copy is of; None if it has none, or is no copy."""
        told = path.parent / "uri"
        return told.read_text() if path.parent.parent == self.folder and told.is_file() else None

    def copying(
        self, name: str, sizes: Mapping[str, int], read: Reader, *, key: str, digest: str | None = None
    ) -> Generator[int, None, Path]:
        """Make a copy, in steps: yields how many bytes are there, and returns its path. While another process makes the
        same, nothing is done. key: of the lock. digest: that it must have; None if that is not known. Raises Damaged
        if it has another."""
        with named(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / f"{key}.lock").open("w") as lock:
                while not _locked(lock.fileno()):
                    yield 0
                if digest and (there := self.found(digest, name)):
                    return there
                aside = self.folder / f".{key}.part"
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir()
                records: dict[str, FileRecord] = {}
                before = 0
                for file, size in sizes.items():
                    records[file] = yield from _written(aside / file, read(file), before)
                    before += size
                    if records[file].size != size:
                        raise Damaged(f"{file} had {size} bytes, and has {records[file].size} now; start again")
                return self._put(aside, name, records, digest)

    def _put(self, aside: Path, name: str, records: Mapping[str, FileRecord], digest: str | None) -> Path:
        (aside / MANIFEST).write_bytes(manifest(records))
        found = manifest_digest(aside)
        if digest and found != digest:
            shutil.rmtree(aside)
            raise Damaged(f"the copy of {name} differs from what was to be copied, which has changed; start again")
        try:
            aside.replace(self.folder / found)
        except OSError:
            # The same may be there already, as the copy of another URI or of another time.
            if not self.found(found, name):
                raise
            shutil.rmtree(aside)
        return self.folder / found / name


def here(location: P, cache: Cache, say: Callable[[str], None] = print, *, seconds: float = PATIENCE_S) -> P:
    """A path as it is, and of a URI its copy on this machine, which is made unless it is there. say: takes a line every
    ten seconds. seconds: that a copy may take. Raises ValueError if the URI cannot be read, or not in time."""
    if (source := uri(location)) is None:
        return location
    remote = Remote.of(source)
    stamp = cache.folder / f"{remote.stamp}.uri"
    if stamp.is_file() and (path := cache.found(stamp.read_text(), remote.name)):
        return type(location)(path)
    began, total = time.monotonic(), sum(remote.sizes.values())
    said = began - SAY_EVERY_S
    steps = cache.copying(remote.name, remote.sizes, remote.read, key=remote.stamp)
    while True:
        try:
            done = next(steps)
        except StopIteration as stop:
            path = stop.value
            break
        there = progress(done, total) if done else "another process copies it"
        if time.monotonic() >= began + seconds:
            steps.close()
            raise Mistake(
                f"{source} was not copied within {seconds:g} s ({there}); copy it to a path that this machine has, or "
                "give a longer deadlines.start"
            )
        if time.monotonic() >= said + SAY_EVERY_S:
            said = time.monotonic()
            say(f"copying {source}: {there}")
        if not done:
            time.sleep(0.2)
    write_text(path.parent / "uri", source)
    write_text(stamp, path.parent.name)
    return type(location)(path)


def progress(done: int, total: int) -> str:
    """`3.2 of 15.4 GiB`."""
    return f"{done / GIB:.1f} of {total / GIB:.1f} GiB"


def _written(path: Path, pieces: Iterator[memoryview], before: int) -> Generator[int, None, FileRecord]:
    """Write a file, and yield after each piece how many bytes are there. before: those of other files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sha, size = hashlib.sha256(), 0
    with path.open("wb") as out:
        for piece in pieces:
            out.write(piece)
            sha.update(piece)
            size += len(piece)
            yield before + size
        out.flush()
        os.fsync(out.fileno())
    return FileRecord(size=size, sha256=sha.hexdigest())


def _record(path: Path) -> FileRecord:
    with path.open("rb") as file:
        return FileRecord(size=os.fstat(file.fileno()).st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())


def _locked(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
