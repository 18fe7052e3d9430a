"""What vLLM would take on a GPU for the bundled model and the published ones, asked of its classes without one."""

import inspect
import json
from types import SimpleNamespace

import pytest
import torch
from vllm.config import CompilationConfig, CUDAGraphMode, ModelConfig, VllmConfig
from vllm.config.model import PROCESSED_LOGPROBS_MODES
from vllm.device_allocator.sleep_mode_backend import CuMemBackend
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core import EngineCore
from vllm.v1.executor.abstract import SLEEP_TAGS, Executor
from vllm.v1.worker.gpu.sample.logit_bias import MAX_NUM_LOGIT_BIAS_TOKENS
from vllm.v1.worker.gpu_worker import Worker

from actors.config import RolloutConfig
from actors.engine import check_cache, report
from bench.architectures import ARCHITECTURES
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


@pytest.mark.parametrize("completions", [40, 512, 688, 1000])
def test_graphs_for_all_completions_of_a_decoding_step(completions):
    """vLLM's own arithmetic of sizes, on the settings that it reads: a step decodes one token of each completion."""
    config = RolloutConfig(num_gpus=1, max_num_seqs=completions)
    settings = SimpleNamespace(
        model_config=SimpleNamespace(enforce_eager=False),
        scheduler_config=SimpleNamespace(max_num_seqs=completions, max_num_batched_tokens=config.pass_tokens),
        compilation_config=CompilationConfig(
            cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE, max_cudagraph_capture_size=config.captured
        ),
        uniform_decode_query_len=1,
        speculative_config=None,
        performance_mode="balanced",
    )
    VllmConfig._set_cudagraph_sizes(settings)
    sizes = settings.compilation_config.cudagraph_capture_sizes
    assert min(size for size in sizes if size >= completions) < completions + 16


def test_a_cache_without_room_for_the_longest_sequence_is_refused(tmp_path):
    """Qwen2.5-VL-7B in float32 on a CPU: 112 KiB a token."""
    ARCHITECTURES["Qwen2.5-VL-7B"]().save_pretrained(tmp_path)
    check_cache(tmp_path, RolloutConfig(max_prompt_tokens=8000))
    with pytest.raises(
        ValueError, match=r"9512 tokens, .*, need 1\.0 GiB of an engine's cache, which has 1; raise rollo"
    ):
        check_cache(tmp_path, RolloutConfig(max_prompt_tokens=9000))
    check_cache(tmp_path, RolloutConfig(max_prompt_tokens=9000, cpu_cache_gib=2))


def test_an_engine_says_what_vllm_settled():
    config = SimpleNamespace(
        model_config=SimpleNamespace(dtype=torch.bfloat16, enforce_eager=False),
        cache_config=SimpleNamespace(cache_dtype="auto", kv_cache_size_tokens=870_000, kv_cache_max_concurrency=212.4),
        scheduler_config=SimpleNamespace(max_num_seqs=688, max_num_batched_tokens=16384),
    )
    assert str(report(config, ["FLASH_ATTN"])) == (
        "bfloat16, FLASH_ATTN, KV cache of 870,000 tokens (212.4 sequences of the longest), 688 completions at a time, "
        "16,384 tokens a pass, CUDA graphs"
    )


def test_what_sleeping_does_in_vllm():
    """Read in vLLM 0.32: `AsyncLLM.sleep` clears the cache of images on its own side and pauses the engine's core,
    which lets requests in flight end in mode `wait`. At level 2 the worker keeps buffers, such as rotary tables, on the
    host, and frees weights and KV cache, of which level 1 would copy the weights to page-locked memory. `wake_up` takes
    tags, and says whether all have woken; only then does the core schedule again."""
    assert list(inspect.signature(AsyncLLM.sleep).parameters) == ["self", "level", "mode"]
    assert "clear_mm_cache_async" in inspect.getsource(AsyncLLM.sleep)
    assert list(inspect.signature(AsyncLLM.wake_up).parameters) == ["self", "tags"]
    assert "return fully_awake" in inspect.getsource(EngineCore.wake_up)
    assert {"weights", "kv_cache"} == SLEEP_TAGS
    worker = inspect.getsource(Worker.sleep)
    assert "model.named_buffers()" in worker and "self.sleep_mode_backend.suspend(level)" in worker
    assert 'offload_tags = ("weights", *offload_tags)' in inspect.getsource(CuMemBackend.suspend)


def test_an_engine_may_fall_asleep_again_with_only_its_weights_awake():
    """As after a learner that died before it sent them: the executor looks at the tag of the weights alone."""
    source = inspect.getsource(Executor.sleep)
    assert 'if "weights" in self.sleeping_tags:' in source and "self.sleeping_tags |= SLEEP_TAGS" in source


def test_memory_that_is_given_away_is_asked_for_at_the_start():
    """`enable_sleep_mode` has weights and KV cache allocated in a pool that can be unmapped; a CPU has none."""
    assert RolloutConfig(num_gpus=0.3).sleeping().sleeps and not RolloutConfig(num_gpus=0.3).sleeps
    assert not RolloutConfig().sleeping().sleeps
    assert "enable_cumem_allocator = True" in inspect.getsource(ModelConfig.__post_init__)
