"""Attention over a packed sequence of prefix trees, each a prefix and its branches, without a mask.

    packed sequence   p p p p | a a a | b b ‖ q q | c c c
    chunks            ├──────┤├─────┤├───┤  ├───┤├─────┤     each sees itself, causally
    across                    └──► p ◄──┘         └──► q      a branch sees its whole prefix

A token of a branch sees the whole prefix, and its own branch up to itself. Its attention is therefore two attentions:
over the branch, which is plainly causal, as that of a prefix is, and over the prefix, all of which is visible. Each is
one call of a variable-length kernel (`learner.kernels`) for the whole packed sequence, and the two results are merged
by their log-sum-exps (Hydragen does this for inference, Juravsky et al. 2024, arXiv:2402.05099). Given the merged
output and log-sum-exp, the kernel's backward returns each part's share of the gradient, so nothing of the size of a
mask, or of prefix times branches, is ever allocated.

The vision tower attends within windows, which go through the same kernels: on a GPU one call a layer, on a CPU one for
each run of equal windows. transformers would make one call a window.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any, Self

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from learner.kernels import Kernel, Segments, kernel_for

TEXT, VISION = "shared_prefix", "flash_segments"
"""Names of our attentions in `_attn_implementation`. transformers hands a tower's windows to the attention as a whole
where its name contains "flash", and splits them otherwise."""


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


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the prefix trees of a packed sequence lie."""

    chunks: Segments
    """Each prefix and each branch, which sees itself causally."""
    across: Segments | None
    """The branch tokens of each tree, which see its prefix; None where no tree has a branch."""
    branch_rows: torch.Tensor
    """int64 [B]: positions of all branch tokens."""
    prefix_rows: torch.Tensor
    """int64 [P]: positions of the tokens of all prefixes that have branches."""

    @classmethod
    def of(cls, spans: Sequence[Span]) -> Self:
        """spans: one per tree, in order and without gaps."""
        chunks = [length for span in spans for length in (span.prefix, *span.branches)]
        counts = [len(span.branches) for span in spans]
        firsts = [0, *accumulate(count + 1 for count in counts)]
        batches = [
            each
            for first, count in zip(firsts, counts, strict=False)
            for each in (range(first, first + 1), range(first + 1, first + 1 + count))
            if each
        ]
        grown = [span for span in spans if span.branches]
        return cls(
            chunks=Segments.of(chunks, chunks, causal=True, batches=tuple(batches)),
            across=Segments.of([sum(s.branches) for s in grown], [s.prefix for s in grown], causal=False)
            if grown
            else None,
            branch_rows=_rows([(span.start + span.prefix, span.end) for span in grown]),
            prefix_rows=_rows([(span.start, span.start + span.prefix) for span in grown]),
        )

    def to(self, device: str | torch.device) -> Self:
        """The same, with indices on another device."""
        return replace(
            self,
            chunks=self.chunks.to(device),
            across=self.across and self.across.to(device),
            branch_rows=self.branch_rows.to(device),
            prefix_rows=self.prefix_rows.to(device),
        )


def _rows(bounds: Sequence[tuple[int, int]]) -> torch.Tensor:
    return torch.cat([torch.arange(start, end) for start, end in bounds] or [torch.arange(0)])


def use_shared_prefix(model: Any, *, kernel: Kernel | None = None) -> None:
    """Let a Qwen-VL model take a `Layout` as the argument `shared_prefix`; without one it works as before. Its vision
    tower attends to many windows at once. kernel: of all attention, the tower's too; None for that of each tensor's
    device and precision when it is computed, so that the model may move afterwards."""
    suffix = "" if kernel is None else f"_{type(kernel).__name__}"
    if kernel is not None:
        _register(kernel, suffix)
    model.config.text_config._attn_implementation = TEXT + suffix
    model.config.vision_config._attn_implementation = VISION + suffix


def _register(kernel: Kernel | None, suffix: str = "") -> None:
    """Tell transformers of both attentions, which it looks up by the name in `_attn_implementation`."""
    AttentionInterface.register(TEXT + suffix, partial(_attend, kernel))
    AttentionInterface.register(VISION + suffix, partial(_attend_windows, kernel))
    # The mask function serves calls without a layout.
    AttentionMaskInterface.register(TEXT + suffix, sdpa_mask)


