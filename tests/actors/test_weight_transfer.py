"""What an engine does with weights, whichever way they come, and whether its live parameters are what it was sent: on
models small enough to read."""

from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import record_metadata_for_reloading
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from vllm.model_executor.models.qwen2_vl import Qwen2VLForConditionalGeneration
from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration

from actors.weight_files import Checksum, HostFile, pack, write_direct
from actors.weight_transfer import AnyWeightTransferEngine, InitInfo, Live, UpdateInfo, top_level


class Fused(torch.nn.Module):
    """An engine's model: q, k and v in one, the embedding padded, names of its own."""

    packed_modules_mapping = Qwen2_5_VLForConditionalGeneration.packed_modules_mapping
    hf_to_vllm_mapper = Qwen2_5_VLForConditionalGeneration.hf_to_vllm_mapper

    def __init__(self, dtype):
        super().__init__()
        self.language_model: Any = torch.nn.Module()
        self.language_model.model = torch.nn.Module()
        self.language_model.model.qkv_proj = torch.nn.Linear(4, 12, bias=False, dtype=dtype)
        self.language_model.model.embed_tokens = torch.nn.Embedding(16, 4, dtype=dtype)
        self.requires_grad_(False)

    def load(self, weights):
        """As an engine does."""
        parts = [weights[f"model.language_model.{part}_proj.weight"] for part in "qkv"]
        self.language_model.model.qkv_proj.weight.copy_(torch.cat(parts))
        embedding = self.language_model.model.embed_tokens.weight.zero_()
        embedding[:10] = weights["model.language_model.embed_tokens.weight"]


def weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = {f"model.language_model.{part}_proj.weight": torch.randn(4, 4, generator=generator) for part in "qkv"}
    return found | {"model.language_model.embed_tokens.weight": torch.randn(10, 4, generator=generator)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_engine_that_holds_what_was_sent_passes(dtype):
    """Fused, padded and cast."""
    model = Fused(dtype)
    live = Live(model, dtype)
    model.load(weights())
    live.add(weights(), Checksum().add(weights()))
    assert live.compared() == (2, [])


def test_one_stale_step_is_found_in_bfloat16():
    """By which log-probs move less than bfloat16 rounds them."""
    model = Fused(torch.bfloat16)
    model.load(weights())
    live = Live(model, torch.bfloat16)
    newer = {name: tensor + 0.01 for name, tensor in weights().items()}
    live.add(newer, Checksum().add(newer))
    assert live.compared() == (2, ["language_model.model.qkv_proj.weight", "language_model.model.embed_tokens.weight"])


def test_a_packed_parameter_is_not_compared():
    """vLLM packs matrices for CPUs, and leaves an empty parameter."""
    model = Fused(torch.float32)
    model.load(weights())
    model.language_model.model.qkv_proj.weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)
    live = Live(model, torch.float32)
    live.add(weights(), Checksum().add(weights()))
    assert live.compared() == (1, [])


@pytest.mark.parametrize(
    ("kind", "sent", "live"),
    [
        (Qwen2_5_VLForConditionalGeneration, "model.visual.blocks.0.attn.qkv.bias", "visual.blocks.0.attn.qkv.bias"),
        (
            Qwen2_5_VLForConditionalGeneration,
            "model.visual.blocks.0.mlp.up_proj.bias",
            "visual.blocks.0.mlp.gate_up_proj.bias",
        ),
        (Qwen2_5_VLForConditionalGeneration, "lm_head.weight", "language_model.lm_head.weight"),
        (
            Qwen2VLForConditionalGeneration,
            "model.language_model.layers.0.self_attn.k_proj.bias",
            "language_model.model.layers.0.self_attn.qkv_proj.bias",
        ),
        (
            Qwen3VLForConditionalGeneration,
            "model.language_model.layers.0.mlp.gate_proj.weight",
            "language_model.model.layers.0.mlp.gate_up_proj.weight",
        ),
    ],
)
def test_an_engine_s_name_of_a_weight(kind, sent, live):
    class Model(torch.nn.Module):
        hf_to_vllm_mapper = kind.hf_to_vllm_mapper

    model: Any = Model()
    model.language_model = torch.nn.Module()
    model.language_model.packed_modules_mapping = Qwen2ForCausalLM.packed_modules_mapping
    found = Live(model, torch.float32).name(sent)
    assert found == live
    assert top_level([found]) == [live.split(".")[0]]


class Loading(Fused):
    """Takes weights one by one, with biases, as vLLM's models do."""

    def __init__(self, dtype):
        super().__init__(dtype)
        inner = self.language_model.model
        inner.qkv_proj = torch.nn.Linear(4, 12, dtype=dtype)
        self.visual: Any = torch.nn.Linear(4, 12, dtype=dtype)
        stacked: list[Any] = [*inner.qkv_proj.parameters(), *self.visual.parameters()]
        for parameter in stacked:
            parameter.weight_loader = self.load_part
        padded: Any = inner.embed_tokens.weight
        padded.weight_loader = self.load_padded
        self.requires_grad_(False)
        record_metadata_for_reloading(self)

    def load_part(self, param, tensor, part):  # vLLM knows the first argument by its name
        param.data["qkv".index(part) * 4 :][:4].copy_(tensor)

    def load_padded(self, param, tensor, part):
        param.data[:10].copy_(tensor)
        param.data[10:].zero_()

    def load_weights(self, weights):
        live = Live(self, torch.float32)
        for name, tensor in weights:
            parameter: Any = self.get_parameter(live.name(name))
            parameter.weight_loader(parameter, tensor, name.rpartition("_proj")[0][-1:])


