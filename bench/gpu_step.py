"""A training step of the published sizes on one GPU, in the shape of EasyR1's table: `python -m bench.gpu_step`.

Random weights of a 7B's shape (`--layers` of its language model, as many as fit beside fp32 gradients and optimizer
state), bfloat16, ZeRO-2, gradient checkpointing, all of it learning; groups of 16 answers of 200 tokens to prompts of
about 1,600 with an 840x840 image; KL term with a parked reference model, two mini-batches. With vLLM installed the
engine samples the answers first and takes the new weights last; without it the answers are random, and both phases are
"not run".

seconds: by phase: sample, learn (encoding, reference pass, old log-probs, forward and backward passes, two updates),
    sync (weights to the engine).
tokens_per_s: prompt and answer tokens of a step, a prompt counted with each of its answers as EasyR1 counts them,
    divided by the step's seconds. EasyR1 publishes 2,000 per GPU for a 7B VLM on 8 H100 (assets/baselines.md).
mfu: 6 FLOPs per parameter and such a token in the learning phase, divided by the card's peak. EasyR1: 23.2 %. A prompt
    that goes through the model once for 16 answers is counted 16 times here, as the same work is for EasyR1.
mfu_passed: the same of the tokens that really pass through the model.
ratio_padded: seconds of forward and backward on padded batches, divided by ours, for one group.
peak_gib: of the learning phase.

On a CPU it is a rehearsal with the tiny model in float32.
"""

import argparse
import asyncio
import importlib.util
import json
import os
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from actors.weight_files import Bucket, pack
from bench import gpu_learner
from bench.machine import processor
from bench.published_shapes import PUBLISHED, REHEARSAL, Work, scored_groups, write_reasoner
from learner.attention import use_shared_prefix
from learner.collectives import join
from learner.config import LearnerConfig, LearnerTask
from learner.grpo import GrpoRank
from learner.zero import ZeroRank
from reasoner.prompter import load_prompter
from rewards.scored import ScoredGroup
from umrg.group import GroupSamples, SamplingParams
from umrg.prompts import PromptSpec

if TYPE_CHECKING:
    from actors.engine import Engine

PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}
"""Dense bfloat16 of the SXM cards, from NVIDIA's data sheets, by a part of the card's name."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is measured, and on what."""

    shape: str
    layers: int | None
    work: Work
    device: str

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.device == "cuda" else "float32"


