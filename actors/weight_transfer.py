"""vLLM's side of a weight update: an engine for its weight-transfer API that reads weights from files in memory.

The engine must be registered in vLLM's worker process, which knows nothing of ours. vLLM imports the class named by
`worker_extension_cls` there; importing this module registers the engine. That works from a plain working directory,
where an entry point would need an installed distribution.

A bucket of weights reaches the worker as a safetensors file under /dev/shm: tensors of gigabytes do not go through
vLLM's message queues, and the same path serves CPU and GPU workers.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from actors import orphan_guard
from actors.weight_files import WeightsDigest, unpack

BACKEND = "medreasoner-host"


@dataclass
class HostInitInfo(WeightTransferInitInfo):
    """Host transfer needs no rendezvous."""


@dataclass
class HostUpdateInfo(WeightTransferUpdateInfo):
    """One bucket of weights."""

    path: str
    """A safetensors file of named tensors."""


class HostWeightTransferEngine(WeightTransferEngine[HostInitInfo, HostUpdateInfo]):
    """Loads buckets of weights from files on this host. `digest` covers all tensors received in the current or last
    update."""

    init_info_cls = HostInitInfo
    update_info_cls = HostUpdateInfo
    supports_draft_weight_update = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.digest = WeightsDigest()

    def init_transfer_engine(self, init_info: HostInitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        self.digest = WeightsDigest()
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """As the base class, without its synchronization of an accelerator, which fails on CPU."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: HostUpdateInfo) -> None:
        tensors = unpack(Path(update_info.path).read_bytes())
        self.digest.add(tensors)
        self.model.load_weights(tensors.items())

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        pass


class WorkerExtension:
    """Methods that vLLM's worker gains, for `collective_rpc`."""

    def received_digest(self) -> str:
        """Digest of the tensors received in the last weight update."""
        engine = self.weight_transfer_engine  # type: ignore[attr-defined]
        return str(engine.digest.hexdigest())


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, HostWeightTransferEngine)

orphan_guard.follow()
