"""Weights from this process to an engine in its event loop, through any of vLLM's ways.

Besides, how vLLM's processes come to know the stand-in. Imports no vLLM before it is called.
"""

import asyncio
import socket
import sys
from pathlib import Path
from typing import Any

from actors.engine_report import UpdateReceipt
from actors.weight_files import write_direct

SECONDS = 300
"""Deadline of each call to an engine."""


def as_plugin(folder: Path) -> str:
    """PYTHONPATH with which vLLM's processes register the stand-in, as a plugin; those that are started from this one
    take its `sys.path` instead, which is extended too. folder: for what says so."""
    about = folder / "stand_in-0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: stand-in\nVersion: 0\n")
    (about / "entry_points.txt").write_text("[vllm.general_plugins]\nstand_in = tests.stand_in_transfer:register\n")
    sys.path.append(str(folder))
    return f"{Path(__file__).parents[1]}:{folder}"


class _Client:
    """vLLM's calls, from a sender in a thread to an engine in the event loop."""

    def __init__(self, engine: Any, way: str, version: int) -> None:
        self._engine, self._way, self._version = engine, way, version
        self._loop = asyncio.get_running_loop()
        self.receipt: Any = None

    def init_weight_transfer_engine(self, init_info: Any) -> None:
        self._wait(self._engine.connect(self._way, init_info))

    def start_weight_update(self) -> None:
        self._wait(self._engine.begin_update("keep"))

    def update_weights(self, update_info: Any) -> None:
        self._wait(self._engine.receive({"direct": write_direct(update_info), "exact": False}))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.receipt = self._wait(self._engine.end_update(self._version))

    def _wait(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(SECONDS)


async def sent_directly(engine: Any, weights: Any, way: str, version: int) -> UpdateReceipt:
    """The engine's receipt. The buffer holds the largest tensor, so that several chunks cut modules. weights: by
    name."""
    import tests.stand_in_transfer  # noqa: F401, I001  # registers it
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    from actors.weight_sender import init_info

    class Source(WeightSource):
        def metadata(self) -> list[ParamMeta]:
            return [ParamMeta(name, each.dtype, tuple(each.shape)) for name, each in weights.items()]

        def __iter__(self) -> Any:
            return ((name, each.detach()) for name, each in weights.items())

    offered = {
        "rank": 0,
        "master_address": "127.0.0.1",
        "master_port": _free_port(),
        "world_size": 2,
        "packed": True,
        "packed_buffer_size_bytes": max(each.nbytes for each in weights.values()),
    }
    client = _Client(engine, way, version)

    def send() -> None:
        sender = WeightTransferTrainerFactory.trainer_init(init_info(way, offered), client=client, source=Source())
        sender.send_weights()
        sender.shutdown()

    await asyncio.to_thread(send)
    receipt: UpdateReceipt = client.receipt
    return receipt


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
