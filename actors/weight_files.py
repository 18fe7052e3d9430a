"""Weights on their way from the learner to the rollouts: buckets of named tensors, and their checksum.

    learner's tensors ──pack──► Bucket ──object store──► Bucket ──HostFile──► file ──mapped──► engine's tensors

Each arrow but the first copies the bytes once. A bucket holds one array per tensor: Ray writes arrays into its object
store, and shows them to readers of the node, without a copy of its own, where it would copy `bytes` to each reader's
heap.
"""

import asyncio
import base64
import hashlib
import mmap
import os
import pickle
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from umrg.reasoner_folder import INDEX, WEIGHTS, read_object

_ALIGNMENT = 64
_PIECE, _WRITERS = 32 << 20, 4


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor of a bucket."""

    name: str
    dtype: str
    """torch's name, such as `bfloat16`."""
    shape: tuple[int, ...]
    offset: int
    """Where its bytes begin in a file that holds the bucket."""

    @property
    def end(self) -> int:
        """Where they end."""
        return self.offset + int(np.prod(self.shape, dtype=np.int64)) * self.torch_dtype.itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.dtype)
        return found


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Named tensors as bytes."""

    entries: tuple[Entry, ...]
    arrays: tuple[NDArray[np.uint8], ...]
    """The bytes of each entry."""
    exact: bool
    """Whether its tensors are added to a checksum with their sha256."""


def pack(tensors: Mapping[str, torch.Tensor], *, exact: bool = False) -> Bucket:
    """A bucket of tensors: views of those on the CPU, and copies of those on a GPU."""
    entries, arrays, offset = [], [], 0
    for name, tensor in tensors.items():
        shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
        entries.append(Entry(name=name, dtype=dtype, shape=shape, offset=offset))
        arrays.append(_bytes(tensor))
        offset = -(-entries[-1].end // _ALIGNMENT) * _ALIGNMENT
    return Bucket(entries=tuple(entries), arrays=tuple(arrays), exact=exact)


def unpack(bucket: Bucket) -> dict[str, torch.Tensor]:
    """The tensors of a bucket, as copies."""
    return {
        entry.name: torch.from_numpy(array.copy()).view(entry.torch_dtype).view(entry.shape)
        for entry, array in zip(bucket.entries, bucket.arrays, strict=True)
    }


def write_direct(info: Mapping[str, Any]) -> str:
    """What vLLM's sender tells its receivers, as text. Handles of a GPU's memory are tuples with bytes, which vLLM's
    messages to its workers refuse unless VLLM_ALLOW_INSECURE_SERIALIZATION is set for everything."""
    return base64.b64encode(pickle.dumps(dict(info))).decode()


def read_direct(text: str) -> dict[str, Any]:
    """What `write_direct` wrote. It runs what the text says, and is for text of the run's own learner alone."""
    found: dict[str, Any] = pickle.loads(base64.b64decode(text))
    return found


class HostFile:
    """A file in host memory for one bucket after another, which other processes of this machine and user read by its
    path. It has no name in any folder, so nothing is left of it, even if this process is killed; nor does the size of
    /dev/shm bound it."""

    def __init__(self) -> None:
        self._handle = os.memfd_create("medreasoner-weights")
        self.path = f"/proc/{os.getpid()}/fd/{self._handle}"

    def write(self, bucket: Bucket) -> None:
        """Put a bucket in the place of the one before, of which nobody may hold a view any more: to clear new pages
        costs more than to copy the bytes, so their memory is used again."""
        pieces = [
            (array.data[start : start + _PIECE], entry.offset + start)
            for entry, array in zip(bucket.entries, bucket.arrays, strict=True)
            for start in range(0, array.nbytes, _PIECE)
        ]
        with ThreadPoolExecutor(max_workers=_WRITERS) as pool:
            list(pool.map(lambda piece: _write(self._handle, *piece), pieces))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._handle)


