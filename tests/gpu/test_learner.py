"""The learner on a GPU: torch, transformers and DeepSpeed alone."""

import gc

import pytest
import torch

from bench.gpu_learner import padded
from bench.published_shapes import scored_groups
from learner.attention import use_shared_prefix
from learner.config import LearnerConfig, LearnerTask
from learner.grpo import GrpoRank
from learner.shared_prefix import Branches, branch_scores, pack
from learner.zero import ZeroRank
from reasoner.model import load_reasoner
from umrg.prompts import PromptSpec

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


@pytest.fixture(autouse=True)
def memory():
    """Each test begins with an empty GPU."""
    yield
    gc.collect()
    torch.cuda.empty_cache()


def rank(folder, scale, **changes):
    """A GRPO rank, alone in its group, with the published settings."""
    config = LearnerConfig.model_validate(
        {
            "lr": 1e-6,
            "dtype": scale.dtype,
            "num_gpus": float(scale.device == "cuda"),
            "micro_batch_tokens": 16384,
            "objective": {"kl": 0.01, "correction": "token"},
            **changes,
        }
    )
    task = LearnerTask(model=folder, spec=PromptSpec.of_model(folder), updates=10, max_tokens=scale.work.length)
    zero = ZeroRank(config, task, device=scale.device)
    return zero, GrpoRank(zero, config)


def tree_of(reasoner, group):
    """A scored group's prompt and completions."""
    sample = group.group.sample
    return Branches(
        prefix=reasoner.encode(sample.query, reasoner.encode_image(sample.image())),
        branches=[torch.tensor(each.token_ids) for each in group.samples.completions],
    )


@pytest.mark.parametrize("stage", [2, 3])
def test_a_step_in_bfloat16_at_the_published_lengths(process_group, folder, scale, stage):
    """Two updates, so that a stale optimizer state or a parameter that does not move would show."""
    zero, grpo = rank(folder, scale, zero_stage=stage)
    groups = scored_groups(zero.reasoner, scale.work)
    first, second = (update(grpo, groups) for _ in range(2))
    assert first.tokens == scale.work.groups * scale.work.n * scale.work.length
    assert first.grad_norm > 0 and abs(first.kl) < 1e-3 < 1.0
    assert second.grad_norm > 0 and second.loss == second.loss


def update(grpo, groups):
    return grpo.update(len(groups), groups.__getitem__)
