"""Whether an engine's live parameters are what it was sent: the comparison, on models small enough to read."""

from typing import Any

import pytest
import torch
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from vllm.model_executor.models.qwen2_vl import Qwen2VLForConditionalGeneration
from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration

from actors.weight_files import Checksum
from actors.weight_transfer import Live, top_level


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
