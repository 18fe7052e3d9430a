"""Variable-length attention: many segments of rows in one call, by the kernel that a device has.

A kernel takes queries [T, H, D] and keys and values [U, K, D], whose H / K query heads share a key head. Segment i of
the queries sees segment i of the keys and nothing else. It returns the output [T, H, D] and the log-sum-exp of the
scores, float32 [H, T], by which attentions over two sets of keys can be merged. Its backward takes output and
log-sum-exp from outside, so that those of a merged attention can be given (`learner.attention`).

    device   precision    kernel                                       why
    cuda     16 bit       torch's flash attention                      the fastest; takes nothing else
    cuda     float32      torch's memory-efficient attention           flash attention has no float32
    cpu      any          torch's flash attention for CPU, batched     no variable-length kernel there

`Reference` computes the same from the definition, for tests. What was read of the CUDA operators, which no CPU can run,
stands in `tests/learner/test_kernels.py`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate, groupby, pairwise
from typing import Protocol, Self

import torch

_aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Segments:
    """Which rows of the queries see which rows of the keys."""

    query_bounds: torch.Tensor
    """int32 [segments + 1]: where each segment of the queries begins, and where the last ends."""
    key_bounds: torch.Tensor
    """int32 [segments + 1]: the same of the keys."""
    longest_query: int
    """Rows of the longest segment of the queries."""
    longest_key: int
    """Rows of the longest segment of the keys."""
    rows: int
    """Rows of all queries."""
    causal: bool
    """Query j of a segment sees its keys 0 to j alone; both then have the same bounds."""
    batches: tuple[range, ...] = ()
    """Causal segments of similar lengths, which a kernel without variable lengths pads to one batch; () for runs of
    equal segments, which need no padding."""

    @classmethod
    def of(cls, queries: Sequence[int], keys: Sequence[int], *, causal: bool, batches: tuple[range, ...] = ()) -> Self:
        """From the rows of each segment."""
        bounds = [torch.tensor([0, *accumulate(rows)], dtype=torch.int32) for rows in (queries, keys)]
        return cls(
            query_bounds=bounds[0],
            key_bounds=bounds[1],
            longest_query=max(queries),
            longest_key=max(keys),
            rows=sum(queries),
            causal=causal,
            batches=batches,
        )

    def to(self, device: str | torch.device) -> Self:
        """The same, with bounds on another device."""
        return replace(self, query_bounds=self.query_bounds.to(device), key_bounds=self.key_bounds.to(device))

    @cached_property
    def slices(self) -> list[tuple[slice, slice]]:
        """Each segment's rows of queries and keys; waits for the device that the bounds are on."""
        queries, keys = (
            [slice(start, end) for start, end in pairwise(bounds.tolist())]
            for bounds in (self.query_bounds, self.key_bounds)
        )
        return list(zip(queries, keys, strict=True))

    @property
    def padded_width(self) -> int:
        """Rows of the longest segment of the queries, rounded up to a multiple of 32."""
        return -(-self.longest_query // 32) * 32

    @cached_property
    def padded_rows(self) -> torch.Tensor:
        """int64 [T]: the place of each query's row in a batch [segments, padded_width], flattened, as the
        memory-efficient kernel lays out its log-sum-exp."""
        bounds = self.query_bounds.long()
        starts = torch.arange(len(bounds) - 1, device=bounds.device) * self.padded_width - bounds[:-1]
        # Without the number of rows, the host would wait for the device to sum them.
        return torch.arange(self.rows, device=bounds.device) + starts.repeat_interleave(
            bounds.diff(), output_size=self.rows
        )


Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Of queries, keys and values."""


class Kernel(Protocol):
    """Attention within segments, and its gradient."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output [T, H, D], and log-sum-exp [H, T] in float32 (float64 of float64)."""
        ...

    def backward(
        self,
        gradient: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        segments: Segments,
        scale: float,
    ) -> Gradients:
        """The attention weights are taken to be exp(scores - lse)."""
        ...


def kernel_for(device: torch.device, dtype: torch.dtype) -> Kernel:
    """The kernel for tensors of this device and precision."""
    if device.type == "cpu":
        return CpuFlash()
    return Flash() if dtype in (torch.float16, torch.bfloat16) else MemoryEfficient()


class Flash:
    """torch's flash attention on CUDA, 16 bit. Query heads share key heads without copies."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        found = _aten._flash_attention_forward(
            q,
            k,
            v,
            segments.query_bounds,
            segments.key_bounds,
            segments.longest_query,
            segments.longest_key,
            0.0,
            segments.causal,
            False,
            scale=scale,
        )
        return found[0], found[1]

    def backward(
        self,
        gradient: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        segments: Segments,
        scale: float,
    ) -> Gradients:
        found: Gradients = _aten._flash_attention_backward(
            gradient,
            q,
            k,
            v,
            out,
            lse,
            segments.query_bounds,
            segments.key_bounds,
            segments.longest_query,
            segments.longest_key,
            0.0,
            segments.causal,
            # State of the dropout's generator, and an unused tensor: there is no dropout.
            torch.zeros(2, dtype=torch.uint64, device=q.device),
            torch.empty(0, device=q.device),
            scale=scale,
        )
        return found


@dataclass(frozen=True)
class MemoryEfficient:
    """torch's memory-efficient attention on CUDA, which takes float32. It knows no shared key heads, so that keys and
    values are repeated for their query heads."""

    operator: Callable[..., Sequence[torch.Tensor]] = _aten._efficient_attention_forward
    backward_operator: Callable[..., Sequence[torch.Tensor]] = _aten._efficient_attention_backward

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        heads = q.shape[1] // k.shape[1]
        found = self.operator(
            q[None],
            _repeated(k, heads)[None],
            _repeated(v, heads)[None],
            None,
            segments.query_bounds,
            segments.key_bounds,
            segments.longest_query,
            segments.longest_key,
            0.0,
            int(segments.causal),  # 1: causal from the top left
            True,
            scale=scale,
        )
        padded = found[1].transpose(0, 1).flatten(1)
        return found[0][0], padded.index_select(1, segments.padded_rows)

    def backward(
        self,
        gradient: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        segments: Segments,
        scale: float,
    ) -> Gradients:
        heads, rows, count = q.shape[1] // k.shape[1], segments.padded_width, len(segments.query_bounds) - 1
        # Infinite where there is no row, as the kernel itself pads it.
        padded = lse.new_full((lse.shape[0], count * rows), torch.inf).index_copy(1, segments.padded_rows, lse)
        none = torch.zeros(
            (), dtype=torch.int64, device=q.device
        )  # seed and offset of the dropout, of which there is none
        dq, dk, dv, _ = self.backward_operator(
            gradient[None],
            q[None],
            _repeated(k, heads)[None],
            _repeated(v, heads)[None],
            None,
            out[None],
            segments.query_bounds,
            segments.key_bounds,
            segments.longest_query,
            segments.longest_key,
            padded.unflatten(1, (count, rows)).transpose(0, 1).contiguous(),
            0.0,
            none,
            none,
            int(segments.causal),
            False,
            scale=scale,
        )
        return dq[0], _summed(dk[0], heads), _summed(dv[0], heads)


# torch's public `scaled_dot_product_attention` returns the output alone. Merging needs the log-sum-exp too, and a
# backward that takes the merged pair, so the operators beneath it are called.
_cpu_flash = _aten._scaled_dot_product_flash_attention_for_cpu
_cpu_flash_backward = _aten._scaled_dot_product_flash_attention_for_cpu_backward


class CpuFlash:
    """torch's flash attention for CPU: one call for each batch of segments, padded to the longest. Keys and values are
    repeated for their query heads."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        heads = q.shape[1] // k.shape[1]
        k, v = _repeated(k, heads), _repeated(v, heads)
        out = torch.empty_like(q)
        lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.promote_types(q.dtype, torch.float32))
        for rows, keys, lengths in _batches(segments):
            batched = _padded(q[rows], lengths), _padded(k[keys], lengths), _padded(v[keys], lengths)
            found, sums = _cpu_flash(*batched, is_causal=segments.causal, scale=scale)
            out[rows] = _flat(found, lengths)
            lse[:, rows] = _flat(sums[..., None], lengths)[..., 0].T
        return out, lse

    def backward(
        self,
        gradient: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        segments: Segments,
        scale: float,
    ) -> Gradients:
        heads = q.shape[1] // k.shape[1]
        k, v = _repeated(k, heads), _repeated(v, heads)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for rows, keys, lengths in _batches(segments):
            parts = _cpu_flash_backward(
                _padded(gradient[rows], lengths, fill=0.0).contiguous(),
                _padded(q[rows], lengths),
                _padded(k[keys], lengths),
                _padded(v[keys], lengths),
                _padded(out[rows], lengths).contiguous(),
                _padded(lse.T[rows][..., None], lengths)[..., 0].contiguous(),
                0.0,
                segments.causal,
                scale=scale,
            )
            dq[rows], dk[keys], dv[keys] = (_flat(part, lengths) for part in parts)
        return dq, _summed(dk, heads), _summed(dv, heads)


