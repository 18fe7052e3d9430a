"""What the node of an actor must have before the actor loads anything, in words."""

from collections.abc import Mapping

import ray

from actors.build import Build
from actors.gpus import Place
from cluster.commands.doctor_demand import ROOM
from cluster.memory import in_gib


def unfit(name: str, place: Place, here: Build) -> str | None:
    """Why an actor cannot work where it lies, and what to change; None if it can. here: what the driver runs. What the
    driver has and the node has not is no reason: it is copied there."""
    node, role = f"node {place.address}, where {name} lies,", name.partition(" ")[0]
    if unlike := place.build.unlike(here):
        return (
            f"{node} has {unlike}; give all nodes one image, or one checkout with its .venv, or keep the run off that "
            f"node ({role}.node_labels)"
        )
    for key in ("runs", "resume"):
        if path := place.missing.get(key):
            return (
                f"{node} has no {path}: the learner's ranks write and read checkpoints there; give {key}=… on storage "
                "that the driver's node and theirs share"
            )
    for key, path in place.missing.items():
        if not path.exists():
            return f"{node} has no {path}, and neither has the driver's; correct {key}"
    return None


def cramped(name: str, place: Place, weights: int, stores: Mapping[str, int]) -> str | None:
    """A remark where a node's shared memory cannot hold one version of the weights, which then goes through its disk.
    weights: of a version, in bytes. stores: bytes of each node's object store, by its id."""
    store = min(stores.get(place.node, weights), place.shared)
    if store >= weights:
        return None
    return (
        f"node {place.address}, where {name} lies, has {in_gib(store)} of shared memory for Ray's object store, and a "
        f"version of the weights is {in_gib(weights)}, which then goes through its disk at every update; enlarge "
        f"/dev/shm there to {in_gib(ROOM * weights)}, and Ray's --object-store-memory if it is set"
    )


def object_stores() -> dict[str, int]:
    """Bytes of each living node's object store, by the node's id."""
    return {
        node["NodeID"]: int(node["Resources"].get("object_store_memory", 0)) for node in ray.nodes() if node["Alive"]
    }
