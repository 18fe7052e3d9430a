"""What is said of a copy that is never finished."""

import fcntl
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray

from actors import delivery
from actors.calls import Call, Calls, Ended
from actors.delivery import Deliveries
from actors.gpus import Place
from umrg.copies import Cache, Contents


def test_a_large_file_of_the_drivers_is_not_read_within_a_turn_of_its_wait(monkeypatch, tmp_path):
    """A task reads it, once for all nodes; all are told if it fails."""
    flying: list[Call] = []

    class Noted(Calls):
        def add(self, _ref, call):
            flying.append(call)

    class Elsewhere:
        def remote(self, *_):
            pass

    monkeypatch.setattr(delivery, "_on", lambda *_, **_options: Elsewhere())
    # Ray's own would start a cluster.
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "home"))
    deliveries = Deliveries(Noted(), seconds=3, cache=tmp_path / "cache")
    ended: list[Any] = []
    for node in "ab":
        place = Place(node=node, memory=1, gpus=(), address=node, missing={"model": tmp_path})
        deliveries.bring(place, ended.append)
    (call,) = flying
    assert call.doing == f"reading {tmp_path}" and not ended
    call.then(Ended(call=call, fault="error", cause="it cannot be read"))
    assert [fault.cause for fault in ended] == ["it cannot be read"] * 2


def test_a_copy_that_takes_too_long_is_named_with_its_deadline(ray_cluster, tmp_path):
    """Another process holds the lock of the same copy."""
    model, cache = tmp_path / "model", Cache(tmp_path / "cache")
    model.mkdir()
    (model / "weights").write_text("one")
    cache.folder.mkdir()
    place = Place(
        node=ray.get_runtime_context().get_node_id(),
        memory=1,
        gpus=(),
        address="10.0.0.2 (b)",
        missing={"model": model},
    )
    calls = Calls()
    ended: list[Any] = []
    with (cache.folder / f"{Contents.of(model).digest}.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        deliveries = Deliveries(calls, seconds=3, cache=cache.folder)
        deliveries.bring(place, ended.append)
        while not ended:
            calls.turn()
    assert ended[0] and ended[0].cause == f"node 10.0.0.2 (b) did not finish copying model ({model}) within 3 s"
    assert not deliveries.copies(place.node) and not list(Path(cache.folder).glob("*/model"))
