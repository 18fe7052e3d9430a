"""Attention over a packed sequence of prefix trees, each a prefix and its branches, without a mask.

    packed sequence   p p p p a a a b b | q q c c c
    spans             4 + (3, 2)        | 2 + (3)

A token of a branch sees the whole prefix, and its own branch up to itself. Its attention is therefore two attentions:
over the prefix, all of which is visible, and over the branch, which is plainly causal. Each is one call of torch's
flash kernel, and the two results are merged by their log-sum-exps (Hydragen does this for inference, Juravsky et al.
2024, arXiv:2402.05099). Given the merged output and log-sum-exp, the kernel's backward returns each part's share of
the gradient, so nothing of the size of a mask, or of prefix times branches, is ever allocated.

On a GPU the same packed sequence goes through flex-attention with a block mask.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "shared_prefix"

# torch's public `scaled_dot_product_attention` returns the output alone. Merging needs the log-sum-exp too, and a
# backward that takes the merged pair, so the operators beneath it are called. Those of the CPU have this suffix; the
# CUDA kernels have other signatures and no float32, and GPUs are given a block mask instead.
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True, kw_only=True)
class Span:
    """One prefix tree's place in a packed sequence."""

    start: int
    """Position of its first token in the packed sequence."""
    prefix: int
    """Tokens of the prefix."""
    branches: tuple[int, ...]
    """Tokens of each branch."""

    @property
    def end(self) -> int:
        return self.start + self.prefix + sum(self.branches)

    @cached_property
    def padded(self) -> torch.Tensor:
        """[n * L] int64: for each place of the branches as a padded batch [n, L], which token after the prefix lies
        there. A branch shorter than L repeats its last token."""
        starts = [0, *accumulate(self.branches)][:-1]
        steps = torch.arange(max(self.branches))
        return torch.cat(
            [start + steps.clamp(max=length - 1) for start, length in zip(starts, self.branches, strict=True)]
        )

    @cached_property
    def unpadded(self) -> torch.Tensor:
        """[B] int64: the place of each of the B branch tokens in the padded batch, flattened."""
        width = max(self.branches)
        return torch.cat([i * width + torch.arange(length) for i, length in enumerate(self.branches)])


@dataclass(frozen=True)
class Layout:
    """Where the prefix trees of a packed sequence lie."""

    spans: tuple[Span, ...]
    """One per tree, in order and without gaps."""

    def mask(self, device: torch.device) -> BlockMask:
        """The same visibility as a block mask for flex-attention."""
        lengths = torch.tensor([span.end - span.start for span in self.spans])
        tree = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(device)
        branch = torch.cat([_branch_indices(span) for span in self.spans]).to(device)

        def sees(_batch: torch.Tensor, _head: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            prefix_or_own = (branch[k] == 0) | (branch[k] == branch[q])
            return (tree[k] == tree[q]) & prefix_or_own & (k <= q)

        return create_block_mask(sees, B=None, H=None, Q_LEN=len(tree), KV_LEN=len(tree), device=str(device))


def _branch_indices(span: Span) -> torch.Tensor:
    """Of each token: 0 in the prefix, i in the i-th branch."""
    lengths = torch.tensor([span.prefix, *span.branches])
    return torch.repeat_interleave(torch.arange(len(lengths)), lengths)


def use_shared_prefix(model: Any) -> None:
    """Let a Qwen-VL model take a `Layout` or a `BlockMask` as the argument `shared_prefix`; without one it works as
    before."""
    model.config.text_config._attn_implementation = NAME


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    shared_prefix: Layout | BlockMask | None = None,
    **rest: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """transformers' attention interface: query [1, H, S, D], key and value [1, K, S, D] → [1, S, H, D]."""
    if isinstance(shared_prefix, BlockMask):
        found = flex_attention_forward(module, query, key, value, shared_prefix, **rest)
        return found[0], None
    if shared_prefix is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **rest)[0], None
    # The CPU kernel knows no grouped-query attention: each key-value head is repeated for its query heads.
    heads = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, heads), repeat_kv(value, heads)
    parts = []
    for span in shared_prefix.spans:
        q, k, v = (each[:, :, span.start : span.end] for each in (query, key, value))
        parts.append(_SharedPrefix.apply(q, k, v, span, rest["scaling"]))  # type: ignore[no-untyped-call]
    return torch.cat(parts, dim=2).transpose(1, 2), None


