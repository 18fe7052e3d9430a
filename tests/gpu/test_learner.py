"""The learner on a GPU: torch, transformers and DeepSpeed alone."""

import math
import time

import pytest
import torch

from bench.published_shapes import scored_groups
from learner.attention import Layout, Span, shared_prefix_attention, use_shared_prefix
from learner.checkpoint import RankCheckpoints
from learner.collectives import join
from learner.config import LearnerConfig, LearnerTask
from learner.grpo import GrpoRank
from learner.kernels import Reference, Segments, kernel_for
from learner.memory import rank_need
from learner.shared_prefix import Branches, branch_scores, pack
from learner.zero import ZeroRank
from reasoner.footprint import LiveBytes
from reasoner.model import load_reasoner
from tests.gpu.conftest import SCALE, free_port, held, in_processes
from umrg.prompts import PromptSpec

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def memory():
    """Each test begins with an empty GPU, and leaves one to the next."""
    before = held()
    yield
    assert held() - before < 1 << 20, "a test's tensors outlive it"


def settings(**changes):
    """The published ones."""
    return LearnerConfig.model_validate(
        {
            "lr": 1e-6,
            "dtype": SCALE.dtype,
            "num_gpus": SCALE.gpus,
            "gradient_checkpointing": True,
            "micro_batch_tokens": 16384,
            "objective": {"kl": 0.01, "correction": "token"},
            **changes,
        }
    )


def rank(folder, config):
    """A GRPO rank, alone in its group, in a process of its own."""
    join(0, 1, host="127.0.0.1", port=free_port(), device=SCALE.device, seconds=300)
    task = LearnerTask(model=folder, spec=PromptSpec.of_model(folder), updates=10, max_tokens=SCALE.work.length)
    zero = ZeroRank(config, task, device=SCALE.device)
    return zero, GrpoRank(zero, config)


def update(grpo, config, groups):
    return grpo.update([config.work(group) for group in groups], groups.__getitem__)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_step_in_bfloat16_at_the_published_lengths(folder, stage):
    """Two mini-batches with a reference model, and a second step, in which nothing is compiled or allocated anew."""
    in_processes(two_steps, (folder, stage))