def published(setting: Setting) -> LearnerConfig:
    """The published set-up of a rank."""
    return LearnerConfig.model_validate(
        {
            "lr": 1e-6,
            "dtype": setting.dtype,
            "num_gpus": float(setting.device == "cuda"),
            "zero_stage": 2,
            "gradient_checkpointing": True,
            "micro_batch_tokens": 16384,
            "mini_batch": max(1, setting.work.groups // 2),
            "objective": {"kl": 0.01, "clip": 0.2, "correction": "token"},
        }
    )


def learner(folder: Path, setting: Setting, config: LearnerConfig) -> tuple[ZeroRank, GrpoRank]:
    """One rank."""
    task = LearnerTask(model=folder, spec=PromptSpec.of_model(folder), updates=100, max_tokens=setting.work.length)
    zero = ZeroRank(config, task, device=setting.device)
    return zero, GrpoRank(zero, config)


async def engine(folder: Path, setting: Setting, tokens: int) -> "Engine":
    """An engine beside the learner. tokens: of the longest prompt."""
    from actors.config import RolloutConfig
    from actors.engine import Engine

    config = RolloutConfig.model_validate(
        {
            "dtype": setting.dtype,
            "num_gpus": float(setting.device == "cuda"),
            "max_prompt_tokens": tokens,
            "max_tokens": setting.work.length,
            "gpu_memory": 0.25,
            "max_num_seqs": setting.work.groups * setting.work.n,
        }
    )
    os.environ.update(config.process_environment)
    return await Engine.start(folder, load_prompter(folder), config)


async def exported(zero: ZeroRank) -> AsyncIterator[Bucket]:
    """The rank's weights, as a run sends them, but for the object store between."""
    for tensors in zero.named_weights():
        yield pack(tensors)


async def sampled(running: "Engine", groups: Sequence[ScoredGroup], work: Work) -> list[GroupSamples]:
    """The engine's completions of the groups' prompts."""

    def one(i: int, group: ScoredGroup) -> Any:
        sample = group.group.sample
        sampling = SamplingParams(n=work.n, temperature=1.0, max_tokens=work.length, seed=1000 * i)
        return running.generate(sample.image(), sample.query, sampling)

    return list(await asyncio.gather(*(one(i, group) for i, group in enumerate(groups))))


def timed(call: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Seconds of a call, the GPU's work included, and its result."""
    start = time.perf_counter()
    result = call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def ratio_padded(folder: Path, group: ScoredGroup, device: str, dtype: str) -> float:
    """Seconds of forward and backward of one group on padded batches, divided by those of ours."""
    reasoner = gpu_learner.learning(folder, device, getattr(torch, dtype))
    model, tree = reasoner.model, gpu_learner.prefix_tree(reasoner, group)
    plain, _ = gpu_learner.measured(model, lambda: gpu_learner.padded(model, tree, device, 4), device, 2)
    use_shared_prefix(model)
    ours, _ = gpu_learner.measured(model, lambda: gpu_learner.shared(model, tree, device), device, 2)
    return plain / ours


def peak_flops(device: str) -> tuple[str, float]:
    """The card's name and its peak of dense bfloat16 products; that of a CPU is measured, in float32."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
        return name, 1e12 * next((peak for part, peak in PEAK_TFLOPS.items() if part in name), float("nan"))
    square = torch.randn(1024, 1024)
    seconds = min(timed(lambda: torch.mm(square, square), device)[0] for _ in range(5))
    return processor(), 2 * 1024**3 / seconds


async def step(folder: Path, setting: Setting) -> dict[str, Any]:
    """Seconds of each phase of one step, after one step that warms up; tokens, peak memory, parameters."""
    work, device = setting.work, setting.device
    groups = scored_groups(load_prompter(folder), work)
    prompts = [len(group.samples.prompt_ids) for group in groups]
    running = None
    if importlib.util.find_spec("vllm"):
        running = await engine(folder, setting, max(prompts))
    config = published(setting)
    zero, grpo = learner(folder, setting, config)
    seconds: dict[str, float | str] = {"sample": "not run: no vllm", "sync": "not run: no vllm"}
    peak = 0
    for version in (1, 2):
        if running is not None:
            start = time.perf_counter()
            samples = await sampled(running, groups, work)
            seconds["sample"] = time.perf_counter() - start
            groups = [replace(group, samples=found) for group, found in zip(groups, samples, strict=True)]
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        work_of = [config.work(each) for each in groups]
        seconds["learn"], report = timed(partial(grpo.update, work_of, groups.__getitem__), device)
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
        if running is not None:
            start = time.perf_counter()
            await running.update_weights(exported(zero), version)
            seconds["sync"] = time.perf_counter() - start
    if running is not None:
        running.stop()
    answers = sum(len(each.token_ids) for group in groups for each in group.samples.completions)
    return {
        "seconds": seconds,
        "tokens": answers + work.n * sum(prompts),
        "tokens_passed": answers + sum(prompts),
        "parameters": sum(parameter.numel() for parameter in zero.reasoner.model.parameters()),
        "peak_gib": peak / 2**30,
        "engine_gap": report.engine_gap,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--groups", type=int, default=PUBLISHED.groups)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    setting = Setting(
        shape="Qwen2.5-VL-7B", layers=args.layers, work=replace(PUBLISHED, groups=args.groups), device=device
    )
    if device == "cpu":
        setting = Setting(shape="tiny", layers=None, work=REHEARSAL, device=device)
    with tempfile.TemporaryDirectory() as name:
        folder = write_reasoner(Path(name), setting.shape, layers=setting.layers, device=device)
        join(0, 1, host="127.0.0.1", port=gpu_learner.free_port(), device=device, seconds=600)
        # First, while no learner and no engine share the GPU's memory.
        group = scored_groups(load_prompter(folder), setting.work)[0]
        ratio = ratio_padded(folder, group, device, setting.dtype)
        if device == "cuda":
            torch.cuda.empty_cache()
        found = asyncio.run(step(folder, setting))
    card, peak = peak_flops(device)
    whole = sum(value for value in found["seconds"].values() if isinstance(value, float))
    flops = 6 * found["parameters"] / found["seconds"]["learn"] / peak
    figures = {
        "card": card,
        "shape": f"{setting.shape}, {setting.layers or 'all'} layers, {found['parameters'] / 1e9:.2f}e9 parameters",
        "work": f"{setting.work.groups} groups of {setting.work.n}",
        "seconds": found["seconds"],
        "tokens_per_s": found["tokens"] / whole,
        "mfu": flops * found["tokens"],
        "mfu_passed": flops * found["tokens_passed"],
        "ratio_padded": ratio,
        "peak_gib": found["peak_gib"],
        "engine_gap": found["engine_gap"],
    }
    for key, value in figures.items():
        print(f"{key:14}{value}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
