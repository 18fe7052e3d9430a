"""Where an actor is: its node, what that has, and the GPUs that the actor was given there."""

import shutil
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import psutil
import ray

from actors.build import Build, this_build

P = TypeVar("P", str, Path)
SHARED = Path("/dev/shm")


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU, or the part of one that its driver shows as a device."""

    name: str
    uuid: str
    memory: int
    """In bytes."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where an actor is, as it says before it loads anything."""

    node: str
    """Ray's id of the node."""
    memory: int
    """Of the node, in bytes."""
    gpus: tuple[Gpu, ...]
    """Those that the actor sees."""
    given: tuple[str, ...] = ()
    """Ray's ids of the GPUs that the actor was given, whether there are such devices or not."""
    address: str = ""
    """IP address and name of the node."""
    shared: int = 0
    """Size of its /dev/shm, in bytes."""
    build: Build = field(default_factory=this_build)
    """What the actor's process runs."""
    missing: Mapping[str, Path] = field(default_factory=dict)
    """What the actor needs and its node has not, by configuration key."""


@dataclass(frozen=True, kw_only=True)
class Lodging:
    """What an actor is told of its place when it starts."""

    sharers: int = 1
    """Actors of its role on its node."""
    copies: Mapping[Path, Path] = field(default_factory=dict)
    """Of what its node had not, by the driver's paths."""

    def local(self, path: P) -> P:
        """Where a file or folder of the driver's is on this node."""
        return type(path)(self.copies.get(Path(path), path))


ALONE = Lodging()
"""Of an actor that has its node for itself, with all that it needs."""


def this_place(needed: Mapping[str, str | Path | None] | None = None) -> Place:
    """Where this actor is. needed: paths that it will open, by configuration key; whatever is no full path, such as an
    expert's name, is not looked for."""
    given = tuple(map(str, ray.get_gpu_ids()))
    paths = {key: Path(path) for key, path in (needed or {}).items() if path is not None}
    return Place(
        address=f"{ray.util.get_node_ip_address()} ({socket.gethostname()})",
        shared=shutil.disk_usage(SHARED).total if SHARED.exists() else 0,
        missing={key: path for key, path in paths.items() if path.is_absolute() and not path.exists()},
        node=ray.get_runtime_context().get_node_id(),
        memory=psutil.virtual_memory().total,
        # Looking imports torch, for which an actor without a GPU need not wait.
        gpus=visible_gpus() if given else (),
        given=given,
    )


def visible_gpus() -> tuple[Gpu, ...]:
    """The GPUs that this process sees; none on a CPU build of torch. Their properties are read without allocating
    anything on them."""
    import torch

    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return tuple(Gpu(name=each.name, uuid=str(each.uuid), memory=each.total_memory) for each in found)
