"""Variable-length attention: each kernel against the definition, and what was read of those that only a GPU runs."""

from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.utils.generic import is_flash_attention_requested

from learner.attention import VISION, Layout, Span, shared_prefix_attention, use_shared_prefix
from learner.kernels import CpuFlash, Flash, Kernel, MemoryEfficient, Reference, Segments, _equal_runs, kernel_for
from reasoner.model import load_reasoner

pytestmark = pytest.mark.numeric

TINY = Path(__file__).parents[2] / "models" / "tiny-reasoner"
SCALE = 0.25


def rows(lengths, heads, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(lengths), heads, 16, generator=generator).to(dtype).requires_grad_()


lengths = st.lists(st.integers(1, 9), min_size=1, max_size=5)


@settings(max_examples=25)
@given(
    drawn=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5),
    heads=st.sampled_from([1, 3]),
)
def test_every_kernel_follows_the_definition(drawn, heads):
    """Of query heads that share key heads too, within segments of any lengths, causal or not."""
    queries, keys = zip(*drawn, strict=True)
    for causal in (False, True):
        keys = queries if causal else keys
        batches = (range(len(queries)),) if causal else ()
        segments = Segments.of(queries, keys, causal=causal, batches=batches)
        q, k, v = rows(queries, 2 * heads), rows(keys, 2, seed=1), rows(keys, 2, seed=2)
        gradient = rows(queries, 2 * heads, seed=3).detach()
        expected = dense(q, k, v, visible_within(queries, keys, causal))
        expected.backward(gradient)
        for kernel in (Reference(), CpuFlash()):
            out, lse = kernel.forward(q.detach(), k.detach(), v.detach(), segments, SCALE)
            torch.testing.assert_close(out, expected.detach())
            assert lse.shape == (2 * heads, len(q))
            found = kernel.backward(gradient, q.detach(), k.detach(), v.detach(), out, lse, segments, SCALE)
            for each, leaf in zip(found, (q, k, v), strict=True):
                torch.testing.assert_close(each, leaf.grad)


def dense(q, k, v, visible):
    """Attention by a mask. visible: bool [T, U]."""
    k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for each in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * SCALE
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~visible, -torch.inf).softmax(dim=2), v)


def visible_within(queries, keys, causal):
    blocks = [torch.ones(q, k, dtype=torch.bool) for q, k in zip(queries, keys, strict=True)]
    return torch.block_diag(*(block.tril() if causal else block for block in blocks)).bool()


@settings(max_examples=25)
@given(trees=st.lists(st.tuples(st.integers(1, 7), st.lists(st.integers(1, 6), max_size=4)), min_size=1, max_size=3))
def test_two_attentions_merged_are_one_over_what_a_tree_shows(trees):
    """With query heads that share key heads; a prefix may have no branches. The same indices serve every kernel."""
    spans: list[Span] = []
    visible = []
    for prefix, branches in trees:
        start = spans[-1].end if spans else 0
        spans.append(Span(start=start, prefix=prefix, branches=tuple(branches)))
        visible.append(visible_in_a_tree(prefix, branches))
    mask = torch.block_diag(*visible).bool()
    q, k, v = rows([len(mask)], 6), rows([len(mask)], 2, seed=1), rows([len(mask)], 2, seed=2)
    gradient = rows([len(mask)], 6, seed=3).detach()
    expected = dense(q, k, v, mask)
    wanted = torch.autograd.grad(expected, (q, k, v), gradient)
    for kernel in (Reference(), CpuFlash()):
        found = shared_prefix_attention(q, k, v, Layout.of(spans), kernel, SCALE)
        torch.testing.assert_close(found, expected)
        for each, want in zip(torch.autograd.grad(found, (q, k, v), gradient), wanted, strict=True):
            torch.testing.assert_close(each, want)


def visible_in_a_tree(prefix, branches):
    """The definition, token by token: the whole prefix up to itself, and its own branch up to itself."""
    branch = [0] * prefix + [i + 1 for i, length in enumerate(branches) for _ in range(length)]
    return torch.tensor(
        [[k <= q and branch[k] in (0, branch[q]) for k in range(len(branch))] for q in range(len(branch))]
    )


def a_model(kind):
    """A small model of each family with random weights, its tower's windows smaller than an image where it has any."""
    if kind == "qwen2_5_vl":
        config = AutoConfig.from_pretrained(TINY)
        config.vision_config.fullatt_block_indexes = [1]
        config.vision_config.window_size = 56
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
        text = {**sizes, "num_hidden_layers": 1, "vocab_size": 64, "head_dim": 16, "rope_parameters": rope}
        vision: dict[str, object] = {"depth": 2, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2}
        if kind == "qwen2_vl":
            vision |= {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
        else:
            vision |= {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32}
            vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
        config = AutoConfig.for_model(kind, text_config=text, vision_config=vision)
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config, dtype=torch.float32)