def _attend(
    kernel: Kernel | None,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    shared_prefix: Layout | None = None,
    **rest: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """transformers' attention interface: query [1, H, S, D], key and value [1, K, S, D] → [1, S, H, D]."""
    if shared_prefix is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **rest)[0], None
    kernel = kernel or kernel_for(query.device, query.dtype)
    q, k, v = (each[0].transpose(0, 1) for each in (query, key, value))
    return shared_prefix_attention(q, k, v, shared_prefix, kernel, rest["scaling"])[None], None


def _attend_windows(
    kernel: Kernel | None,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    *,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    scaling: float,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    """The same interface as transformers calls it for a vision tower. cu_seq_lens_q: the windows' bounds, int32
    [windows + 1]; max_length_q: rows of the longest."""
    windows = Segments(
        query_bounds=cu_seq_lens_q,
        key_bounds=cu_seq_lens_q,
        longest_query=max_length_q,
        longest_key=max_length_q,
        rows=query.shape[2],
        causal=False,
    )
    rows = (each[0].transpose(0, 1) for each in (query, key, value))
    found: torch.Tensor = _Within.apply(  # type: ignore[no-untyped-call]
        *rows, windows, kernel or kernel_for(query.device, query.dtype), scaling
    )
    return found[None], None


_register(None)


def shared_prefix_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, kernel: Kernel, scale: float
) -> torch.Tensor:
    """Attention over a packed sequence: query [S, H, D], key, value [S, K, D] → [S, H, D]. scale: of the scores."""
    found: torch.Tensor = _SharedPrefix.apply(query, key, value, layout, kernel, scale)  # type: ignore[no-untyped-call]
    return found


class _Within(torch.autograd.Function):
    """Attention within segments: query [T, H, D], key, value [T, K, D] → [T, H, D]."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        segments: Segments,
        kernel: Kernel,
        scale: float,
    ) -> torch.Tensor:
        out, lse = kernel.forward(query, key, value, segments, scale)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.segments, ctx.kernel, ctx.scale = segments, kernel, scale
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        found = ctx.kernel.backward(gradient.contiguous(), *ctx.saved_tensors, ctx.segments, ctx.scale)
        return (*found, None, None, None)


class _SharedPrefix(torch.autograd.Function):
    """`shared_prefix_attention` and its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layout: Layout,
        kernel: Kernel,
        scale: float,
    ) -> torch.Tensor:
        out, lse = kernel.forward(query, key, value, layout.chunks, scale)
        if layout.across is not None:
            branches, prefixes = layout.branch_rows, layout.prefix_rows
            above, above_lse = kernel.forward(
                query.index_select(0, branches),
                key.index_select(0, prefixes),
                value.index_select(0, prefixes),
                layout.across,
                scale,
            )
            own, own_lse = out.index_select(0, branches), lse.index_select(1, branches)
            # The softmax over the union of both key sets has the sum of their denominators, so each part is weighted
            # by its share of that sum.
            share = torch.sigmoid(above_lse - own_lse).T[..., None]
            # In the precision of the shares: in 16 bit, rounded shares and products would double the error.
            merged = torch.lerp(own.to(share.dtype), above.to(share.dtype), share)
            out.index_copy_(0, branches, merged.to(out.dtype))
            lse.index_copy_(1, branches, torch.logaddexp(above_lse, own_lse))
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.layout, ctx.kernel, ctx.scale = layout, kernel, scale
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # The kernel recomputes its attention weights as exp(q·k - lse). With the merged log-sum-exp these are the
        # weights within the union of both key sets, so both calls together return the whole gradient.
        layout, kernel, scale = ctx.layout, ctx.kernel, ctx.scale
        query, key, value, out, lse = ctx.saved_tensors
        gradient = gradient.contiguous()
        dq, dk, dv = kernel.backward(gradient, query, key, value, out, lse, layout.chunks, scale)
        if layout.across is not None:
            branches, prefixes = layout.branch_rows, layout.prefix_rows
            dq_above, dk_above, dv_above = kernel.backward(
                gradient.index_select(0, branches),
                query.index_select(0, branches),
                key.index_select(0, prefixes),
                value.index_select(0, prefixes),
                out.index_select(0, branches),
                lse.index_select(1, branches).contiguous(),
                layout.across,
                scale,
            )
            dq.index_add_(0, branches, dq_above)
            dk.index_add_(0, prefixes, dk_above)
            dv.index_add_(0, prefixes, dv_above)
        return dq, dk, dv, None, None, None
