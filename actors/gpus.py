"""The GPUs that an actor was given."""

from dataclasses import dataclass

import psutil
import ray


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU, or the part of one that its driver shows as a device."""

    name: str
    uuid: str
    memory: int
    """In bytes."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where an actor is."""

    node: str
    """Ray's id of the node."""
    memory: int
    """Of the node, in bytes."""
    gpus: tuple[Gpu, ...]
    """Those that the actor sees."""
    given: tuple[str, ...] = ()
    """Ray's ids of the GPUs that the actor was given, whether there are such devices or not."""


def this_place() -> Place:
    """Where this actor is."""
    given = tuple(map(str, ray.get_gpu_ids()))
    return Place(
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
