"""The host weight update against a plain copy, and its fixed cost: `python -m bench.weights`.

A learner's part and a rollout's run as in training: random tensors are put into Ray's object store bucket by bucket,
an actor takes them from there into a file in host memory, and our engine for vLLM's weight-transfer API maps the file
and loads it into a model by vLLM's own reload, layer by layer; checksums of what is sent, of what arrives and of what
the model holds then are computed and compared. The plain copy is one of the same tensors to new memory, in this
process. Both are the best of several rounds, in turn, and both have as many threads as there are cores.

sync_copy_ratio: seconds of the update divided by those of the plain copy.
update_s, copy_s: of both, for `gib` GiB.
send_s: the part of the update that the learner's side takes.
tiny_ms: milliseconds of an update of the bundled tiny model on its real engine, all of it fixed cost: the median of
    several. tiny_frozen_ms: the same without the vision tower, as in the demo.
"""

from __future__ import annotations  # the actor is sent to its process by value, without the names in annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import ray

from actors.calls import Calls
from actors.config import DeadlineConfig, RolloutConfig
from actors.engine_report import EngineReport, UpdateReceipt
from actors.gpus import ALONE, Lodging
from actors.pools import RolloutPool, Weights
from actors.rollout import Rollout
from bench.machine import processor
from bench.rewards import table
from umrg.prompts import PromptSpec

if TYPE_CHECKING:
    import torch

MODEL = Path(__file__).parents[1] / "models" / "tiny-reasoner"
SIDE = 4096
"""Of the random model's matrices, in float32: 64 MiB each."""
BUCKET = 4
"""Matrices in a bucket: 256 MiB, as the learner sends them."""


def random_model(layers: int) -> Any:
    """A model of square matrices that vLLM loads as it does its own."""
    from torch import nn
    from vllm.model_executor.model_loader.reload import record_metadata_for_reloading
    from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper

    class Model(nn.Module):
        hf_to_vllm_mapper = WeightsMapper()

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(SIDE, SIDE, bias=False) for _ in range(layers))

        def load_weights(self, weights: Any) -> Any:
            return AutoWeightsLoader(self).load_weights(weights)

    model = Model().requires_grad_(False)
    record_metadata_for_reloading(model)
    return model


class WorkerInProcess:
    """What an update needs of vLLM's engine, with the worker's part in this process."""

    def __init__(self, transfer: Any) -> None:
        self._transfer = transfer

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        pass

    async def resume_generation(self) -> None:
        pass

    async def start_weight_update(self) -> None:
        self._transfer.start_weight_update()

    async def update_weights(self, request: Any) -> None:
        self._transfer.update_weights(request.update_info)

    async def finish_weight_update(self, *, weight_version: str) -> None:
        self._transfer.finish_weight_update()

    async def collective_rpc(self, method: str) -> list[tuple[str, int, list[str]]]:
        return [(self._transfer.checksum.hexdigest(), *self._transfer.live.compared())]


class Receiver(Rollout):
    """A rollout actor around a random model of as many layers as a completion may have tokens."""

    async def start(self, lodging: Lodging = ALONE) -> EngineReport:
        import torch

        from actors.engine import Engine
        from actors.weight_transfer import AnyWeightTransferEngine

        torch.set_num_threads(os.cpu_count() or 1)
        config: Any = SimpleNamespace(model_config=SimpleNamespace(dtype=torch.float32), parallel_config=None)
        model = random_model(self._config.max_tokens)
        llm: Any = WorkerInProcess(AnyWeightTransferEngine(None, config, torch.device("cpu"), model))
        prompter: Any = None
        report = EngineReport(
            dtype="float32",
            attention="none",
            kv_cache="auto",
            kv_tokens=0,
            concurrency=0.0,
            max_num_seqs=0,
            max_num_batched_tokens=0,
            cuda_graphs=False,
        )
        self._engine = Engine(llm, prompter, self._config, report)
        return report