def with_biases():
    generator = torch.Generator().manual_seed(1)
    biases = {f"model.language_model.{part}_proj.bias": torch.randn(4, generator=generator) for part in "qkv"}
    return weights() | biases


def updated(engine, sent, *, in_buckets_of):
    """What differs after an update by one file. Between two buckets, nothing of the first may be in use."""
    engine.start_weight_update()
    names = list(sent)
    with HostFile() as file:
        for i in range(0, len(names), in_buckets_of):
            file.write(bucket := pack({name: sent[name] for name in names[i : i + in_buckets_of]}))
            entries = [asdict(entry) for entry in bucket.entries]
            engine.receive_weights(UpdateInfo(path=file.path, entries=entries, exact=False))
            assert "medreasoner-weights" not in Path("/proc/self/maps").read_text(), "the engine keeps a bucket's file"
    engine.finish_weight_update()
    return engine.live.compared()


@pytest.mark.parametrize("size", [100, 3, 1])
def test_no_bucket_outlives_the_next_one_however_buckets_cut_modules(size):
    """By vLLM's own reload, which keeps a module's tensors until all have come. A module that is left out keeps its
    weights and biases."""
    model = Loading(torch.float32)
    config = SimpleNamespace(model_config=SimpleNamespace(dtype=torch.float32), parallel_config=None)
    engine = AnyWeightTransferEngine(None, config, torch.device("cpu"), model)
    tower = {name: parameter.clone() for name, parameter in model.visual.named_parameters()}
    assert all(parameter.all() for parameter in tower.values())
    for sent in (with_biases(), {name: tensor + 1 for name, tensor in with_biases().items()}):
        assert updated(engine, sent, in_buckets_of=size) == (3, [])
    assert all(torch.equal(parameter, tower[name]) for name, parameter in model.visual.named_parameters())


@dataclass
class WithWeights(WeightTransferUpdateInfo):
    """The weights themselves, and how many come at a time."""

    weights: dict[str, torch.Tensor]
    size: int


@dataclass
class Nothing(WeightTransferInitInfo):
    """No rendezvous."""


class Overwriting(WeightTransferEngine[Nothing, WithWeights]):
    """In the place of one of vLLM's: weights come in one buffer, which is overwritten."""

    init_info_cls, update_info_cls = Nothing, WithWeights
    record: ClassVar[list[str]] = []

    def init_transfer_engine(self, init_info: Nothing) -> None:
        self.record.append("init")

    def start_weight_update(self) -> None:
        self.record.append("start")

    def receive_weights(self, update_info: WithWeights) -> None:
        names, buffer = list(update_info.weights), torch.empty(1000)
        for i in range(0, len(names), update_info.size):
            part = {name: update_info.weights[name] for name in names[i : i + update_info.size]}
            flat = buffer[: sum(each.numel() for each in part.values())]
            flat.copy_(torch.cat([each.flatten() for each in part.values()]))
            views = flat.split([each.numel() for each in part.values()])
            self.model.load_weights(
                [(name, view.view(part[name].shape)) for name, view in zip(part, views, strict=True)]
            )
            buffer.fill_(torch.nan)

    def finish_weight_update(self) -> None:
        self.record.append("finish")

    def shutdown(self) -> None:
        self.record.append("shutdown")


@pytest.mark.parametrize("size", [100, 3, 1])
def test_an_engine_of_vllm_s_beside_files_loads_through_ours_and_may_overwrite_what_it_gave(monkeypatch, size):
    """The module of which nothing arrives stays as it was, the checksum is that of a bucket with the same weights, and
    files are taken as before, also once the other engine has gone."""
    monkeypatch.setitem(WeightTransferEngineFactory._registry, "overwriting", lambda: Overwriting)
    Overwriting.record.clear()
    model = Loading(torch.float32)
    config = SimpleNamespace(model_config=SimpleNamespace(dtype=torch.float32), parallel_config=None)
    engine = AnyWeightTransferEngine(None, config, torch.device("cpu"), model)
    tower = {name: parameter.clone() for name, parameter in model.visual.named_parameters()}
    assert updated(engine, with_biases(), in_buckets_of=3) == (3, [])
    expected = engine.checksum.hexdigest()
    for _ in range(2):
        engine.init_transfer_engine(InitInfo(direct="overwriting"))
        engine.start_weight_update()
        assert engine.checksum.hexdigest() != expected
        engine.update_weights({"direct": write_direct({"weights": with_biases(), "size": size}), "exact": False})
        engine.finish_weight_update()
        assert engine.live.compared() == (3, []) and engine.checksum.hexdigest() == expected
    assert updated(engine, {name: tensor + 1 for name, tensor in with_biases().items()}, in_buckets_of=3) == (3, [])
    engine.init_transfer_engine(InitInfo())
    assert Overwriting.record == ["init", "shutdown", "init", "shutdown"], "neither start nor finish"
    assert updated(engine, with_biases(), in_buckets_of=3) == (3, [])
    assert all(torch.equal(parameter, tower[name]) for name, parameter in model.visual.named_parameters())
    with pytest.raises(RuntimeError, match="was not told through what"):
        engine.update_weights({"direct": write_direct({"weights": {}, "size": 1})})
