"""A way for weights that needs no GPU, registered in both of vLLM's factories as `stand-in`, and engines for it.

It does what vLLM's `nccl` does, phase by phase, with a store of torch's in the place of NCCL: one sender, a fixed
number of receivers with numbers of their own, packed chunks, one buffer that is overwritten, and a sender that waits
for ever for a receiver that does not come, until its group is ended.
"""

import asyncio
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib import import_module
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch._C._distributed_c10d import TCPStore
from vllm.distributed.weight_transfer.base import (
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.packed_tensor import pack_tensors, unpack_tensor
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration

from actors.config import RolloutConfig
from actors.engine import Engine
from actors.learner_rank import LearnerRank
from actors.rollout import Rollout
from actors.weight_transfer import AnyWeightTransferEngine

NAME = "stand-in"
SECONDS = timedelta(seconds=60)
"""Within which a group must form, and a chunk arrive."""


@dataclass
class InitInfo(WeightTransferInitInfo):
    master_address: str
    master_port: int
    rank_offset: int
    world_size: int


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    sizes: tuple[int, ...]
    """Bytes of each tensor. A tuple, as CUDA's handles are, which vLLM's messages refuse."""


@dataclass
class TrainerInfo(TrainerInitInfo):
    backend: ClassVar[str] = NAME
    master_address: str
    master_port: int
    world_size: int
    packed_buffer_size_bytes: int


class Receiving(WeightTransferEngine[InitInfo, UpdateInfo]):
    """On a worker. Its chunks are views of one buffer."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        self.rank = self.parallel_config.rank + init_info.rank_offset
        assert 0 < self.rank < init_info.world_size
        self.store = TCPStore(
            init_info.master_address, init_info.master_port, is_master=False, timeout=SECONDS, use_libuv=False
        )
        self.store.set(f"joined {self.rank}", "")
        self.round = 0

    def start_weight_update(self) -> None:
        raise AssertionError("it would reload the whole model")

    def finish_weight_update(self) -> None:
        raise AssertionError("it would reload the whole model")

    def receive_weights(self, update_info: UpdateInfo) -> None:
        dtypes = [getattr(torch, name) for name in update_info.dtype_names]
        buffer = torch.empty(sum(update_info.sizes), dtype=torch.uint8)
        begin = chunk = 0
        while begin < len(update_info.names):
            data = torch.frombuffer(bytearray(self.store.get(f"{self.round} {chunk}")), dtype=torch.uint8)
            end = begin
            while sum(update_info.sizes[begin:end]) < len(data):
                end += 1
            buffer[: len(data)].copy_(data)
            part = slice(begin, end)
            names, shapes, sizes = update_info.names[part], update_info.shapes[part], list(update_info.sizes[part])
            self.model.load_weights(unpack_tensor(buffer[: len(data)], names, shapes, dtypes[part], sizes))
            buffer.fill_(255)
            self.store.set(f"taken {self.round} {chunk} {self.rank}", "")
            begin, chunk = end, chunk + 1
        self.round += 1

    def shutdown(self) -> None:
        del self.store


class Sending(TrainerWeightTransferEngine[TrainerInfo]):
    """On a rank of the learner."""

    init_info_cls = TrainerInfo

    @classmethod
    def trainer_init(cls, init_info: TrainerInfo, *, client: Any, source: Any = None) -> "Sending":
        made = cls(client=client, source=source, is_sender=init_info.is_sender)
        made.info, made.ended, made.round = init_info, threading.Event(), 0
        if made.is_sender:
            address = (init_info.master_address, init_info.master_port)
            made.store = TCPStore(*address, is_master=True, wait_for_workers=False, timeout=SECONDS, use_libuv=False)
            workers = InitInfo(*address, rank_offset=1, world_size=init_info.world_size)
            with ThreadPoolExecutor(max_workers=1) as threads:
                future = threads.submit(client.init_weight_transfer_engine, asdict(workers))
                made.store.wait([f"joined {rank}" for rank in range(1, init_info.world_size)])
                future.result()
        return made

    info: TrainerInfo
    ended: threading.Event
    round: int
    store: TCPStore

    def send_weights(self) -> None:
        meta = self.source.metadata()
        if not self.is_sender:
            assert [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.source] == [
                (each.name, each.dtype, each.shape) for each in meta
            ]
            return
        info = UpdateInfo(
            names=[each.name for each in meta],
            dtype_names=[str(each.dtype).removeprefix("torch.") for each in meta],
            shapes=[list(each.shape) for each in meta],
            sizes=tuple(each.dtype.itemsize * torch.Size(each.shape).numel() for each in meta),
        )
        self.client.start_weight_update()
        threads = ThreadPoolExecutor(max_workers=1)
        try:
            future = threads.submit(self.client.update_weights, asdict(info))
            self.broadcast()
            future.result()
        finally:
            threads.shutdown(wait=False)
        self.client.finish_weight_update()

    def broadcast(self) -> None:
        pairs, most, chunk = iter(self.source), min(self.info.packed_buffer_size_bytes, 1 << 20), 0
        while packed := pack_tensors(pairs, lambda pair: pair[1], most):
            self.store.set(f"{self.round} {chunk}", packed.packed_tensor.numpy().tobytes())
            taken = [f"taken {self.round} {chunk} {rank}" for rank in range(1, self.info.world_size)]
            while not self.store.check(taken):
                if self.ended.wait(0.01):
                    raise RuntimeError("the group was ended")
            chunk += 1
        self.round += 1

    def shutdown(self) -> None:
        self.ended.set()


def register() -> None:
    """As a plugin of vLLM's does in its processes."""
    if NAME not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(NAME, Receiving)
        WeightTransferTrainerFactory.register_engine(NAME, Sending)


register()


class StandInRank(LearnerRank):
    """A rank in whose process the way is registered. It gives up after two seconds of sending, if it is to be hasty."""

    hasty = False

    def send(self, version: int, everything: bool, seconds: float) -> Any:
        return super().send(version, everything, 2.0 if self.hasty else seconds)

    def hurry(self, hasty: bool) -> None:
        self.hasty = hasty

    def pieces(self) -> None:
        """Send in chunks that cut modules, and from buckets of the learner that cut chunks."""
        for module in ("learner.zero", "actors.weight_sender"):
            setattr(import_module(module), "BUCKET_BYTES", 100_000)  # noqa: B010  # of a module that is not named here


class Keeping(torch.nn.Module):
    """Keeps what is loaded."""

    hf_to_vllm_mapper = Qwen2_5_VLForConditionalGeneration.hf_to_vllm_mapper

    def __init__(self) -> None:
        super().__init__()
        self.language_model, self.visual = torch.nn.Module(), torch.nn.Module()
        self.kept: dict[str, torch.Tensor] = {}

    def load_weights(self, weights: Any) -> None:
        self.kept |= {name: tensor.clone() for name, tensor in weights}


class Workers:
    """What an update needs of vLLM's front end, with the engine's workers in threads, and a record of the calls."""

    def __init__(self, count: int, fails: str) -> None:
        self.record: list[str] = []
        self.fails = fails
        self.sent: Any = None
        self.version = "0"
        self.workers = [
            AnyWeightTransferEngine(
                None,
                SimpleNamespace(
                    model_config=SimpleNamespace(dtype=torch.float32), parallel_config=SimpleNamespace(rank=rank)
                ),
                torch.device("cpu"),
                Keeping(),
            )
            for rank in range(count)
        ]

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        self.record.append(f"pause: {mode}")

    async def resume_generation(self) -> None:
        self.record.append("resume")

    async def init_weight_transfer_engine(self, request: Any) -> None:
        self.record.append("init")
        await self._all(lambda each: each.init_transfer_engine(each.parse_init_info(request.init_info)))

    async def start_weight_update(self) -> None:
        self.record.append("start")
        await self._all(lambda each: each.start_weight_update())

    async def update_weights(self, request: Any) -> None:
        self.record.append("update")
        if self.fails == "dies":
            os._exit(1)
        if self.fails == "blocks":
            await asyncio.Event().wait()
        await self._all(lambda each: each.update_weights(request.update_info))

    async def finish_weight_update(self, *, weight_version: str | None = None) -> None:
        self.record.append("finish")
        self.version = weight_version or self.version

    async def collective_rpc(self, method: str) -> list[tuple[str, int, list[str]]]:
        return [(each.checksum.hexdigest(), 0, []) for each in self.workers]

    async def check_health(self) -> None:
        pass

    async def _all(self, call: Any) -> None:
        await asyncio.gather(*(asyncio.to_thread(call, each) for each in self.workers))


class StandInRollout(Rollout):
    """A rollout around such workers. fails: what it does when it is to receive weights, `dies` or `blocks`."""

    def __init__(self, workers: int = 1, fails: str = "") -> None:
        nothing: Any = None
        self._llm: Any = Workers(workers, fails)
        llm: Any = self._llm
        self._engine = Engine(llm, nothing, RolloutConfig(), nothing)

    async def record(self) -> tuple[list[str], list[int], str]:
        """The calls, the workers' numbers and the version."""
        return self._llm.record, [each._direct.rank for each in self._llm.workers], self._llm.version

    async def kept(self) -> list[dict[str, torch.Tensor]]:
        """What each worker was given to load."""
        return [each.model.kept for each in self._llm.workers]