def sent(tensors: dict[str, torch.Tensor]) -> tuple[str, list[Any]]:
    """The learner's part, as in `LearnerRank.weights`: checksum, and references of the buckets."""
    from actors.weight_files import Checksum, pack

    names, checksum, refs = list(tensors), Checksum(), []
    for i in range(0, len(names), BUCKET):
        bucket = {name: tensors[name] for name in names[i : i + BUCKET]}
        checksum.add(bucket)
        refs.append(ray.put(pack(bucket)))
    return checksum.hexdigest(), refs


def compare(gib: int, rounds: int) -> dict[str, float]:
    """Seconds of the update, of its sender, and of the plain copy, each the best of some rounds."""
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    layers = gib * (1 << 30) // (4 * SIDE * SIDE)
    config = RolloutConfig(max_tokens=layers)
    actor = ray.remote(Receiver).options(num_cpus=1, runtime_env={"env_vars": config.process_environment})
    starter: Any = None
    calls = Calls()
    pool = RolloutPool(starter, calls, DeadlineConfig(), sequences=1)
    pool.adopt({"rollout 0": actor.remote(MODEL, config, PromptSpec.of_model(MODEL))})
    ray.get([member.handle.start.remote() for member in pool])
    found: dict[str, list[float]] = {"copy_s": [], "send_s": [], "update_s": []}

    def check(name: str, sent: Weights, receipt: UpdateReceipt) -> None:
        assert receipt.checksum == sent.checksum and receipt.compared == layers and not receipt.unlike

    for version in range(rounds):
        tensors = {f"layers.{i}.weight": torch.rand(SIDE, SIDE) for i in range(layers)}
        start = time.perf_counter()
        copies = [tensor.clone() for tensor in tensors.values()]
        found["copy_s"].append(time.perf_counter() - start)
        del copies
        start = time.perf_counter()
        checksum, refs = sent(tensors)
        found["send_s"].append(time.perf_counter() - start)
        pool.weights = Weights(version=version, checksum=checksum, buckets=tuple(refs))
        while not all(map(pool.renewed, pool.ready)) or not pool.ready:
            pool.renew(check)
            calls.turn()
        found["update_s"].append(time.perf_counter() - start)
        del refs
    return {name: min(seconds) for name, seconds in found.items()}


def fixed(freeze: list[str], rounds: int = 20) -> float:
    """Milliseconds of an update of the tiny model on its real engine."""
    from cluster.config import TrainConfig, load_config
    from cluster.train import actors
    from cluster.weight_sync import sync_weights
    from cluster.workers import started

    overrides = [f"model={MODEL}", f"learner.freeze={json.dumps(freeze)}"]
    config = load_config(TrainConfig, MODEL.parents[1] / "configs" / "demo.yaml", overrides)
    milliseconds = []
    with started(actors(config), config) as workers:
        for version in range(rounds + 2):
            start = time.perf_counter()
            sync_weights(workers, version=version)
            milliseconds.append(1000 * (time.perf_counter() - start))
    return statistics.median(milliseconds[2:])  # the first ones make the engine's tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gib", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    size = 2 * given.gib << 30  # the weights of one update, and those of the one before until Ray has noticed
    ray.init(object_store_memory=size, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    seconds = compare(given.gib, given.rounds)
    ray.shutdown()
    ray.init(include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    tiny = {"tiny_ms": fixed([]), "tiny_frozen_ms": fixed(["vision_tower", "merger"])}
    copy = seconds["copy_s"]
    rows = [
        ("", "seconds", "of a plain copy"),
        (f"plain copy of {given.gib} GiB", f"{copy:.2f}", "1.0x"),
        ("put into the object store, with checksums", f"{seconds['send_s']:.2f}", f"{seconds['send_s'] / copy:.1f}x"),
        ("whole update", f"{seconds['update_s']:.2f}", f"{seconds['update_s'] / copy:.1f}x"),
        ("tiny model, real engine", f"{tiny['tiny_ms'] / 1000:.3f}", ""),
        ("without its vision tower", f"{tiny['tiny_frozen_ms'] / 1000:.3f}", ""),
    ]
    print(table(rows))
    figures = {
        "processor": processor(),
        "gib": given.gib,
        "sync_copy_ratio": round(seconds["update_s"] / copy, 2),
        **{name: round(value, 3) for name, value in seconds.items()},
        **{name: round(value, 1) for name, value in tiny.items()},
    }
    print(figures["processor"])
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
