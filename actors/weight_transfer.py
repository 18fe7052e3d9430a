"""vLLM's side of a weight update: one engine for its weight-transfer API, whichever way weights come.

    bucket in a file ─────────────────────────────┐
                                                  ├──► checksum, Live, vLLM's reload of whole modules
    learner's GPU ──vLLM's engine, nccl or ipc────┘

An engine of vLLM has one backend for its whole life. Ours always takes buckets from files in host memory, which a CPU
and a rollout that joins need, and holds one of vLLM's own engines beside them where weights come from GPU to GPU.

The engine must be registered in vLLM's worker process, which knows nothing of ours. vLLM imports the class named by
`worker_extension_cls` there; importing this module registers the engine. That works from a plain working directory,
where an entry point would need an installed distribution.

A bucket of weights reaches the worker as a file in host memory: tensors of gigabytes do not go through vLLM's message
queues, and the same path serves CPU and GPU workers.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from actors import orphan_guard
from actors.weight_files import Checksum, Entry, mapped, read_direct, word_sum

BACKEND = "medreasoner-host"

Pairs = Iterable[tuple[str, torch.Tensor]]


@dataclass
class InitInfo(WeightTransferInitInfo):
    """What weights come through besides files."""

    direct: str | None = None
    """Name of an engine in vLLM's `WeightTransferEngineFactory`, such as `nccl` or `ipc`; None for files alone."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """The fields of that engine's own init info."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """A bucket in a file, or what the engine beside them receives."""

    exact: bool = False
    """As in `Bucket`."""
    path: str = ""
    """Of an `actors.weight_files.HostFile`, which the next bucket overwrites."""
    entries: list[dict[str, Any]] = field(default_factory=list)
    """The fields of each `Entry`."""
    direct: str | None = None
    """The update info of the engine beside files, as `actors.weight_files.write_direct` has it; None for a bucket."""


@dataclass(frozen=True)
class Loading:
    """Stands where an engine of vLLM expects a model, of which it calls this one method."""

    load: Callable[[Pairs], set[str] | None]

    def load_weights(self, weights: Pairs) -> set[str] | None:
        """Load tensors that have arrived; the engine may overwrite them afterwards."""
        return self.load(weights)


class Live:
    """Whether an engine's live parameters are the weights that it was sent.

    An engine fuses tensors (q, k and v into one), pads them with zeros and casts them to its precision; sums of words
    survive all three if the cast is made first. What it packs for a processor, or shares out over several GPUs, has
    other words, and is not compared; those parameters are told by their size.
    """

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self._model, self._dtype = model, dtype
        # The language model within a vision-language model has its own.
        mappings = [getattr(module, "packed_modules_mapping", {}) for module in model.modules()]
        self._fused = {part: fused for mapping in mappings for fused, parts in mapping.items() for part in parts}
        self._sent: dict[str, tuple[int, int]] = {}

    def add(self, tensors: Mapping[str, torch.Tensor], words: Mapping[str, int]) -> None:
        """Weights that were sent, by the names of a model's folder. words: the `word_sum` of each."""
        for name, tensor in tensors.items():
            same = tensor.dtype == self._dtype
            own = words[name] if same else word_sum(tensor.to(self._dtype))
            live = self.name(name)
            before, size = self._sent.get(live, (0, 0))
            self._sent[live] = (before + own) % (1 << 64), size + tensor.numel()

    def name(self, name: str) -> str:
        """The engine's own name for the parameter that holds a weight."""
        found: list[str] = self._model.hf_to_vllm_mapper.apply_list([name])
        return ".".join(self._fused.get(part, part) for part in (found[0] if found else name).split("."))

    def compared(self) -> tuple[int, list[str]]:
        """How many live parameters were compared, and the names of those that hold other weights than were sent."""
        live = dict(self._model.named_parameters())
        same = {
            name: word_sum(live[name]) == words
            for name, (words, size) in self._sent.items()
            if name in live and live[name].dtype == self._dtype and live[name].numel() >= size
        }
        return len(same), [name for name, equal in same.items() if not equal]


class AnyWeightTransferEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Loads weights from files on this host, and from an engine of vLLM's beside them. `checksum` and `live` cover the
    current or last update.

    Only those of the model's top-level modules of which a weight arrives are reloaded, such as the language model where
    the vision tower is frozen: a module that is reloaded without weights would have to be put back as it was. So of the
    engine beside files neither start nor finish is called, which reload the whole model."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._direct: WeightTransferEngine[Any, Any] | None = None
        self._begin()

    def _begin(self) -> None:
        self.checksum, self.live = Checksum(), Live(self.model, self.model_config.dtype)
        self._reloading: dict[str, torch.nn.Module] = {}
        self._exact = False

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Make the engine beside files, in the place of the one before. A collective with whoever sends."""
        self.shutdown()
        if init_info.direct is None:
            return
        model: Any = Loading(self._load)
        made = WeightTransferEngineFactory.create_engine(
            WeightTransferConfig(backend=init_info.direct), self.vllm_config, self.device, model
        )
        self._direct = made
        made.init_transfer_engine(made.parse_init_info(init_info.arguments))

    def start_weight_update(self) -> None:
        self._begin()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """As the base class, whose synchronization of an accelerator fails on a CPU."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: UpdateInfo) -> None:
        self._exact = update_info.exact
        if update_info.direct is None:
            self._load(mapped(update_info.path, [Entry(**entry) for entry in update_info.entries]).items())
            return
        if self._direct is None:
            raise RuntimeError("weights are sent directly to an engine that was not told through what")
        self._direct.receive_weights(self._direct.parse_update_info(read_direct(update_info.direct)))

    def _load(self, weights: Pairs) -> set[str] | None:
        """Load tensors; their memory is in use no more when this returns."""
        tensors = dict(weights)
        self.live.add(tensors, self.checksum.add(tensors, exact=self._exact))
        for name in top_level(map(self.live.name, tensors)):
            if name not in self._reloading:
                self._reloading[name] = self.model.get_submodule(name)
                initialize_layerwise_reload(self._reloading[name])
        loaded: set[str] | None = self.model.load_weights(tensors.items())
        self._release(tensors)
        if self.device.type != "cpu":
            # vLLM receives packed tensors on two streams in turn, and what this one kept may be read on the other.
            torch.accelerator.current_stream().synchronize()
        return loaded

    def _release(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Let go of the file, or the sender's buffer, that these are views of: vLLM keeps tensors of a module until its
        others have come, which may be in the next bucket, and those of a padded one until the end."""
        storages = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
        for module in self.model.modules():
            for _, call in get_layerwise_info(module).loaded_weights:
                for name, value in call.arguments.items():
                    if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() in storages:
                        call.arguments[name] = value.clone()

    def finish_weight_update(self) -> None:
        for module in self._reloading.values():
            finalize_layerwise_reload(module, self.model_config)
        if importer := getattr(self._direct, "_packed_importer", None):
            importer.close()  # the sender's buffer, which `ipc` maps; vLLM lets go of it in its own finish

    def shutdown(self) -> None:
        """End the engine beside files; files are taken as before."""
        before, self._direct = self._direct, None
        if before is not None:
            before.shutdown()


def top_level(names: Iterable[str]) -> list[str]:
    """The top-level modules that parameters of these names belong to."""
    return list(dict.fromkeys(name.partition(".")[0] for name in names))


class WorkerExtension:
    """Methods that vLLM's worker gains, for `collective_rpc`."""

    def received(self) -> tuple[str, int, list[str]]:
        """Of the last weight update: the checksum of the tensors that arrived, how many live parameters were compared
        with them, and which hold other weights."""
        engine = self.weight_transfer_engine  # type: ignore[attr-defined]
        return (engine.checksum.hexdigest(), *engine.live.compared())

    def attention(self) -> list[str]:
        """Names of the attention kernels of the language model's layers."""
        layers = self.vllm_config.compilation_config.static_forward_context.values()  # type: ignore[attr-defined]
        return sorted({layer.attn_backend.get_name() for layer in layers if hasattr(layer, "attn_backend")})


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, AnyWeightTransferEngine)

orphan_guard.follow()
