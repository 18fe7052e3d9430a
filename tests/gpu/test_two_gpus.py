"""Two ranks, each on a GPU of its own, over NCCL."""

import json
import math
import os

import pytest
import torch

from bench.published_shapes import scored_groups
from learner.collectives import join
from learner.config import LearnerConfig, LearnerTask
from learner.grpo import GrpoRank
from learner.zero import ZeroRank
from tests.gpu.conftest import SCALE, free_port, in_processes
from umrg.prompts import PromptSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two GPUs: there is one, and NCCL takes a rank for each"),
]


def learn(rank, folder, port, stage, out):
    """One of two ranks: a step, and its report, written to a file."""
    if SCALE.device == "cuda":
        assert torch.cuda.device_count() == 1, "it was started with the other rank's GPU too"
    join(rank, 2, host="127.0.0.1", port=port, device=SCALE.device, seconds=300)
    config = LearnerConfig.model_validate(
        {
            "lr": 1e-6,
            "ranks": 2,
            "dtype": SCALE.dtype,
            "num_gpus": SCALE.gpus,
            "zero_stage": stage,
            "gradient_checkpointing": True,
            "micro_batch_tokens": 16384,
            "objective": {"kl": 0.01},
        }
    )
    task = LearnerTask(model=folder, spec=PromptSpec.of_model(folder), updates=10, max_tokens=SCALE.work.length)
    zero = ZeroRank(config, task, device=SCALE.device)
    groups = scored_groups(zero.reasoner, SCALE.work)
    report = GrpoRank(zero, config).update([config.work(group) for group in groups], groups.__getitem__)
    (out / str(rank)).write_text(json.dumps([report.loss, report.grad_norm, report.tokens]))


@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_make_one_update(folder, scale, stage, tmp_path):
    """Both report the same loss over all groups' tokens, and the same gradient norm."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")[:2]
    own_gpus = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in visible] if SCALE.device == "cuda" else [{}, {}]
    in_processes(learn, (folder, free_port(), stage, tmp_path), own_gpus)
    first, second = (json.loads((tmp_path / str(rank)).read_text()) for rank in range(2))
    assert first == second and math.isfinite(first[0]) and first[1] > 0
    assert first[2] == scale.work.groups * scale.work.n * scale.work.length
