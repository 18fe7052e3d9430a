"""One rank by itself: how its model is loaded, in which precision gradients are summed, and its optimizer."""

import inspect

import deepspeed
import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from pydantic import ValidationError
from transformers.integrations import is_deepspeed_zero3_enabled

from learner.collectives import Ranks, backend
from learner.config import LearnerConfig, LearnerTask, ZeroConfig
from learner.optimizer import adamw
from learner.optimizer_state import pieces
from learner.reference import Parked, parked
from learner.zero import ZeroRank, deepspeed_config, partitioned_at_birth
from reasoner.model import load_reasoner
from tests.conftest import TINY_REASONER
from umrg.prompts import PromptSpec


class Dot(torch.nn.Module):
    """Whose gradient is its input."""

    def __init__(self, dtype):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(8, dtype=dtype))

    def forward(self, gradient):
        return (self.weight * gradient).sum()


@pytest.mark.parametrize("offload", ["none", "optimizer"])
@pytest.mark.parametrize("stage", [2, 3])
def test_gradients_of_many_micro_batches_are_summed_in_float32(one_rank, stage, offload):
    """A bfloat16 of 1 stays 1 however often 1/512 is added to it."""
    config = ZeroConfig(lr=0.1, zero_stage=stage, dtype="bfloat16", offload=offload)
    model = Dot(torch.bfloat16)
    optimizer = adamw(model.parameters(), config, fused=False)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(config))
    micro_batches = [1.0] + [1 / 512] * 64
    for i, value in enumerate(micro_batches):
        engine.set_gradient_accumulation_boundary(i == len(micro_batches) - 1)
        engine.backward(engine(torch.full((8,), value, dtype=torch.bfloat16)), scale_wrt_gas=False)
    gradient = safe_get_full_grad(model.weight)
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient, torch.full((8,), 1 + 64 / 512))


def test_sums_are_reduced_in_float32_too():
    settings = deepspeed_config(ZeroConfig(lr=1, dtype="bfloat16"))
    assert settings["data_types"] == {"grad_accum_dtype": "fp32"} and settings["communication_data_type"] == "fp32"
    assert "data_types" not in deepspeed_config(ZeroConfig(lr=1))


@pytest.mark.parametrize("stage", [0, 1])
def test_bfloat16_without_float32_sums_is_refused(stage):
    with pytest.raises(ValidationError, match="dtype=bfloat16 needs zero_stage 2 or 3, this is"):
        ZeroConfig(lr=1, dtype="bfloat16", zero_stage=stage)


def test_two_ranks_on_one_gpu_are_refused():
    with pytest.raises(ValidationError, match=r"2 ranks of 0.5 GPUs may share one, which NCCL refuses"):
        ZeroConfig(lr=1, ranks=2, num_gpus=0.5)
    assert ZeroConfig(lr=1, ranks=2, num_gpus=0.9).ranks == 2 and ZeroConfig(lr=1, num_gpus=0.4).ranks == 1


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        ({}, False),
        ({"num_gpus": 1}, True),
        ({"num_gpus": 1, "gradient_checkpointing": False}, False),
        ({"gradient_checkpointing": True}, True),
    ],
)
def test_a_rank_with_a_gpu_checkpoints_its_layers(config, kept):
    assert ZeroConfig(lr=1, **config).checkpoints_layers is kept


def test_a_model_of_stage_3_is_partitioned_as_it_is_loaded(one_rank):
    """So that one larger than a GPU starts. Afterwards transformers loads as before."""
    config = ZeroConfig(lr=1, zero_stage=3)
    with partitioned_at_birth(config):
        born = load_reasoner(TINY_REASONER)
    assert not is_deepspeed_zero3_enabled()
    whole = dict(load_reasoner(TINY_REASONER).model.named_parameters())
    for name, parameter in born.model.named_parameters():
        assert parameter.numel() == 0 and parameter.ds_shape == whole[name].shape, name
        with deepspeed.zero.GatheredParameters([parameter]):
            assert torch.equal(parameter, whole[name]), name
    buffers = dict(load_reasoner(TINY_REASONER).model.named_buffers())
    assert all(torch.equal(each, buffers[name]) for name, each in born.model.named_buffers())