def mapped(path: str, entries: Sequence[Entry]) -> dict[str, torch.Tensor]:
    """The tensors of a `HostFile`, as views of it; it stays in memory as long as one of them does."""
    with open(path, "rb") as file:
        # Copy on write: torch takes no memory that may not be written to.
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    return {entry.name: whole[entry.offset : entry.end].view(entry.torch_dtype).view(entry.shape) for entry in entries}


def _write(handle: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(handle, data, offset)
        data, offset = data[written:], offset + written


def _bytes(tensor: torch.Tensor) -> NDArray[np.uint8]:
    """A view of those of a contiguous tensor on the CPU, else a copy. (numpy knows no bfloat16.)"""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def word_sum(tensor: torch.Tensor) -> int:
    """The sum of a tensor's bytes as 64-bit words, modulo 2⁶⁴, computed where the tensor is. The sum of tensors that
    are fused into one is that of the fused one, if each fills whole words; so does padding with zeros."""
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    if len(flat) % 8:
        flat = torch.nn.functional.pad(flat, (0, 8 - len(flat) % 8))
    elif flat.storage_offset() % 8:
        flat = flat.clone()
    return int(flat.view(torch.int64).sum()) % (1 << 64)


class Checksum:
    """Over names, types, shapes and words of tensors, in any order. It finds what was lost, damaged, mixed up or sent
    twice, and costs no more than reading the tensors once. What it does not see, numbers that change places within a
    tensor, sha256 does, at the price of a second and more for a GiB."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def add(self, tensors: Mapping[str, torch.Tensor], *, exact: bool = False) -> dict[str, int]:
        """Add tensors. Returns the `word_sum` of each. exact: by their sha256 too."""
        words = {name: word_sum(tensor) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            sha256 = hashlib.sha256(_bytes(tensor).data).hexdigest() if exact else ""
            self._lines.append(f"{name} {tensor.dtype} {tuple(tensor.shape)} {words[name]} {sha256}")
        return words

    def hexdigest(self) -> str:
        return hashlib.sha256("\n".join(sorted(self._lines)).encode()).hexdigest()


def checksum_of(buckets: Iterable[Mapping[str, torch.Tensor]]) -> str:
    """Checksum of weights given in buckets."""
    checksum = Checksum()
    for bucket in buckets:
        checksum.add(bucket)
    return checksum.hexdigest()


class FolderWeights:
    """The weights of a reasoner's folder, under the names and in the precision of its files."""

    def __init__(self, folder: Path, *, most: int = 1 << 30) -> None:
        """most: bytes of a bucket; a tensor that is larger has one to itself."""
        self._folder, self._most = folder, most
        self._checksum = Checksum()

    async def buckets(self) -> AsyncIterator[Bucket]:
        """One bucket after another, each read by a thread when it is asked for. It is a view of a mapped file, and
        takes no memory beyond the system's cache."""
        found = self._packed()
        while (bucket := await asyncio.to_thread(next, found, None)) is not None:
            yield bucket

    def checksum(self) -> str:
        """Of all buckets that were asked for."""
        return self._checksum.hexdigest()

    def _packed(self) -> Iterator[Bucket]:
        for path in self._files():
            with safe_open(path, framework="pt") as file:
                tensors: dict[str, torch.Tensor] = {}
                for name in file.keys():  # noqa: SIM118  # the file is no mapping
                    tensor = file.get_tensor(name)
                    if tensors and tensor.nbytes + sum(each.nbytes for each in tensors.values()) > self._most:
                        yield self._pack(tensors)
                        tensors = {}
                    tensors[name] = tensor
                if tensors:
                    yield self._pack(tensors)

    def _pack(self, tensors: Mapping[str, torch.Tensor]) -> Bucket:
        self._checksum.add(tensors)
        return pack(tensors)

    def _files(self) -> list[Path]:
        """As vLLM chooses them: those of the index, where there is one."""
        if not (self._folder / INDEX).exists():
            return [self._folder / WEIGHTS]
        places: dict[str, str] = read_object(self._folder / INDEX)["weight_map"]
        return [self._folder / name for name in sorted(set(places.values()))]