class Reference:
    """The definition, with the scores of a segment as a whole matrix."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        heads = q.shape[1] // k.shape[1]
        k, v = _repeated(k, heads), _repeated(v, heads)
        outs, sums = [], []
        for rows, keys in segments.slices:
            scores = _scores(q[rows], k[keys], segments.causal, scale)
            lse = scores.logsumexp(dim=2)
            outs.append(torch.einsum("hqk,khd->qhd", (scores - lse[..., None]).exp(), v[keys].to(scores.dtype)))
            sums.append(lse)
        return torch.cat(outs).to(q.dtype), torch.cat(sums, dim=1)

    def backward(
        self,
        gradient: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        segments: Segments,
        scale: float,
    ) -> Gradients:
        heads = q.shape[1] // k.shape[1]
        k, v = _repeated(k, heads), _repeated(v, heads)
        parts = []
        for rows, keys in segments.slices:
            weights = (_scores(q[rows], k[keys], segments.causal, scale) - lse[:, rows, None]).exp()
            g, o = gradient[rows].to(weights.dtype), out[rows].to(weights.dtype)
            inner = torch.einsum("qhd,khd->hqk", g, v[keys].to(weights.dtype)) - (g * o).sum(dim=2).T[..., None]
            inner = weights * inner * scale
            parts.append(
                (
                    torch.einsum("hqk,khd->qhd", inner, k[keys].to(weights.dtype)),
                    torch.einsum("hqk,qhd->khd", inner, q[rows].to(weights.dtype)),
                    torch.einsum("hqk,qhd->khd", weights, g),
                )
            )
        dq, dk, dv = (torch.cat(each).to(q.dtype) for each in zip(*parts, strict=True))
        return dq, _summed(dk, heads), _summed(dv, heads)


def _scores(q: torch.Tensor, k: torch.Tensor, causal: bool, scale: float) -> torch.Tensor:
    """[H, Q, K], at least in float32; those that a query does not see are -inf."""
    precision = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("qhd,khd->hqk", q.to(precision), k.to(precision)) * scale
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[1:], dtype=torch.bool).triu(1), -torch.inf)
    return scores


def _repeated(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """[U, K, D] → [U, K * heads, D]: each key head for each of its query heads."""
    return rows.repeat_interleave(heads, dim=1) if heads > 1 else rows


def _summed(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """[U, K * heads, D] → [U, K, D]: the gradient of `_repeated`."""
    return rows.unflatten(1, (-1, heads)).sum(dim=2) if heads > 1 else rows


def _batches(segments: Segments) -> Iterator[tuple[slice, slice, tuple[int, ...]]]:
    """What goes through one call: rows of queries and keys, and the lengths of the segments in them."""
    slices = segments.slices
    for batch in segments.batches or _equal_runs(slices):
        (first_query, first_key), (last_query, last_key) = slices[batch[0]], slices[batch[-1]]
        lengths = tuple(slices[i][0].stop - slices[i][0].start for i in batch)
        yield slice(first_query.start, last_query.stop), slice(first_key.start, last_key.stop), lengths


def _equal_runs(slices: Sequence[tuple[slice, slice]]) -> Iterator[range]:
    """Neighbouring segments of equally many queries and equally many keys."""
    start = 0
    for _, run in groupby((q.stop - q.start, k.stop - k.start) for q, k in slices):
        yield (batch := range(start, start + len(list(run))))
        start = batch.stop


def _padded(rows: torch.Tensor, lengths: tuple[int, ...], *, fill: float | None = None) -> torch.Tensor:
    """[rows, H, D] → [segments, H, L, D], padded to the longest segment. fill: of the padding; None for each segment's
    last row."""
    if len(set(lengths)) == 1:
        equal: torch.Tensor = rows.unflatten(0, (len(lengths), -1)).transpose(1, 2)
        return equal
    chosen, places = _padding(lengths)
    if fill is None:
        batch = rows.index_select(0, chosen)
    else:
        batch = rows.new_full((len(chosen), *rows.shape[1:]), fill).index_copy(0, places, rows)
    padded: torch.Tensor = batch.unflatten(0, (len(lengths), -1)).transpose(1, 2)
    return padded


def _flat(batch: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    """[segments, H, L, D] → [rows, H, D]; the inverse of `_padded`."""
    flat = batch.transpose(1, 2).flatten(0, 1)
    return flat if len(set(lengths)) == 1 else flat.index_select(0, _padding(lengths)[1])


@lru_cache(maxsize=64)
def _padding(lengths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """For each place of the padded batch, flattened, the row that lies there; and for each row its place."""
    longest, starts = max(lengths), [0, *accumulate(lengths)]
    steps = torch.arange(longest)
    chosen = [start + steps.clamp(max=length - 1) for start, length in zip(starts, lengths, strict=False)]
    places = [i * longest + torch.arange(length) for i, length in enumerate(lengths)]
    return torch.cat(chosen), torch.cat(places)
