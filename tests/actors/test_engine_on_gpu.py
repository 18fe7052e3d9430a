"""What vLLM would take on a GPU for the bundled model and the published ones, asked of its classes without one."""

import json

import pytest
import torch
from vllm.config.model import PROCESSED_LOGPROBS_MODES
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend
from vllm.v1.worker.gpu.sample.logit_bias import MAX_NUM_LOGIT_BIAS_TOKENS

from reasoner.prompter import load_prompter
from tests.conftest import TINY_REASONER


def head_sizes():
    """Of the tiny reasoner's language model and vision tower."""
    config = json.loads((TINY_REASONER / "config.json").read_text())
    text, vision = config["text_config"], config["vision_config"]
    return text["hidden_size"] // text["num_attention_heads"], vision["hidden_size"] // vision["num_heads"]


@pytest.mark.parametrize("head_size", [*head_sizes(), 72, 80, 128])
def test_attention_of_every_head_size_has_a_kernel(head_size):
    """Flash attention in bfloat16 from compute capability 8.0 on, Triton's in float32. Of Qwen2.5-VL, heads have 128
    and its tower's 80; of Qwen3-VL, 128 and 72."""
    flash, triton = FlashAttentionBackend, TritonAttentionBackend
    assert flash.supports_head_size(head_size) and flash.supports_dtype(torch.bfloat16)
    assert flash.supports_compute_capability(DeviceCapability(8, 0))
    assert not flash.supports_compute_capability(DeviceCapability(7, 5)) and not flash.supports_dtype(torch.float32)
    assert triton.supports_head_size(head_size) and triton.supports_dtype(torch.float32)
    assert triton.supports_compute_capability(DeviceCapability(7, 5))


def test_what_the_sampler_of_a_gpu_takes_of_a_request():
    prompter = load_prompter(TINY_REASONER)
    assert 0 < len(prompter.vision_tokens) <= MAX_NUM_LOGIT_BIAS_TOKENS
    assert "processed_logprobs" in PROCESSED_LOGPROBS_MODES
