"""What a rank of the learner needs of its GPU: DeepSpeed's ZeRO as arithmetic, and activations by the token budget.

    N parameters of b bytes, T of them trained, over R ranks
    weights                 b N               stage 3: / R
    gradients               4 T               from stage 2 on: / R    bfloat16 is trained with float32 accumulation
    masters and moments     12 T              from stage 1 on: / R    8 T where parameters are their own masters

How each stage holds these was read in DeepSpeed 0.19.8; tests compare it with a running rank.
"""

from pathlib import Path
from typing import Any, Literal

import torch

from learner.config import REDUCE_BUCKET, LearnerConfig, ZeroConfig
from learner.lora import add_adapters
from learner.policy import freeze
from learner.shared_prefix import LOGITS_BYTES
from reasoner.footprint import (
    Footprint,
    Need,
    empty_model,
    mergers,
    parameters,
    patches_of,
    text_end,
    text_layer,
    vision_block,
)

LIVE = 1_050_000_000
"""Parameters of stage 3 that are whole at a time, in elements (`stage3_max_live_parameters` and the prefetch)."""
RUNTIME = 3 << 29
"""CUDA's context, cuBLAS's workspace and NCCL's buffers, in bytes."""
_LOGITS = 5  # blocks of logits alive at once in `learner.shared_prefix.branch_scores`
_PATCH_BYTES = 3 * 2 * 16 * 16 * 4  # a patch of pixels in float32, as the processor cuts it

Reference = Literal["none", "parked", "partitioned"]


def learning_model(source: Any, config: ZeroConfig) -> Any:
    """The model that a rank trains, without memory: frozen in part, adapters added. source: a model's folder, or its
    transformers configuration."""
    model = empty_model(source, getattr(torch, config.dtype))
    freeze(model, config.freeze)
    if config.lora:
        add_adapters(model, config.lora)
    return model


