"""Attention over a row of groups, each a prefix and its branches, without a mask.

    row        p p p p a a a b b | q q c c c
    spans      4 + (3, 2)        | 2 + (3)

A branch's token sees the whole prefix, and its own branch up to itself. That is two attentions: over the prefix all of
it is seen, over the branch it is plainly causal. Each is a call of torch's flash kernel; the two are merged by their
log-sum-exps (as Hydragen does for inference, Juravsky et al. 2024, arXiv:2402.05099). The kernel's backward takes the
merged output and log-sum-exp and gives each part's share of the gradient, so that nothing of the size of a mask, or of
the prefix times the branches, is ever made.

On a GPU the same row goes through flex-attention with a block mask.
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
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True, kw_only=True)
class Span:
    """One group in a row. start: column of its first token. prefix: tokens of its prefix. branches: of each branch."""

    start: int
    prefix: int
    branches: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.start + self.prefix + sum(self.branches)

    @cached_property
    def rows(self) -> torch.Tensor:
        """[n * L] int64: the branches as rows of equal length L, as columns after the prefix; a row that is too short
        goes on with its last token."""
        starts = [0, *accumulate(self.branches)][:-1]
        width = max(self.branches)
        steps = torch.arange(width)
        return torch.cat(
            [start + steps.clamp(max=length - 1) for start, length in zip(starts, self.branches, strict=True)]
        )

    @cached_property
    def columns(self) -> torch.Tensor:
        """[sum of branches] int64: where each branch token lies in `rows`."""
        width = max(self.branches)
        return torch.cat([i * width + torch.arange(length) for i, length in enumerate(self.branches)])


@dataclass(frozen=True)
class Layout:
    """The groups of one row, one after another."""

    spans: tuple[Span, ...]

    def mask(self, device: torch.device) -> BlockMask:
        """The same for flex-attention."""
        group = torch.cat([torch.full((span.end - span.start,), i) for i, span in enumerate(self.spans)]).to(device)
        owner = torch.cat([_owners(span) for span in self.spans]).to(device)

        def sees(_batch: torch.Tensor, _head: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            own = (owner[k] == 0) | (owner[k] == owner[q])
            return (group[k] == group[q]) & own & (k <= q)

        return create_block_mask(sees, B=None, H=None, Q_LEN=len(group), KV_LEN=len(group), device=str(device))


def _owners(span: Span) -> torch.Tensor:
    """0 for the prefix, i for the i-th branch."""
    lengths = torch.tensor([span.prefix, *span.branches])
    return torch.repeat_interleave(torch.arange(len(lengths)), lengths)


def use_shared_prefix(model: Any) -> None:
    """Let a Qwen-VL model take a `Layout` or a `BlockMask` as its argument `shared_prefix`; without one it works as
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
    heads = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, heads), repeat_kv(value, heads)
    parts = []
    for span in shared_prefix.spans:
        q, k, v = (each[:, :, span.start : span.end] for each in (query, key, value))
        parts.append(_SharedPrefix.apply(q, k, v, span, rest["scaling"]))  # type: ignore[no-untyped-call]
    return torch.cat(parts, dim=2).transpose(1, 2), None


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
            own, own_lse = _flash(*(_rows(each, span) for each in (q, k, v)), is_causal=True, scale=scale)
            own, own_lse = _columns(own, span), _columns(own_lse[..., None], span)[..., 0]
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
        # What repeats a row's last token has no gradient, and gives none.
        rows = [_rows(each, span) for each in (q, k, v, o)]
        g_rows = torch.zeros_like(rows[0]).transpose(0, 1).flatten(1, 2)
        g_rows = g_rows.index_copy(1, span.columns.to(g.device), g[0]).unflatten(1, (len(span.branches), -1))
        own = _flash_backward(
            g_rows.transpose(0, 1),
            *rows,
            _rows(both[..., None], span)[..., 0].contiguous(),
            0.0,
            True,
            scale=scale,
        )
        dq_own, dk_own, dv_own = (_columns(each, span) for each in own)
        return (
            torch.cat([dq, dq_above + dq_own], dim=2),
            torch.cat([dk + dk_above, dk_own], dim=2),
            torch.cat([dv + dv_above, dv_own], dim=2),
            None,
            None,
        )


def _rows(packed: torch.Tensor, span: Span) -> torch.Tensor:
    """[1, H, B, D] of all branches, one after another → [n, H, L, D]."""
    chosen = packed[0].index_select(1, span.rows.to(packed.device))
    rows: torch.Tensor = chosen.unflatten(1, (len(span.branches), -1)).transpose(0, 1)
    return rows


def _columns(rows: torch.Tensor, span: Span) -> torch.Tensor:
    """[n, H, L, D] → [1, H, B, D]; the inverse of `_rows`."""
    return rows.transpose(0, 1).flatten(1, 2).index_select(1, span.columns.to(rows.device))[None]
