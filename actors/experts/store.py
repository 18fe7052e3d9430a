"""Embeddings on a disk that the actors of a node share: one file each, whole and checked, or not there.

    folder/SHA256.embedding   sha256 of the rest (32 bytes), then a safetensors file: features "0", "1", … in float16;
                              as metadata the expert's fingerprint, the key, and both sizes of the image
    folder/.lock              held by who writes; in between it holds the bytes of all files, in 20 digits
    folder/.….part            what is being written; a leftover, once nobody holds the lock

SHA256 in the name is that of fingerprint and key. A file is written under the lock and renamed, and never changed.
Readers need no lock. Its time of modification is that of its last use.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import astuple
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load, save

from actors.experts.protocol import Embedding
from umrg.atomic import named, written_aside
from umrg.frames import Size
from umrg.mistake import Mistake

LOCK_S = 10.0
"""Seconds after which a writer no longer waits for the others."""
_POLL_S = 0.002
_ROUNDS_TO_INFINITY = 65520.0
"""In float16, and what is beyond it."""
_NAME = re.compile(r"[0-9a-f]{64}\.embedding")
_LEFTOVER = re.compile(r"\.[0-9a-f]{64}\.embedding\.[0-9a-f]{12}\.part")
_DIGITS = 20
_SPARE = 32
"""A full folder is emptied by this part of its bound at once, since finding out what was used lately takes a look at
every file."""


class _File(NamedTuple):
    used: int
    """In nanoseconds since 1970."""
    size: int
    name: str


def rounded(embedding: Embedding) -> Embedding:
    """An embedding as it is stored: in float16, in main memory. Raises ValueError where a value does not fit."""
    for each in embedding.features:
        low, high = map(float, each.aminmax())
        if not -_ROUNDS_TO_INFINITY < low <= high < _ROUNDS_TO_INFINITY:
            raise Mistake(
                f"the expert's features go from {low:g} to {high:g}, and float16 has numbers up to 65504; set "
                "segmenter.embeddings.folder to null, which keeps embeddings in memory as they are"
            )
    return Embedding(
        features=tuple(each.to(torch.float16).cpu().contiguous() for each in embedding.features),
        original=embedding.original,
        content=embedding.content,
    )


class EmbeddingStore:
    """Embeddings of one expert in a folder that may hold those of others too.

    limit: of the bytes of all files that stores wrote there, those of killed writers included. Where there is no room,
    the files that were unused for longest go. fingerprint: `Expert.fingerprint`. Nothing is touched before the first
    use. Methods may be called by several threads and processes at once, and raise OSError where the disk does:
    TimeoutError where others hold the lock for `LOCK_S` seconds, and what the file system says if it has no locks.
    """

    def __init__(self, folder: Path, *, limit: int, fingerprint: str) -> None:
        self._folder, self._limit, self._fingerprint = folder, limit, fingerprint
        self._looked = False
        """Whether this process has looked at every file, of which a user may have removed some."""

    def path(self, key: str) -> Path:
        """The file of an image's embedding, which need not be there."""
        name = hashlib.sha256(f"{self._fingerprint}\n{key}".encode()).hexdigest()
        return self._folder / f"{name}.embedding"

    def get(self, key: str) -> Embedding | None:
        """What was stored by that key, in float16; None if there is nothing. A file that is damaged, or is another
        embedding's, is removed."""
        path = self.path(key)
        try:
            with named(path), path.open("rb") as file:
                checksum, content = file.read(hashlib.sha256().digest_size), file.read()
        except FileNotFoundError:
            return None
        embedding = self._parsed(key, content) if hashlib.sha256(content).digest() == checksum else None
        if embedding is None:
            path.unlink(missing_ok=True)
        else:
            with suppress(OSError):  # a folder that can only be read
                _touched(path)
        return embedding

    def put(self, key: str, embedding: Embedding) -> bool:
        """Store a `rounded` embedding. False if nothing was written: there is one already, which stays, or it is larger
        than the bound."""
        path, content = self.path(key), self._content(key, embedding)
        size = sum(map(len, content))
        if size + _DIGITS > self._limit:
            return False
        with self._locked() as lock:
            if _touched(path):
                return False
            total = self._total(lock)
            os.pwrite(lock, b"?" * _DIGITS, 0)  # who is killed from here on leaves a sum that nobody knows
            if total + size > self._limit:
                total = self._evict(size)
            with written_aside(path) as aside:
                with aside.open("wb") as file:
                    file.writelines(content)
                _touched(aside)
            os.pwrite(lock, f"{total + size:0{_DIGITS}}".encode(), 0)
        return True

    def holds(self, key: str) -> bool:
        """Whether there is a file by that key; counts as its use."""
        return _touched(self.path(key))

    def _content(self, key: str, embedding: Embedding) -> tuple[bytes, bytes]:
        metadata = {
            "fingerprint": self._fingerprint,
            "key": key,
            "original": json.dumps(astuple(embedding.original)),
            "content": json.dumps(astuple(embedding.content)),
        }
        written = save({str(i): each for i, each in enumerate(embedding.features)}, metadata)
        return hashlib.sha256(written).digest(), written

    def _parsed(self, key: str, content: bytes) -> Embedding | None:
        """content: of a file whose checksum is right. None if it is not what was asked for."""
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        metadata = header["__metadata__"]
        if (metadata["fingerprint"], metadata["key"]) != (self._fingerprint, key):
            return None
        features = load(content)
        return Embedding(
            features=tuple(features[str(i)] for i in range(len(features))),
            original=Size(*json.loads(metadata["original"])),
            content=Size(*json.loads(metadata["content"])),
        )

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """Hold the lock; its file's descriptor. The system releases the lock of a process that is killed."""
        path = self._folder / ".lock"
        self._folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            with named(path):
                _wait_for(lock, path)
            yield lock
        finally:
            os.close(lock)

    def _total(self, lock: int) -> int:
        """Bytes of all files, that of the lock included."""
        known = os.pread(lock, 2 * _DIGITS, 0)
        if self._looked and len(known) == _DIGITS and known.isdigit():
            return int(known)
        self._looked = True
        return _DIGITS + sum(file.size for file in self._files())

    def _files(self) -> list[_File]:
        """All embeddings, that of longest disuse first. Leftovers are removed. To be called under the lock."""
        found = []
        with os.scandir(self._folder) as entries:
            for entry in entries:
                if _LEFTOVER.fullmatch(entry.name):
                    os.unlink(entry)
                elif _NAME.fullmatch(entry.name):
                    with suppress(FileNotFoundError):  # a reader has removed a damaged one
                        about = entry.stat()
                        found.append(_File(about.st_mtime_ns, about.st_size, entry.name))
        return sorted(found)

    def _evict(self, size: int) -> int:
        """Make room for a file of so many bytes; the bytes of all that stay."""
        files = self._files()
        total = _DIGITS + sum(file.size for file in files)
        if total + size <= self._limit:
            return total
        for file in files:
            if total + size <= self._limit - self._limit // _SPARE:
                break
            (self._folder / file.name).unlink(missing_ok=True)
            total -= file.size
        return total


def _touched(path: Path) -> bool:
    """Note that a file is used now; False if there is none."""
    now = time.time_ns()  # the file system's own clock ticks every few milliseconds
    try:
        with named(path):
            os.utime(path, ns=(now, now))
    except FileNotFoundError:
        return False
    return True


def _wait_for(lock: int, path: Path) -> None:
    deadline = time.monotonic() + LOCK_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                message = f"others have held it for {LOCK_S:g} s"
                raise TimeoutError(errno.ETIMEDOUT, message, str(path)) from None
        time.sleep(_POLL_S)
