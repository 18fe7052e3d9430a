"""What a rollout's engine and a segmenter's expert need of their GPU."""

from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import interpolate

from actors.config import RolloutConfig, SegmenterConfig
from actors.experts.promptable import DTYPES, ROWS_ON_GPU, Promptable, Rows
from actors.experts.registry import find_sizes
from reasoner.footprint import (
    LiveBytes,
    Need,
    cache_bytes,
    empty_model,
    parameters,
    patches_of,
    text_layer,
    vision_block,
)

RUNTIME = 3 << 29
"""CUDA's context, cuBLAS's workspace and an engine's CUDA graphs, in bytes."""
# Blocks of logits alive at once in a sampler that returns log-probs: computed, float32, scaled, and log-softmax.
_LOGITS = 4
_IMAGE_TOKENS = 16384  # the largest image that the processors of Qwen's folders let through; vLLM profiles with it
_IMAGE_SIDE = 2048  # assumed of an original image, to which masks are scaled


def engine_need(source: Path | Any, config: RolloutConfig, gpu: int) -> Need:
    """What an engine needs of each of its GPUs. source: the model's folder, or its transformers configuration. gpu: a
    GPU's memory in bytes, of which the engine reserves its share whatever it needs."""
    model = empty_model(source, getattr(torch, config.dtype))
    element, split = model.dtype.itemsize, config.tensor_parallel
    longest = config.longest
    per_token = cache_bytes(model, 1 if config.kv_cache == "fp8" else element) // min(
        split, model.config.text_config.num_key_value_heads
    )
    batch, sequences = config.pass_tokens, config.max_num_seqs or 128
    with torch.no_grad():
        text = text_layer(model, batch).forward
        vision = vision_block(model, patches_of(model, max(batch, _IMAGE_TOKENS))).forward
    logits = _LOGITS * 4 * sequences * model.config.text_config.vocab_size
    certain = {"weights": element * parameters(model) // split, "longest sequence": longest * per_token}
    estimated = {"workspace": max(text, vision, logits), "runtime": RUNTIME}
    reserved = int(config.gpu_memory * gpu)
    room = reserved - certain["weights"] - sum(estimated.values())
    return Need(
        certain=certain,
        estimated=estimated,
        reserved=reserved,
        note=f"room for {max(0, room) // (longest * per_token)} sequences of {longest} tokens",
        remedy=f"raise rollout.gpu_memory from {config.gpu_memory:g} or rollout.tensor_parallel from {split}, or lower "
        "rollout.max_prompt_tokens or max_tokens",
    )


def sleeping(config: RolloutConfig) -> Need:
    """What an engine needs of each of its GPUs while it sleeps: vLLM gives weights and KV cache away and keeps the
    process's own memory, with the CUDA graphs."""
    return Need(certain={}, estimated={"runtime": RUNTIME if config.num_gpus > 0 else 0})


def expert_need(expert: str, config: SegmenterConfig) -> Need:
    """What an expert needs of its GPU; nothing, as far as is known, if its sizes are not known."""
    found = find_sizes(expert, config.preprocess)
    if found is None:
        return Need(certain={})
    with torch.device("meta"):
        model = found.family.build(found.config)
        built = found.family.expert(
            model, found.config, name=found.name, preprocess=config.preprocess, device="meta", dtype=config.dtype
        )
        activations = _activations(built, found.config.image_side, DTYPES[config.dtype])
    return Need(
        certain={"weights": sum(parameter.nbytes for parameter in model.parameters())},
        estimated={"activations": activations, "runtime": 1 << 29},
        remedy="set segmenter.dtype to bfloat16, give segmenter.num_gpus a larger share, or choose a smaller expert",
    )


@torch.inference_mode()
def _activations(expert: Promptable, side: int, dtype: torch.dtype) -> int:
    """Bytes at the peak of embedding an image, where SAM's encoder materialises its attention scores, or of decoding a
    pass of boxes, each in an image of its own."""
    with LiveBytes() as embedding:
        levels = expert._features(torch.empty(1, 3, side, side, dtype=dtype))
    rows = Rows(boxes=torch.empty(ROWS_ON_GPU, 4), points=None, labels=None, masks=None)
    with LiveBytes() as decoding:
        logits, _ = expert._logits([torch.empty(ROWS_ON_GPU, *level.shape[1:]) for level in levels], rows)
        interpolate(logits[:, None], (_IMAGE_SIDE, _IMAGE_SIDE), mode="bilinear")
    return max(embedding.peak, decoding.peak)