# transformers looks both up by the name in `_attn_implementation`. The mask function serves calls without a layout.
AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


class _SharedPrefix(torch.autograd.Function):
    """Attention within one span: query, key, value [1, H, S, D] → [1, H, S, D]."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, span: Span, scale: float
    ) -> torch.Tensor:
        p = span.prefix
        prefix = key[:, :, :p], value[:, :, :p]
        out, lse = _flash(query[:, :, :p], *prefix, is_causal=True, scale=scale)
        if span.branches:
            q, k, v = (each[:, :, p:] for each in (query, key, value))
            above, above_lse = _flash(q, *prefix, scale=scale)
            own, own_lse = _flash(*(_pad(each, span) for each in (q, k, v)), is_causal=True, scale=scale)
            own, own_lse = _unpad(own, span), _unpad(own_lse[..., None], span)[..., 0]
            # The softmax over the union of both key sets has the sum of their denominators, so each part is weighted
            # by its share of that sum.
            both = torch.logaddexp(above_lse, own_lse)
            shares = ((part - both).exp()[..., None].to(out.dtype) for part in (above_lse, own_lse))
            merged = above * next(shares) + own * next(shares)
            out, lse = torch.cat([out, merged], dim=2), torch.cat([lse, both], dim=2)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.span, ctx.scale = span, scale
        result: torch.Tensor = out
        return result

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # The kernel recomputes its attention weights as exp(q·k - lse). With the merged log-sum-exp these are the
        # weights within the union of both key sets, so both calls together return the whole gradient.
        span, scale, p = ctx.span, ctx.scale, ctx.span.prefix
        query, key, value, out, lse = ctx.saved_tensors
        prefix = key[:, :, :p], value[:, :, :p]
        head = (each[:, :, :p] for each in (gradient, query))
        dq, dk, dv = _flash_backward(
            *head, *prefix, out[:, :, :p].contiguous(), lse[:, :, :p].contiguous(), 0.0, True, scale=scale
        )
        if not span.branches:
            return dq, dk, dv, None, None
        g, q, k, v, o = (each[:, :, p:].contiguous() for each in (gradient, query, key, value, out))
        both = lse[:, :, p:].contiguous()
        dq_above, dk_above, dv_above = _flash_backward(g, q, *prefix, o, both, 0.0, False, scale=scale)
        # Padding is given a gradient of 0: its repeated tokens would otherwise count more than once.
        padded = [_pad(each, span) for each in (q, k, v, o)]
        g_padded = torch.zeros_like(padded[0]).transpose(0, 1).flatten(1, 2)
        g_padded = g_padded.index_copy(1, span.unpadded.to(g.device), g[0]).unflatten(1, (len(span.branches), -1))
        own = _flash_backward(
            g_padded.transpose(0, 1),
            *padded,
            _pad(both[..., None], span)[..., 0].contiguous(),
            0.0,
            True,
            scale=scale,
        )
        dq_own, dk_own, dv_own = (_unpad(each, span) for each in own)
        return (
            torch.cat([dq, dq_above + dq_own], dim=2),
            torch.cat([dk + dk_above, dk_own], dim=2),
            torch.cat([dv + dv_above, dv_own], dim=2),
            None,
            None,
        )


def _pad(packed: torch.Tensor, span: Span) -> torch.Tensor:
    """[1, H, B, D] of all branches, one after another → [n, H, L, D]."""
    chosen = packed[0].index_select(1, span.padded.to(packed.device))
    padded: torch.Tensor = chosen.unflatten(1, (len(span.branches), -1)).transpose(0, 1)
    return padded


def _unpad(padded: torch.Tensor, span: Span) -> torch.Tensor:
    """[n, H, L, D] → [1, H, B, D]; the inverse of `_pad`."""
    return padded.transpose(0, 1).flatten(1, 2).index_select(1, span.unpadded.to(padded.device))[None]