def rank_need(source: Path | Any, config: ZeroConfig, image_tokens: int) -> Need:
    """What one rank needs. source: as for `learning_model`. image_tokens: of a packed sequence."""
    model = learning_model(source, config)
    element, stage = model.dtype.itemsize, config.zero_stage
    everything, trained = parameters(model), parameters(model, trained=True)

    def held(count: int, from_stage: int) -> int:
        """Of so many elements, those of one rank."""
        return -(-count // config.ranks) if stage >= from_stage else count

    # ZeRO clones masters from parameters in float32 too; without it they are their own.
    own_masters = config.dtype == "float32" and stage == 0
    parts = {
        "weights": element * held(everything, 3),
        "gradients": 4 * held(trained, 2),
        "optimizer": (8 if own_masters else 12) * held(trained, 1),
    }
    host = _offloaded(parts, config, 2 * held(trained, 1))
    stored, passing = activations(model, config, image_tokens)
    estimated = {"activations": stored, "reduction": _reduction(model, config), "runtime": RUNTIME}
    if stage == 3:
        estimated["gathered"] = element * min(everything, LIVE)
    if reference_of(config) == "parked":
        # A whole copy, while nothing is kept for a backward pass and nothing is reduced.
        copy = element * parameters(model)
        # torch gives page-locked memory in powers of two, a tensor at a time.
        rounded = [1 << (element * each.numel() - 1).bit_length() for each in model.parameters()]
        host["reference"] = sum(rounded) if config.num_gpus > 0 else copy
        estimated["reference"] = max(0, copy + passing - stored - estimated["reduction"])
    elif reference_of(config) == "partitioned":
        parts["reference"] = element * -(-everything // config.ranks)
    return Need(certain=parts, estimated=estimated, host=host, remedy=_remedy(config))


def resting(source: Path | Any, config: ZeroConfig, image_tokens: int, *, parked: bool) -> Need:
    """What one rank needs between two steps, in which nothing passes through it. parked: its optimizer state is in host
    memory (`learner.parking`)."""
    at_work = rank_need(source, config, image_tokens)
    state = {name: at_work.certain[name] for name in ("optimizer",) if name in at_work.certain}
    # Stage 3 keeps the buffer of its gradients; the others let go of them.
    buffer = at_work.certain.get("gradients", 0) if config.zero_stage == 3 else 0
    certain = {name: size for name, size in at_work.certain.items() if name in ("weights", "reference")}
    bucket = {"reduction": 4 * REDUCE_BUCKET} if config.zero_stage == 3 else {}
    estimated = {"runtime": RUNTIME, **bucket}
    if not parked:
        return Need(certain={**certain, **state, **({"gradients": buffer} if buffer else {})}, estimated=estimated)
    # torch gives page-locked memory in powers of two: master weights and two moments, each of which may be flat.
    third = -(-sum(state.values()) // 3)
    rounded = 3 * (1 << (third - 1).bit_length()) if state and config.num_gpus > 0 else sum(state.values())
    return Need(
        certain=certain,
        estimated=estimated,
        host={"parked": rounded} if state else {},
        remedy="raise learner.ranks and rollout.actors, raise learner.zero_stage to 3, or set placement to "
        "disaggregated",
    )


def reference_of(config: ZeroConfig) -> Reference:
    """Where the reference model is. Adapters need none: the model without them is the reference."""
    if not isinstance(config, LearnerConfig) or config.objective.kl == 0 or config.lora:
        return "none"
    return config.reference_kind


def activations(model: Any, config: ZeroConfig, image_tokens: int) -> tuple[int, int]:
    """Bytes at the peak of forward and backward pass over a packed sequence, and of a forward pass alone."""
    text, tokens = model.config.text_config, config.micro_batch_tokens
    patches, element = patches_of(model, image_tokens), model.dtype.itemsize
    hidden = tokens * text.hidden_size * element
    layer, end = text_layer(model, tokens), text_end(model, tokens)
    block, merged = vision_block(model, patches), mergers(model, patches)
    towers = (
        _chain(layer, text.num_hidden_layers, hidden, config.checkpoints_layers),
        _chain(block, len(model.model.visual.blocks), _input(model, block, patches), config.checkpoints_layers),
    )
    logits = _LOGITS * min(LOGITS_BYTES, 4 * tokens * text.vocab_size)
    if model.lm_head.weight.requires_grad:
        logits += 2 * element * model.lm_head.weight.numel()  # its gradient, and that of one block to be added
    pixels = patches * _PATCH_BYTES
    kept = sum(stored for stored, _ in towers) + end.kept + sum(each.kept for each in merged) + pixels
    learning = kept + max(logits, *(passing for _, passing in towers))
    return learning, pixels + 2 * hidden + max(logits, layer.forward, block.forward)


def _input(model: Any, block: Footprint, patches: int) -> int:
    """Bytes of a vision layer's input; 0 where nothing before its output learns."""
    width: int = model.model.visual.blocks[0].norm1.weight.shape[0]
    element: int = model.dtype.itemsize
    return patches * width * element if block.kept else 0


def _chain(layer: Footprint, count: int, given: int, checkpointing: bool) -> tuple[int, int]:
    """Bytes that layers keep for the backward pass, and that the pass through one of them needs beside. given: bytes of
    a layer's input. With checkpointing that is all that is kept."""
    if checkpointing or not layer.kept:
        return count * given, layer.peak
    return count * layer.kept + given, layer.peak - layer.kept


def _reduction(model: Any, config: ZeroConfig) -> int:
    """Bytes of the buffers that gradients are reduced in: DeepSpeed's bucket, and the copies of what is reduced at
    once. A parameter larger than the bucket is reduced by itself, where it is."""
    if config.zero_stage == 0:
        return 0
    learning = [each.numel() for each in model.parameters() if each.requires_grad]
    at_once: int = max(min(REDUCE_BUCKET, sum(learning)), max(learning))
    if config.zero_stage == 3:
        return 4 * (REDUCE_BUCKET + at_once)
    # Flattened, and in bfloat16 flattened before it is converted.
    return 2 * REDUCE_BUCKET + 6 * at_once if config.dtype == "bfloat16" else 4 * (REDUCE_BUCKET + at_once)


def _offloaded(parts: dict[str, int], config: ZeroConfig, staging: int) -> dict[str, int]:
    """Take what is offloaded out of `parts`, and return what is on the host. staging: bytes through which stages 1 and
    2 copy the stepped parameters back."""
    host: dict[str, int] = {}
    if config.offload == "none":
        return host
    host["optimizer"] = parts.pop("optimizer")
    if config.zero_stage == 3:
        host["gradients"] = parts.pop("gradients")
    else:
        host["gradients"] = parts["gradients"] + staging
    if config.offload == "parameters":
        host["weights"] = parts.pop("weights")
    return host


def _remedy(config: ZeroConfig) -> str:
    """What the configuration leaves to try, the most effective first."""
    ways = []
    if not config.checkpoints_layers:
        ways.append("set learner.gradient_checkpointing")
    if config.lora is None:
        ways.append("train adapters (learner.lora)")
    if config.zero_stage < 3:
        ways.append(f"raise learner.zero_stage from {config.zero_stage}")
    if config.offload == "none":
        ways.append("set learner.offload")
    ways.append(f"raise learner.ranks from {config.ranks}")
    ways.append(f"lower learner.micro_batch_tokens from {config.micro_batch_tokens}")
    return ", ".join(ways[:-1]) + f" or {ways[-1]}"
