"""The table of gpu.md, which model trains on which GPUs, by the estimates of `medreasoner memory`:
`python -m docs.sizing`.

A step is that of the published set-up. Half of the GPUs learn and the other half sample; a single GPU does both, and
its engine has what the learner leaves. Times are floating-point operations and bytes over assumed shares of what a card
is sold for.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

from actors.config import RolloutConfig
from actors.memory import engine_need
from bench.architectures import ARCHITECTURES
from cluster.memory import GIB
from learner.config import LearnerConfig
from learner.memory import rank_need
from reasoner.footprint import Need, cache_bytes, empty_model, parameters

GROUPS, ANSWERS, PROMPT, IMAGE, ANSWER, UPDATES = 128, 16, 1600, 900, 200, 2
"""A step of the published set-up: prompts; answers of each; tokens of a prompt, its image and an answer; updates."""
LEARNING, PREFILL, BANDWIDTH, TRANSFER = 0.35, 0.4, 0.5, 3e9
"""Assumed: shares of a card's bfloat16 rate in learning and in prefill, share of its memory bandwidth in decoding, and
bytes a second at which weights reach the engines through host memory."""
OFFLOADED = 5e8
"""Assumed: parameters a second that a rank steps in host memory."""
BUDGETS = (16384, 8192)
"""Values of micro_batch_tokens that are tried in each way."""
ROOM = 64
"""Sequences that an engine must have room for, to be called one."""

Way = tuple[Literal[2, 3], Literal["none", "optimizer"]]
WAYS: tuple[Way, ...] = ((2, "none"), (3, "none"), (2, "optimizer"), (3, "optimizer"))
"""ZeRO stages and offloads, in the order in which they are tried: the faster ones first."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """A GPU as its maker describes it."""

    name: str
    memory: float
    """GiB that CUDA reports."""
    flops: float
    """A second, of dense bfloat16 matrix products."""
    bandwidth: float
    """Bytes a second."""


CARDS = (
    Card(name="A10 24 GB", memory=22.5, flops=125e12, bandwidth=600e9),
    Card(name="A100 40 GB", memory=39.4, flops=312e12, bandwidth=1555e9),
    Card(name="H100 80 GB", memory=79.1, flops=989e12, bandwidth=3350e9),
)
COUNTS = (1, 4, 8)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A division of GPUs that fits."""

    config: LearnerConfig
    need: Need
    """Of a rank."""
    seconds: float
    """Of a step."""


def plan(model: str, card: Card, count: int, *, lora: bool) -> Plan | None:
    """The first division that fits; None if none does. model: a key of `ARCHITECTURES`."""
    gpu, ranks = int(card.memory * GIB), max(1, count // 2)
    for stage, offload in WAYS:
        for budget in BUDGETS:
            config, need = rank(model, ranks, stage, offload, budget, lora)
            left = gpu if count > 1 else gpu - need.total
            engines = _engines(model, left, gpu, count - ranks or 1)
            if need.total <= gpu and engines:
                return Plan(config=config, need=need, seconds=step_seconds(model, card, config, engines))
    return None


@cache
def rank(model: str, ranks: int, stage: int, offload: str, budget: int, lora: bool) -> tuple[LearnerConfig, Need]:
    """A rank of the published set-up, and what it needs."""
    config = LearnerConfig.model_validate(
        {
            "lr": 1e-6,
            "ranks": ranks,
            "num_gpus": 1,
            "zero_stage": stage,
            "offload": offload,
            "dtype": "bfloat16",
            "micro_batch_tokens": budget,
            "gradient_checkpointing": True,
            "objective": {"kl": 0.01},
            "lora": {"rank": 16} if lora else None,
        }
    )
    return config, rank_need(ARCHITECTURES[model](), config, image_tokens(budget))


def image_tokens(budget: int) -> int:
    """Of a packed sequence: those of as many images as groups begin in it."""
    return -(-budget // (PROMPT + ANSWERS * ANSWER)) * IMAGE


@dataclass(frozen=True, kw_only=True)
class Engines:
    """The engines beside a learner."""

    count: int
    split: int
    """GPUs of each."""
    room: int
    """Sequences that each holds at a time."""


def _engines(model: str, left: int, gpu: int, gpus: int) -> Engines | None:
    """As many engines as fit on so many GPUs. left: bytes of each that they may use."""
    share = max(0.01, min(0.9, left / gpu - 0.02))
    for split in (1, 2, 4):
        if split > gpus:
            return None
        config = RolloutConfig(
            dtype="bfloat16", num_gpus=split, tensor_parallel=split, gpu_memory=share, max_prompt_tokens=2048
        )
        need = engine_need(ARCHITECTURES[model](), config, gpu)
        assert need.reserved is not None
        per_sequence = (PROMPT / ANSWERS + ANSWER) * _sizes(model)[1] / split  # a group's prompt is cached once
        room = int((need.reserved - need.total) / per_sequence)
        if room >= ROOM:
            return Engines(count=gpus // split, split=split, room=room)
    return None


def step_seconds(model: str, card: Card, config: LearnerConfig, engines: Engines) -> float:
    """Estimated duration of a step: sampling, learning and the transfer of weights, one after another."""
    size, cached = _sizes(model)
    # Forward 2 a parameter and token, recomputed 2, backward 4, of which adapters need half; 2 of the reference, and
    # half of the groups once more, for the second mini-batch's old log-probs.
    passes = (6 if config.lora else 8) + 2 + 1
    learning = passes * size * GROUPS * (PROMPT + ANSWERS * ANSWER) / (config.ranks * card.flops * LEARNING)
    if config.offload != "none":
        learning += UPDATES * size / config.ranks / OFFLOADED
    prefill = 2 * size * GROUPS * PROMPT / (engines.count * engines.split * card.flops * PREFILL)
    each = GROUPS * ANSWERS / engines.count
    reads = -(-each // engines.room) * 2 * size + each * (PROMPT + ANSWER / 2) * cached
    decoding = ANSWER * reads / engines.split / (card.bandwidth * BANDWIDTH)
    return prefill + decoding + learning + 2 * size / TRANSFER


@cache
def _sizes(model: str) -> tuple[int, int]:
    """Parameters, and bytes of the keys and values of a token."""
    empty = empty_model(ARCHITECTURES[model](), torch.bfloat16)
    return parameters(empty), cache_bytes(empty, 2)


def row(model: str, count: int, *, lora: bool) -> str:
    """A line of the table: a cell for each card."""
    cells = [_cell(plan(model, card, count, lora=lora)) for card in CARDS]
    return f"| {model} | {'adapters' if lora else 'everything'} | {count} | {' | '.join(cells)} |"


def table() -> Iterator[str]:
    """The lines of the table."""
    yield f"| model | learns | GPUs | {' | '.join(card.name for card in CARDS)} |"
    yield "|---|---|---|" + "---|" * len(CARDS)
    for model in ARCHITECTURES:
        for lora in (True, False):
            for count in COUNTS:
                yield row(model, count, lora=lora)


def _cell(found: Plan | None) -> str:
    if found is None:
        return "–"
    config = found.config
    ways = [f"stage {config.zero_stage}"] if config.zero_stage != 2 else []
    ways += ["offload"] if config.offload != "none" else []
    ways += [f"{config.micro_batch_tokens} tokens"] if config.micro_batch_tokens != BUDGETS[0] else []
    return ", ".join([f"{found.need.total / GIB:.0f} GiB", f"{found.seconds:.0f} s", *ways])


if __name__ == "__main__":
    for line in table():
        print(line, flush=True)
