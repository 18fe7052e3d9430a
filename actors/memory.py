"""What a rollout's engine and a segmenter's expert need of their GPU."""

from pathlib import Path
from typing import Any

import torch
from segment_anything.modeling import Sam

from actors.config import RolloutConfig, SegmenterConfig
from actors.experts.promptable import DTYPES, ROWS_ON_GPU
from actors.experts.registry import sam_config
from actors.experts.sam import build_sam, mask_decoder
from actors.experts.sam_config import SamConfig
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
    """What an expert needs of its GPU; nothing, as far as is known, if it is no Segment Anything model."""
    sizes = sam_config(expert)
    return Need(certain={}) if sizes is None else sam_need(sizes, config.dtype)


def sam_need(sizes: SamConfig, dtype: str) -> Need:
    """What a Segment Anything model of these sizes needs. dtype: of its image encoder."""
    with torch.device("meta"):
        sam = build_sam(sizes)
    encoder = parameters(sam.image_encoder)
    weights = encoder * DTYPES[dtype].itemsize + (parameters(sam) - encoder) * 4
    return Need(
        certain={"weights": weights},
        estimated={
            "activations": max(_embedding(sam, sizes, DTYPES[dtype]), _decoding(sam, sizes)),
            "runtime": 1 << 29,
        },
        remedy="set segmenter.dtype to bfloat16, give segmenter.num_gpus a larger share, or choose a smaller expert",
    )


@torch.no_grad()
def _embedding(sam: Sam, sizes: SamConfig, dtype: torch.dtype) -> int:
    """Bytes at the peak of embedding an image. The encoder materialises its attention scores."""
    side = sizes.image_side
    with torch.device("meta"), LiveBytes() as live:
        sam.image_encoder.to(dtype)(torch.empty(1, 3, side, side, dtype=dtype))
    return live.peak


@torch.no_grad()
def _decoding(sam: Sam, sizes: SamConfig) -> int:
    """Bytes at the peak of decoding a pass of prompts about as many images, each of a box and two points."""
    channels, grid = sizes.prompt_dim, sizes.grid
    original = (_IMAGE_SIDE, _IMAGE_SIDE)
    with torch.device("meta"), LiveBytes() as live:
        decoder = mask_decoder(
            sam.mask_decoder, torch.empty(grid * grid, channels), alternatives=sizes.multimask_outputs > 0
        )
        images = torch.empty(ROWS_ON_GPU, channels, grid, grid)
        logits, _ = decoder(images, (), torch.empty(ROWS_ON_GPU, 4, channels))
        sam.postprocess_masks(logits[:, None], original, original)
    return live.peak
