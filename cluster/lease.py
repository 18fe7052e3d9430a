"""Who has a run's folder: one driver at a time, on whatever machine.

    runs/.NAME.lease              its holder, with a count that the holder raises every few seconds
    runs/.NAME.lease.after-ID     a claim to what the holder ID left behind; renamed to the lease, it is the lease

Both lie beside the folder, so that nothing in it is touched before the lease is held. Files are made exclusively, which
file servers too keep to. The holder writes into the file that it made and keeps open: once another has taken its
place, that is no longer the lease. Clocks of two machines are never compared: whether a holder elsewhere is gone is
told by its count standing still while the one who waits looks on.
"""

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import ValidationError

from umrg.atomic import named
from umrg.config import Config

BEAT, LOOK, PATIENCE, SILENCE = 5.0, 1.0, 30.0, 60.0
"""Seconds: between two beats of a holder, between two looks of one who waits, until a living holder is no longer waited
for, and after which a holder on another machine that does not beat counts as gone."""

_BYTES = 1024
"""Every record is as long, so that one written over another covers it."""


class LeaseLost(RuntimeError):
    """Another driver has the run's folder now."""


class Process(Config):
    """host: for people. machine: within which pid and started tell processes apart. started: ticks after boot."""

    host: str
    machine: str
    pid: int
    started: int


class Holder(Config):
    """id: of one lease, never used again. since: for people. beats: changes as long as the holder lives."""

    id: str
    process: Process | None
    since: str
    beats: int = 0

    def __str__(self) -> str:
        if self.process is None:
            return "a driver whose lease cannot be read"
        return f"process {self.process.pid} on {self.process.host} since {self.since}"


class Machine:
    """This machine and its time."""

    def process(self) -> Process:
        """The one that asks."""
        pid = os.getpid()
        return Process(host=socket.gethostname(), machine=self._id(), pid=pid, started=_stat(pid)[1])

    def gone(self, process: Process) -> bool | None:
        """Whether a process has ended; None where it is of another machine."""
        if process.machine != self._id():
            return None
        try:
            os.kill(process.pid, 0)
            state, started = _stat(process.pid)
        except ProcessLookupError:
            return True
        except (PermissionError, FileNotFoundError):
            # It is there, and somebody else's.
            return False
        return state in "ZX" or started != process.started

    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def _id(self) -> str:
        # Containers of one machine number their processes each on its own.
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"


@dataclass
class Lease:
    """A lease that is held."""

    path: Path
    holder: Holder
    file: int

    @classmethod
    def made(cls, path: Path, holder: Holder) -> Self | None:
        """A new file with that holder; None where there is one already."""
        try:
            file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
        except FileExistsError:
            return None
        lease = cls(path, holder, file)
        try:
            lease.write()
        except OSError:
            lease.drop()
            raise
        return lease

    def write(self) -> None:
        os.pwrite(self.file, self.holder.model_dump_json().encode().ljust(_BYTES), 0)
        os.fsync(self.file)

    def beat(self) -> None:
        """Show that the holder lives."""
        self.holder = self.holder.model_copy(update={"beats": self.holder.beats + 1})
        self.write()

    def ours(self) -> bool:
        now = holder_of(self.path)
        return now is not None and now.id == self.holder.id

    def hold(self) -> None:
        """Raises LeaseLost where another has the folder by now."""
        if not self.ours():
            raise LeaseLost(f"{self.path} is held by {holder_of(self.path) or 'nobody'} now; this run ends here")

    def release(self) -> None:
        if self.ours():
            self.drop()
        else:
            os.close(self.file)

    def drop(self) -> None:
        self.path.unlink(missing_ok=True)
        os.close(self.file)


@contextmanager
def leased(folder: Path, machine: Machine | None = None) -> Iterator[Lease]:
    """Hold the lease on a run's folder, which need not be there yet. Raises ValueError that says who has it."""
    machine = machine or Machine()
    path = folder.resolve().with_name(f".{folder.resolve().name}.lease")
    path.parent.mkdir(parents=True, exist_ok=True)
    with named(folder, path):
        lease = take(path, machine, say=lambda holder: print(f"waiting: {folder} is held by {holder}", flush=True))
    ended = threading.Event()
    beating = threading.Thread(target=_beat, args=(lease, ended), name="lease", daemon=True)
    beating.start()
    try:
        yield lease
    finally:
        ended.set()
        # Before its file is closed, whose number another file may then have.
        beating.join()
        lease.release()


def take(path: Path, machine: Machine, *, say: Callable[[Holder], object] = lambda holder: None) -> Lease:
    """The lease, once it is free or its holder is gone. Raises ValueError where a living holder keeps it."""
    own = Holder(id=uuid.uuid4().hex[:16], process=machine.process(), since=time.strftime("%Y-%m-%d %H:%M:%S %Z"))
    began = machine.now()
    first = seen = holder_of(path)
    still_since = began
    if first is not None and not _gone(first, machine):
        say(first)
    while True:
        holder, now = holder_of(path), machine.now()
        if holder != seen:
            seen, still_since = holder, now
        if holder is None:
            lease = Lease.made(path, own)
        elif _gone(holder, machine, silent=now - still_since):
            lease = _succeed(path, holder, own)
        else:
            lives = _known_to_live(holder, first, machine)
            if lives and now - began >= PATIENCE:
                raise ValueError(f"the run is held by {holder} ({path}); wait for it, end it, or give another name=…")
            machine.sleep(LOOK)
            continue
        if lease is None:
            continue
        try:
            if lease.ours():
                return lease
        except OSError:
            lease.drop()
            raise


def holder_of(path: Path) -> Holder | None:
    """Who has a lease: whom it names or, where somebody claims what that one left behind, the last of those."""
    holder = _read(path)
    while holder is not None and (heir := _read(_claim(path, holder))):
        holder = heir
    return holder


def _succeed(path: Path, gone: Holder, own: Holder) -> Lease | None:
    """Take the place of one that is gone; None where another was quicker. Of two that claim, one makes the file."""
    claim = Lease.made(_claim(path, gone), own)
    if claim is None:
        return None
    lease = Lease(path, own, claim.file)
    if not lease.ours():
        # It claims what was left behind before somebody else came and went.
        claim.drop()
        return None
    with suppress(FileNotFoundError):
        claim.path.rename(path)
    if lease.ours():
        for passed in path.parent.glob(f"{path.name}.after-*"):
            passed.unlink(missing_ok=True)
    return lease


def _claim(path: Path, gone: Holder) -> Path:
    return path.with_name(f"{path.name}.after-{gone.id}")


def _gone(holder: Holder, machine: Machine, *, silent: float = 0.0) -> bool:
    """silent: seconds for which the one who asks has seen no beat."""
    gone = machine.gone(holder.process) if holder.process else None
    return silent >= SILENCE if gone is None else gone


def _known_to_live(holder: Holder, first: Holder | None, machine: Machine) -> bool:
    """first: what was read first, in whose place it may have beaten since."""
    here = holder.process is not None and machine.gone(holder.process) is not None
    return here or holder != first


def _read(path: Path) -> Holder | None:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        return Holder.model_validate_json(content)
    except ValidationError:
        # About to be written, or its writer ended before it was.
        return Holder(id="unreadable", process=None, since="")


def _stat(pid: int) -> tuple[str, int]:
    """A process's state, Z or X where it has ended, and when it began, in ticks after boot."""
    state, *numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return state, int(numbers[18])


def _beat(lease: Lease, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        # A file server that is away for a moment. Where it stays away, the lease is lost, which `hold` notices.
        with suppress(OSError):
            lease.beat()
