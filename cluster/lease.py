"""The lease on a run's folder: one driver at a time, on any machine that shares the storage.

    runs/.NAME.lease              its holder, with a heartbeat count that the holder raises every few seconds
    runs/.NAME.lease.after-ID     a claim to succeed holder ID; once renamed to the lease, it is the lease

Both lie beside the folder, so that nothing in it is touched before the lease is held. They are created with O_EXCL,
which network file systems honour too. A holder writes into the file that it created and keeps open; after another
driver has taken over, that file is no longer the lease. Clocks of two machines are never compared: a holder on another
machine counts as gone once its heartbeat stands still while the waiting driver watches.
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
from umrg.mistake import Mistake

BEAT, LOOK, PATIENCE, SILENCE = 5.0, 1.0, 30.0, 60.0
"""Seconds between two heartbeats, between two looks of a waiting driver, until it gives up on a living holder, and
without a heartbeat until a holder on another machine counts as gone."""

_BYTES = 1024
"""Length of every record, so that a new one overwrites the old one completely."""


class LeaseLost(RuntimeError):
    """Another driver has the run's folder now."""


class Process(Config):
    """A process on some machine."""

    host: str
    """Name for messages."""
    machine: str
    """Boot and process namespace, within which `pid` and `started` identify a process."""
    pid: int
    started: int
    """Clock ticks after boot; distinguishes processes that reuse a pid."""


class Holder(Config):
    """The content of a lease."""

    id: str
    """Of this lease, never reused."""
    process: Process | None
    """None if the record cannot be read."""
    since: str
    """Local time for messages."""
    beats: int = 0
    """Heartbeat count; it changes as long as the holder lives."""

    def __str__(self) -> str:
        if self.process is None:
            return "a driver whose lease cannot be read"
        return f"process {self.process.pid} on {self.process.host} since {self.since}"


class Machine:
    """This machine's processes and clock; a seam for tests."""

    def process(self) -> Process:
        """The calling process."""
        pid = os.getpid()
        return Process(host=socket.gethostname(), machine=self._id(), pid=pid, started=_stat(pid)[1])

    def gone(self, process: Process) -> bool | None:
        """Whether a process has ended; None if it is on another machine."""
        if process.machine != self._id():
            return None
        try:
            os.kill(process.pid, 0)
            state, started = _stat(process.pid)
        except ProcessLookupError:
            return True
        except (PermissionError, FileNotFoundError):
            # The process exists and belongs to another user.
            return False
        return state in "ZX" or started != process.started

    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def _id(self) -> str:
        # Each container of a machine numbers its processes on its own.
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"


@dataclass
class Lease:
    """A lease that is held."""

    path: Path
    holder: Holder
    file: int

    @classmethod
    def made(cls, path: Path, holder: Holder) -> Self | None:
        """Create the file with that holder; None if it exists."""
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
        """Write a heartbeat."""
        self.holder = self.holder.model_copy(update={"beats": self.holder.beats + 1})
        self.write()

    def ours(self) -> bool:
        now = holder_of(self.path)
        return now is not None and now.id == self.holder.id

    def hold(self) -> None:
        """Raises LeaseLost if another driver has taken over."""
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


def lease_path(folder: Path) -> Path:
    """Where the lease on a run's folder lies."""
    return folder.resolve().with_name(f".{folder.resolve().name}.lease")


@contextmanager
def leased(folder: Path, machine: Machine | None = None) -> Iterator[Lease]:
    """Hold the lease on a run's folder, which need not exist yet. Raises ValueError naming the holder if taken."""
    machine = machine or Machine()
    path = lease_path(folder)
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
        # Joined before the file is closed, because another file may then get its descriptor.
        beating.join()
        lease.release()


def take(path: Path, machine: Machine, *, say: Callable[[Holder], object] = lambda holder: None) -> Lease:
    """Take the lease once it is free or its holder is gone. Raises ValueError if a living holder keeps it."""
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
                raise _held(holder, path)
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
    """The holder of a lease: the one it names or, if there are claims to succeed that one, the last claimant."""
    holder = _read(path)
    while holder is not None and (heir := _read(_claim(path, holder))):
        holder = heir
    return holder


def _succeed(path: Path, gone: Holder, own: Holder) -> Lease | None:
    """Succeed a holder that is gone; None if another driver was quicker: only one of two can create the claim."""
    claim = Lease.made(_claim(path, gone), own)
    if claim is None:
        return None
    lease = Lease(path, own, claim.file)
    if not lease.ours():
        # A stale claim: the holder it succeeds has been succeeded already.
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
    """silent: seconds for which the caller has seen no heartbeat."""
    gone = machine.gone(holder.process) if holder.process else None
    return silent >= SILENCE if gone is None else gone


def refuse_held(folder: Path) -> None:
    """Raise ValueError where a driver on this machine, which lives, holds the lease on a run's folder."""
    path = lease_path(folder)
    holder = holder_of(path)
    if holder is not None and holder.process is not None and Machine().gone(holder.process) is False:
        raise _held(holder, path)


def _held(holder: Holder, path: Path) -> Mistake:
    return Mistake(f"the run is held by {holder} ({path}); wait for it, end it, or give another name=…")


def _known_to_live(holder: Holder, first: Holder | None, machine: Machine) -> bool:
    """first: the holder as first read; one that differs has written a heartbeat since."""
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
        # Not written yet, or its writer was killed before it was.
        return Holder(id="unreadable", process=None, since="")


def _stat(pid: int) -> tuple[str, int]:
    """A process's state (Z or X once it has ended) and its start in clock ticks after boot."""
    state, *numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return state, int(numbers[18])


def _beat(lease: Lease, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        # A file server may be away for a moment. If it stays away the lease is lost, which `hold` notices.
        with suppress(OSError):
            lease.beat()