@pytest.mark.parametrize("by_definition", [True, False])
@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_tower_in_one_call_a_layer_is_transformers_own(kind, by_definition):
    """Images of different sizes side by side, whose windows at the edges are smaller than the others; by the definition
    and by the kernel that is chosen here."""
    model = a_model(kind)
    tower = model.model.visual
    grid = torch.tensor([[1, 10, 14], [1, 4, 6]])
    generator = torch.Generator().manual_seed(1)
    vision = model.config.vision_config
    features = 3 * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(int(grid.prod(dim=1).sum()), features, generator=generator)

    def output_and_gradients():
        tower.zero_grad()
        out = tower(pixels, grid_thw=grid).pooler_output
        out.square().sum().backward()
        return out.detach(), {name: p.grad.clone() for name, p in tower.named_parameters() if p.grad is not None}

    expected, gradients = output_and_gradients()
    counted = Counting()
    use_shared_prefix(model, kernel=counted if by_definition else None)
    found, others = output_and_gradients()
    assert counted.calls == (len(tower.blocks) if by_definition else 0)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert others.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (others[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, name


class Counting(Reference):
    """The definition, which counts its calls."""

    calls = 0

    def forward(self, *arguments):
        self.calls += 1
        return super().forward(*arguments)


def test_a_model_may_move_to_a_gpu_after_it_was_prepared():
    """As the parked reference model does: its tower's attention is settled by no device but that of its tensors."""
    loaded = load_reasoner(TINY)
    use_shared_prefix(loaded.model)
    assert loaded.model.model.visual.config._attn_implementation == VISION
    assert is_flash_attention_requested(loaded.model.model.visual.config)  # how transformers hands over all windows


def test_equal_windows_are_one_batch_on_the_cpu():
    windows = Segments.of([4, 4, 4, 2, 4], [4, 4, 4, 2, 4], causal=False)
    assert list(_equal_runs(windows.slices)) == [range(3), range(3, 4), range(4, 5)]
    across = Segments.of([5, 5, 5], [7, 7, 8], causal=False)
    assert list(_equal_runs(across.slices)) == [range(2), range(2, 3)]


def test_parts_in_bfloat16_are_merged_in_float32():
    """What is left is the rounding of both parts and of the result, 1.4 times that of the result alone; merged in
    bfloat16 it was 1.9 times."""
    layout = Layout.of([Span(start=0, prefix=300, branches=(60,) * 8)])
    q, k, v = (rows([780], 4, torch.bfloat16, seed).detach() for seed in range(3))
    exact = shared_prefix_attention(q.double(), k.double(), v.double(), layout, Reference(), SCALE)
    found = shared_prefix_attention(q, k, v, layout, Reference(), SCALE)
    error, rounding = ((each.double() - exact)[layout.branch_rows].norm() for each in (found, exact.bfloat16()))
    assert error < 1.65 * rounding


@pytest.mark.parametrize(
    ("device", "dtype", "kind"),
    [
        ("cuda", torch.bfloat16, Flash),
        ("cuda", torch.float16, Flash),
        ("cuda", torch.float32, MemoryEfficient),
        ("cpu", torch.float32, CpuFlash),
        ("cpu", torch.bfloat16, CpuFlash),
    ],
)
def test_a_device_and_a_precision_have_a_kernel(device, dtype, kind):
    assert type(kernel_for(torch.device(device), dtype)) is kind


@pytest.mark.parametrize(("kernel", "dtype"), [(Flash(), torch.bfloat16), (MemoryEfficient(), torch.float32)])
@pytest.mark.parametrize("causal", [True, False])
def test_the_calls_of_a_gpu_fit_torch_s_operators(kernel: Kernel, dtype, causal):
    """On tensors without values: the installed torch checks arguments and computes shapes as on a GPU."""
    segments = Segments.of([40, 3], [40, 3] if causal else [7, 9], causal=causal).to("meta")
    q = torch.empty(43, 8, 80, device="meta", dtype=dtype)
    k, v = torch.empty(2, 43 if causal else 16, 2, 80, device="meta", dtype=dtype)
    out, lse = kernel.forward(q, k, v, segments, SCALE)
    assert out.shape == q.shape and out.dtype == dtype
    assert lse.shape == (8, 43) and lse.dtype == torch.float32
    # torch 2.13 computes no shapes for the memory-efficient backward: its function for that lacks the argument `out`.
    if isinstance(kernel, Flash):
        found = kernel.backward(torch.empty_like(out), q, k, v, out, lse, segments, SCALE)
        assert [each.shape for each in found] == [q.shape, k.shape, v.shape]


@settings(max_examples=25)
@given(drawn=st.lists(st.tuples(st.integers(1, 70), st.integers(1, 9)), min_size=1, max_size=4), causal=st.booleans())
def test_the_memory_efficient_layout_is_kept(drawn, causal):
    """Around operators that behave as the CUDA ones were read to: heads repeated, the log-sum-exp in padded rows whose
    rest is undefined after the forward and must be infinite in the backward."""
    queries, keys = zip(*drawn, strict=True)
    segments = Segments.of(queries, queries if causal else keys, causal=causal)
    q, gradient = (rows(queries, 6, seed=seed).detach() for seed in (0, 3))
    k, v = (rows(queries if causal else keys, 2, seed=seed).detach() for seed in (1, 2))
    emulated = MemoryEfficient(partial(padded_forward, segments), partial(padded_backward, segments))
    results = []
    for kernel in (emulated, Reference()):
        out, lse = kernel.forward(q, k, v, segments, SCALE)
        results.append((out, lse, *kernel.backward(gradient, q, k, v, out, lse, segments, SCALE)))
    torch.testing.assert_close(*results)


def padded_forward(segments, q, k, v, bias, bounds, key_bounds, longest, longest_key, dropout, mask, lse, *, scale):
    """`_efficient_attention_forward` as it was read: [1, T, H, D] of equally many heads."""
    assert q.shape[0] == 1 and q.shape[2:] == k.shape[2:] == v.shape[2:]
    assert bounds.dtype == key_bounds.dtype == torch.int32 and longest <= q.shape[1] and longest_key <= k.shape[1]
    assert (bias, dropout, mask, lse) == (None, 0.0, int(segments.causal), True)
    out, sums = Reference().forward(q[0], k[0], v[0], segments, scale)
    padded = torch.full((len(bounds) - 1, q.shape[2], -(-longest // 32) * 32), torch.nan, dtype=sums.dtype)
    for i, (part, _) in enumerate(segments.slices):
        padded[i, :, : part.stop - part.start] = sums[:, part]
    return out[None], padded


def padded_backward(
    segments, gradient, q, k, v, bias, out, bounds, key_bounds, longest, longest_key, lse, *rest, scale
):
    dropout, _seed, _offset, mask, bias_learns = rest
    assert (bias, dropout, mask, bias_learns) == (None, 0.0, int(segments.causal), False)
    assert lse.is_contiguous() and lse.stride(0) % 8 == lse.stride(1) % 8 == 0
    lengths = [part.stop - part.start for part, _ in segments.slices]
    assert all(lse[i, :, length:].isposinf().all() for i, length in enumerate(lengths))
    sums = torch.cat([lse[i, :, :length] for i, length in enumerate(lengths)], dim=1)
    found = Reference().backward(gradient[0], q[0], k[0], v[0], out[0], sums, segments, scale)
    return *(each[None] for each in found), torch.empty(0)


def test_rows_of_a_padded_log_sum_exp_are_found_from_the_bounds():
    segments = Segments.of([40, 3, 33], [1, 1, 1], causal=False)
    assert segments.padded_width == 64
    assert segments.padded_rows.tolist() == [*range(40), 64, 65, 66, *range(128, 128 + 33)]


SCHEMAS = {
    "_flash_attention_forward": "Tensor query, Tensor key, Tensor value, Tensor? cum_seq_q, Tensor? cum_seq_k, "
    "SymInt max_q, SymInt max_k, float dropout_p, bool is_causal, bool return_debug_mask, *, float? scale=None",
    "_flash_attention_backward": "Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, "
    "Tensor logsumexp, Tensor cum_seq_q, Tensor cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p, "
    "bool is_causal, Tensor rng_state, Tensor unused, *, float? scale=None",
    "_efficient_attention_forward": "Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? cu_seqlens_q, "
    "Tensor? cu_seqlens_k, SymInt? max_seqlen_q, SymInt? max_seqlen_k, float dropout_p, int custom_mask_type, "
    "bool compute_log_sumexp=False, *, float? scale=None",
    "_efficient_attention_backward": "Tensor grad_out_, Tensor query, Tensor key, Tensor value, Tensor? bias, "
    "Tensor out, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, "
    "Tensor logsumexp, float dropout_p, Tensor philox_seed, Tensor philox_offset, int custom_mask_type, "
    "bool bias_requires_grad, *, float? scale=None",
}
"""Arguments that are passed by place, and `scale`. The meaning of the places was read in torch 2.13:
`torch.nn.attention.varlen` calls the flash operators so, with a log-sum-exp of [H, T] for variable lengths, and passes
a zeroed uint64 [2] and an empty tensor for the dropout's state; the memory-efficient one pads its log-sum-exp to
multiples of 32 rows, and mask type 1 is causal from the top left."""


@pytest.mark.parametrize("name", SCHEMAS)
def test_operators_of_a_gpu_are_as_they_were_read(name):
    schema = str(getattr(torch.ops.aten, name).default._schema)
    assert schema.startswith(f"aten::{name}({SCHEMAS[name]}")