def two_steps(folder, stage):
    work = SCALE.work
    config = settings(zero_stage=stage, mini_batch=max(1, work.groups // 2))
    zero, grpo = rank(folder, config)
    groups = scored_groups(zero.reasoner, work)
    first = update(grpo, config, groups)
    start = time.perf_counter()
    second = update(grpo, config, groups)
    seconds = time.perf_counter() - start
    tokens = work.n * sum(len(group.samples.prompt_ids) + work.length for group in groups)
    print(f"stage {stage}: {seconds:.2f} s a step, {tokens / seconds:,.0f} tokens a second, prompts counted each time")
    assert first.tokens == work.groups * work.n * work.length and first.updates == 2
    assert first.grad_norm > 0 and second.grad_norm > 0
    assert abs(first.kl) < 0.1 and math.isfinite(second.loss)
    assert zero.engine.basic_optimizer.defaults["fused"] == (True if SCALE.device == "cuda" else None)


def test_the_peak_of_memory_is_the_estimated_one(folder):
    in_processes(one_step_measured, (folder,))


def one_step_measured(folder):
    config = settings(zero_stage=2)
    need = rank_need(folder, config, image_tokens=8 * 1024 if SCALE.device == "cuda" else 64)
    with LiveBytes() as live:
        zero, grpo = rank(folder, config)
        update(grpo, config, scored_groups(zero.reasoner, SCALE.work))
    peak = torch.cuda.max_memory_allocated() if SCALE.device == "cuda" else live.peak
    estimated = sum(need.parts.values())
    print(f"peak {peak / 2**30:.1f} GiB, estimated {estimated / 2**30:.1f}")
    assert peak < 1.15 * estimated
    if SCALE.device == "cuda":
        assert peak > 0.5 * estimated


def test_a_checkpoint_is_restored_bit_for_bit(folder, tmp_path):
    """With a fused optimizer, whose step count is on the GPU: after steps that move everything, what was loaded is
    saved as the same bytes."""
    in_processes(saved_and_restored, (folder, tmp_path))


def saved_and_restored(model, out):
    config = settings(objective={}, lora={"rank": 8}, lr=1e-2)
    zero, grpo = rank(model, config)
    groups = scored_groups(zero.reasoner, SCALE.work)[:2]
    checkpoints = RankCheckpoints(zero)

    def saved(name):
        checkpoints.save(out / name)
        assert checkpoints.saved(300) is not None
        folder = out / name
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}

    update(grpo, config, groups)
    before = saved("before")
    update(grpo, config, groups)
    after = saved("after")
    moved = {name for name in before if after[name] != before[name]}
    assert moved == {name for name in before if not name.startswith("rng")}
    checkpoints.load(out / "before")
    assert saved("restored") == before


def test_log_probs_are_those_of_padded_sequences(folder, scale):
    """Both in bfloat16, measured by their distance from float32: sharing the prefix rounds no worse than padding."""

    def padded(reasoner, tree):
        ids = torch.stack([torch.cat([tree.prefix.token_ids, branch]) for branch in tree.branches]).to(scale.device)
        image = tree.prefix.image
        with torch.no_grad():
            logits = reasoner.model(
                input_ids=ids,
                mm_token_type_ids=(ids == reasoner.image_token_id).int(),
                pixel_values=image.pixel_values.repeat(len(ids), 1).to(scale.device, reasoner.model.dtype),
                image_grid_thw=image.grid_thw.repeat(len(ids), 1).to(scale.device),
                logits_to_keep=scale.work.length + 1,
            ).logits[:, :-1]
        chosen = ids[:, -scale.work.length :, None]
        return logits.float().log_softmax(-1).gather(-1, chosen).flatten()

    exact = load_reasoner(folder, device=scale.device)
    group = scored_groups(exact, scale.work)[0]
    tree = Branches(
        prefix=exact.encode(group.group.sample.query, exact.encode_image(group.group.sample.image())),
        branches=[torch.tensor(each.token_ids) for each in group.samples.completions[:4]],
    )
    wanted = padded(exact, tree)
    del exact
    rounded = load_reasoner(folder, device=scale.device, dtype=torch.bfloat16)
    alone = padded(rounded, tree)
    use_shared_prefix(rounded.model)
    with torch.no_grad():
        shared = branch_scores(rounded.model, pack([tree], rounded.model).to(scale.device)).logprobs
    assert (shared - wanted).abs().mean() < 2 * (alone - wanted).abs().mean() + 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("heads", [(28, 4), (16, 16)])
def test_kernels_agree_with_the_definition(scale, dtype, heads):
    """Merged attention over prefix trees, and windows, with gradients, at the widths of the published models."""
    spans = [Span(start=0, prefix=100, branches=(7, 33, 1)), Span(start=141, prefix=64, branches=(40,))]
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(spans[-1].end, count, 128, generator=generator) for count in (heads[0], heads[1], heads[1])]
    gradient = torch.randn(spans[-1].end, heads[0], 128, generator=generator)

    def run(device, precision, kernel):
        q, k, v = (each.to(device, precision).requires_grad_() for each in rows)
        out = shared_prefix_attention(q, k, v, Layout.of(spans).to(device), kernel, 128**-0.5)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), gradient.to(device, precision))]

    wanted = run("cpu", torch.float64, Reference())
    found = run(scale.device, dtype, kernel_for(torch.device(scale.device), dtype))
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    for each, want in zip(found, wanted, strict=True):
        assert (each.cpu().double() - want).norm() <= tolerance * want.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [80, 72])
def test_windows_of_a_tower_agree_with_the_definition(scale, width, dtype):
    """1,800 windows of 64 patches and smaller ones at the edges in one call, with gradients, at the head widths of
    Qwen2.5-VL and Qwen3-VL."""
    lengths = [64, 32, 64, 16] * (450 if scale.device == "cuda" else 3)
    windows = Segments.of(lengths, lengths, causal=False)
    generator = torch.Generator().manual_seed(0)
    *rows, gradient = torch.randn(4, sum(lengths), 2, width, generator=generator)

    def run(device, precision, kernel):
        q, k, v = (each.to(device, precision).requires_grad_() for each in rows)
        out, _ = kernel.forward(q, k, v, windows.to(device), width**-0.5)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), gradient.to(device, precision))]

    here = torch.device(scale.device)
    wanted = run(torch.device("cpu"), torch.float64, Reference())
    found = run(here, dtype, kernel_for(here, dtype))
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    for each, want in zip(found, wanted, strict=True):
        assert (each.cpu().double() - want).norm() <= tolerance * want.norm()