def test_a_parked_model_is_put_back_after_its_passes(one_rank):
    """In the memory where it waits, with nothing of it learning; on a CPU it is not moved at all."""
    task = LearnerTask(model=TINY_REASONER, spec=PromptSpec.of_model(TINY_REASONER), updates=1)
    zero = ZeroRank(LearnerConfig(lr=1e-4), task)
    laid: list[torch.Tensor] = []

    def hold(tensor):
        """Page-locked memory takes tensors of the host alone."""
        assert tensor.device.type == "cpu"
        laid.append(tensor.clone())
        return laid[-1]

    reference = Parked(zero, hold)
    assert [each.data_ptr() for each in reference._policy.parameters()] == [each.data_ptr() for each in laid]
    waiting = [each.data_ptr() for each in reference._policy.parameters()]
    with reference.present():
        pass
    assert [each.data_ptr() for each in reference._policy.parameters()] == waiting
    assert not any(each.requires_grad for each in reference._policy.parameters())
    tensor = torch.ones(3)
    assert parked(tensor, torch.device("cpu")) is tensor


@pytest.mark.parametrize("stage", [2, 3])
def test_a_fused_optimizer_steps_and_its_state_is_found_before_the_first_step(one_rank, stage):
    """As on a GPU; torch has the kernel for CPUs too."""
    config = ZeroConfig(lr=0.1, zero_stage=stage)
    model = Dot(torch.float32)
    optimizer = adamw(model.parameters(), config, fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(config))
    (before,) = pieces(engine.optimizer, list(model.named_parameters()), Ranks("cpu"))
    assert before.step == 0 and before.step.device == before.values["exp_avg"].device
    engine.backward(engine(torch.ones(8)), scale_wrt_gas=False)
    engine.step()
    (after,) = pieces(engine.optimizer, list(model.named_parameters()), Ranks("cpu"))
    assert after.step == 1 and after.values["exp_avg"].all()
    torch.testing.assert_close(after.values["fp32"], torch.full((8,), 0.9))


def test_a_model_is_wrapped_where_it_is_asked_to_be(one_rank):
    """What waits in host memory must not pass through the rank's device: here one of tensors without values."""
    task = LearnerTask(model=TINY_REASONER, spec=PromptSpec.of_model(TINY_REASONER), updates=1)
    zero = ZeroRank(LearnerConfig(lr=1e-4), task)
    zero.device = "meta"
    policy = zero.around(zero.loaded("cpu"), "cpu")
    assert {each.device.type for each in policy.parameters()} == {"cpu"}


def test_what_a_gpu_alone_calls_is_as_it_was_read():
    """torch 2.13: AdamW takes `fused`, whose step count lies where the parameters are."""
    assert inspect.signature(torch.optim.AdamW.__init__).parameters["fused"].default is None
    assert "device=p.device" in inspect.getsource(torch.optim.Adam._init_group)
    optimizer = adamw([torch.nn.Parameter(torch.ones(2, 2))], ZeroConfig(lr=1), fused=True)
    assert optimizer.defaults["fused"] is True
    assert adamw([torch.nn.Parameter(torch.ones(2, 2))], ZeroConfig(lr=1), fused=False).defaults["fused"] is None


def test_a_gpu_rank_has_a_backend_for_either_device():
    assert backend("cuda") == "cpu:gloo,cuda:nccl" and backend("cpu") == "gloo"
    parsed = torch.distributed.distributed_c10d.BackendConfig(torch.distributed.Backend(backend("cuda")))
    assert parsed.get_device_backend_map() == {"cpu": "gloo", "cuda": "nccl"}


def test_the_ranks_settle_on_their_device(one_rank):
    ranks = Ranks("cpu")
    assert (ranks.rank, ranks.count) == (0, 1)
    assert ranks.summed(3, 4) == [3, 4] and ranks.highest(5) == 5
    total = ranks.total(torch.tensor([0.5, 2.0]))
    assert total.device == ranks.device and total.tolist() == [0.5, 2.0]
    assert ranks.with_idle([], lambda: "idle") == ["idle"]
