"""What a model needs of a device's memory, counted without loading it.

The model is built from its configuration on torch's meta device, where tensors have shapes and no memory. Parameters
are counted there. What a layer keeps for its backward pass, and what it needs at its peak, is counted by running the
real layer there and following the storages that it makes: so the count follows the architecture's own code.
"""

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AutoConfig, AutoModelForImageTextToText

GIB = 1 << 30

_ATTENTION = "footprint"


@dataclass(frozen=True, kw_only=True)
class Need:
    """What an actor needs, in bytes by what for. Sizes that follow from the configuration are apart from estimates."""

    certain: Mapping[str, int]
    """On its GPU."""
    estimated: Mapping[str, int] = field(default_factory=dict)
    """On its GPU, beside those: activations, buffers and the like."""
    host: Mapping[str, int] = field(default_factory=dict)
    """In the memory of its node, certain too."""
    reserved: int | None = None
    """What it takes of its GPU, whatever it needs; None where that is what it needs."""
    note: str = ""
    """What the rest of the reserved memory is good for."""
    remedy: str = ""
    """What to change if it is too much."""

    @property
    def parts(self) -> dict[str, int]:
        """All parts on the GPU."""
        return {**self.certain, **self.estimated}

    @property
    def total(self) -> int:
        """Bytes on the GPU."""
        return sum(self.parts.values())


def empty_model(config: Any, dtype: torch.dtype) -> Any:
    """A Qwen-VL model without memory. config: its transformers configuration, or the folder that holds it."""
    if isinstance(config, Path):
        config = AutoConfig.from_pretrained(config)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    for part in (model.config.text_config, model.config.vision_config):
        part._attn_implementation = _ATTENTION
    return model


def parameters(module: Any, *, trained: bool = False) -> int:
    """Number of a module's parameters, tied ones once. trained: of those that learn."""
    return sum(each.numel() for each in module.parameters() if each.requires_grad or not trained)


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes that a part of a model needs, beside its weights and its input."""

    kept: int
    """Between its forward and its backward pass."""
    peak: int
    """At the peak of both together, the gradients of its parameters included."""
    forward: int
    """At the peak of a forward pass that nothing learns from."""

    @classmethod
    def of(cls, run: Callable[[torch.Tensor], torch.Tensor], given: torch.Tensor) -> Self:
        """Of a call with one tensor on the meta device; that it needs a gradient says that something before it
        learns."""
        with torch.no_grad(), LiveBytes() as forward:
            run(given.detach())
        with LiveBytes() as both:
            result = run(given)
            kept = both.now
            if result.requires_grad:
                result.backward(torch.empty_like(result))
        return cls(kept=kept if result.requires_grad else 0, peak=both.peak, forward=forward.peak)


def text_layer(model: Any, tokens: int) -> Footprint:
    """Of one layer of the language model over so many tokens."""
    layer, width = model.model.language_model.layers[0], model.config.text_config.hidden_size
    turns = _rotations(tokens, layer.self_attn.head_dim, model.dtype, batch=(1,))
    hidden = _hidden(model, 1, tokens, width)
    return Footprint.of(lambda x: layer(x, position_embeddings=turns), hidden)


def text_end(model: Any, tokens: int) -> Footprint:
    """Of the language model's last norm."""
    return Footprint.of(
        model.model.language_model.norm, _hidden(model, 1, tokens, model.config.text_config.hidden_size)
    )


def vision_block(model: Any, patches: int) -> Footprint:
    """Of one layer of the vision tower over so many patches."""
    visual = model.model.visual
    block, width = visual.blocks[0], _vision_width(model)
    turns = _rotations(patches, width // block.attn.num_heads, torch.float32)
    lengths = torch.tensor([0, patches], device="cpu")
    hidden = _hidden(model, patches, width, learns=any(each.requires_grad for each in block.parameters()))
    return Footprint.of(lambda x: block(x, cu_seqlens=lengths, position_embeddings=turns), hidden)


def mergers(model: Any, patches: int) -> list[Footprint]:
    """Of each module that projects the vision tower's features to image tokens."""
    visual = model.model.visual
    learns = any(each.requires_grad for each in visual.blocks.parameters())
    hidden = _hidden(model, patches, _vision_width(model), learns=learns)
    return [Footprint.of(merger, hidden) for merger in (visual.merger, *getattr(visual, "deepstack_merger_list", ()))]


def cache_bytes(model: Any, element_bytes: int) -> int:
    """Of the keys and values of one token in all layers."""
    config = model.config.text_config
    heads: int = config.num_key_value_heads
    size: int = model.model.language_model.layers[0].self_attn.head_dim
    layers: int = config.num_hidden_layers
    return 2 * layers * heads * size * element_bytes


def patches_of(model: Any, image_tokens: int) -> int:
    """Patches that so many image tokens are made of."""
    merged: int = model.config.vision_config.spatial_merge_size
    return image_tokens * merged * merged


class LiveBytes(TorchDispatchMode):
    """Follows the storages of the tensors that are made within the context, on any device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: int = 0
        self.peak: int = 0
        self._alive: dict[int, Any] = {}

    def __enter__(self) -> Self:
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {_key(each) for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)}
        for each in tree_leaves(result):
            # An operation that returns a view, or what it was given, makes no storage.
            if isinstance(each, torch.Tensor) and _key(each) not in given:
                self._follow(each.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive[key] = weakref.ref(storage, lambda _: self._ended(key, size))
        self.now += size
        self.peak = max(self.peak, self.now)

    def _ended(self, key: int, size: int) -> None:
        del self._alive[key]
        self.now -= size


def _key(tensor: torch.Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key


class _Attention(torch.autograd.Function):
    """What any fused attention keeps: queries, keys, values, its output and the log-sum-exp of each row."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(each) for each in ctx.saved_tensors[:3])


def _attend(
    _module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any = None, **_: Any
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [1, H, S, D], key and value [1, K, S, D] → [1, S, H, D]."""
    out: torch.Tensor = _Attention.apply(query, key, value)  # type: ignore[no-untyped-call]
    return out.transpose(1, 2), None


# On the meta device torch's own would take the kernel that materialises the scores, which no GPU does.
AttentionInterface.register(_ATTENTION, _attend)


def _hidden(model: Any, *shape: int, learns: bool = True) -> torch.Tensor:
    return torch.empty(*shape, device="meta", dtype=model.dtype, requires_grad=learns)


def _rotations(
    count: int, size: int, dtype: torch.dtype, *, batch: tuple[int, ...] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    """The cosines and sines of rotary positions."""
    return (
        torch.empty(*batch, count, size, device="meta", dtype=dtype),
        torch.empty(*batch, count, size, device="meta", dtype=dtype),
    )


def _vision_width(model: Any) -> int:
    width: int = model.model.visual.blocks[0].norm1.weight.shape[0]
    return width
