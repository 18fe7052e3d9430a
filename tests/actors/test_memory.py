"""What engines and experts need of a GPU, what ranks hold, and what an actor says of its GPUs."""

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.config import RolloutConfig, SegmenterConfig
from actors.experts.registry import find_sizes
from actors.experts.sam import build_sam
from actors.experts.sam_config import VIT_B, VIT_H, SamConfig
from actors.gpus import visible_gpus
from actors.learner_rank import LearnerRank
from actors.memory import engine_need, expert_need
from bench.architectures import qwen2_5_vl_7b
from learner.config import LearnerConfig
from learner.memory import rank_need
from reasoner.footprint import GIB, LiveBytes, parameters
from tests.ranks import TINY_REASONER, running


@pytest.mark.parametrize(("sizes", "published"), [(VIT_B, 93_735_472), (VIT_H, 641_090_608)])
def test_parameters_of_sam_are_those_of_the_published_models(sizes, published):
    with torch.device("meta"):
        assert parameters(build_sam(sizes)) == published


def test_an_expert_materialises_its_attention_scores():
    """Of 16 heads over 64 x 64 tokens in bfloat16: 0.5 GiB, of which more than one are alive."""
    need = expert_need("sam_vit_h", SegmenterConfig(dtype="bfloat16"))
    assert 1.0 < need.estimated["activations"] / GIB < 4.0
    assert need.certain["weights"] == pytest.approx(2 * 641_090_608, rel=0.02)


def test_an_embedding_needs_what_is_counted():
    """The bundled expert's encoder, on the CPU."""
    found = find_sizes("tiny")
    assert found is not None and isinstance(found.config, SamConfig)
    side = found.config.image_side
    with torch.inference_mode():
        encoder = build_sam(found.config).image_encoder
        with LiveBytes() as live:
            encoder(torch.zeros(1, 3, side, side))
    assert 0 < live.peak <= expert_need("tiny", SegmenterConfig()).estimated["activations"]


@pytest.mark.parametrize(
    ("name", "preprocess", "millions", "mib"),
    [
        ("sam_med2d", "published", 271, 1),
        ("medsam2", "published", 31.4, 16),
        ("medsam2", "native", 31.4, 4),
        ("sam2.1_l", "published", 217, 16),
    ],
)
def test_other_experts_are_estimated_alike(name, preprocess, millions, mib):
    """Of 32 prompts, each in an image of its own, at least the features are there: `mib` each."""
    need = expert_need(name, SegmenterConfig(preprocess=preprocess))
    assert need.certain["weights"] == pytest.approx(4e6 * millions, rel=0.01)
    assert 32 * mib < need.estimated["activations"] / (1 << 20) < 600 + 200 * mib


def test_of_an_expert_of_unknown_sizes_nothing_is_known():
    assert not expert_need("somebody's own", SegmenterConfig()).certain


def engine(gpu, **changes):
    limits = {"max_prompt_tokens": 2048, "max_tokens": 2048, "num_gpus": 1, "dtype": "bfloat16", "gpu_memory": 0.85}
    return engine_need(qwen2_5_vl_7b(), RolloutConfig.model_validate({**limits, **changes}), int(gpu * GIB))


def test_an_engine_has_room_for_sequences_in_what_it_reserves():
    """A token's keys and values: 2 x 28 layers x 4 heads x 128 numbers of 2 bytes, 57,344 bytes."""
    need = engine(80)
    assert need.certain["longest sequence"] == 4096 * 57_344
    assert need.reserved == int(0.85 * 80 * GIB)
    assert need.note == "room for 221 sequences of 4096 tokens"


def test_an_engine_over_several_gpus_holds_a_share_on_each():
    one, two = engine(80), engine(80, tensor_parallel=2, num_gpus=2)
    assert two.certain["weights"] == one.certain["weights"] // 2
    assert two.certain["longest sequence"] == one.certain["longest sequence"] // 2


class MeasuredRank(LearnerRank):
    """A rank that tells how many bytes it holds."""

    def held(self):
        """Of the weights, of what the optimizer keeps beside them, and of the accumulated gradients."""
        from learner.shared_prefix import Branches

        zero = self.running()
        image = zero.reasoner.encode_image(np.zeros((224, 224, 3), dtype=np.uint8))
        prompt = zero.reasoner.encode("which organ?", image)
        with LiveBytes() as live:
            scores = zero.scores([Branches(prefix=prompt, branches=[torch.arange(5, 65)])])
            zero.backward(scores.logprobs.sum(), last=True)
            del scores
        accumulated = live.now
        if (buffer := getattr(zero.engine.optimizer, "grad_partitions_flat_buffer", None)) is not None:
            accumulated = buffer.nbytes  # of stage 3, made at the start
        zero.step()
        model = [getattr(each, "ds_tensor", each) for each in zero.reasoner.model.parameters()]
        adam = getattr(zero.engine.optimizer, "optimizer", zero.engine.optimizer)
        kept = [*adam.state, *(state[name] for state in adam.state.values() for name in ("exp_avg", "exp_avg_sq"))]
        weights = storages(model)
        return {
            "weights": sum(weights.values()),
            "optimizer": sum(size for key, size in storages(kept).items() if key not in weights),
            "gradients": accumulated,
            "peak": live.peak,
        }


def storages(tensors):
    """Bytes by storage."""
    return {each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in tensors}


@pytest.mark.parametrize(
    "changes",
    [
        {"zero_stage": 0},
        {"zero_stage": 2, "ranks": 2},
        {"zero_stage": 3, "ranks": 2},
        {"zero_stage": 2, "ranks": 2, "dtype": "bfloat16"},
        {"zero_stage": 3, "ranks": 2, "dtype": "bfloat16"},
        {"zero_stage": 2, "ranks": 2, "lora": {"rank": 8}},
    ],
    ids=str,
)
def test_a_rank_holds_what_is_counted(hosts, changes):
    """Up to the padding of partitions, and to parameters that lie on the border of two, whose whole gradient both
    ranks keep."""
    pool = running(hosts, kind=MeasuredRank, **changes)
    held = pool._all("held", "telling what it holds")
    settings = LearnerConfig.model_validate({"lr": 1e-4, "micro_batch_tokens": 1000, **changes})
    counted = rank_need(TINY_REASONER, settings, 64).certain
    for rank in held:
        assert {part: rank[part] for part in counted} == pytest.approx(counted, rel=0.08)


def test_an_update_needs_the_buffers_that_are_counted(hosts):
    """At stage 2 DeepSpeed makes a bucket for gradients in each backward pass, the largest thing in a small model's."""
    tokens = 160
    peak = running(hosts, kind=MeasuredRank, zero_stage=2)._all("held", "telling what it holds")[0]["peak"]
    need = rank_need(TINY_REASONER, LearnerConfig(lr=1e-4, zero_stage=2, micro_batch_tokens=tokens), 64)
    counted = need.certain["gradients"] + need.estimated["activations"] + need.estimated["reduction"]
    assert counted == pytest.approx(peak, rel=0.2)


def test_a_gpu_is_described_by_properties_that_torch_has():
    """`visible_gpus` finds none here; what it reads of one is declared in torch's own stub."""
    assert visible_gpus() == ()
    stub = (Path(torch.__file__).parent / "_C" / "__init__.pyi").read_text()
    declared = stub[stub.index("class _CudaDeviceProperties") :][:1500]
    for name in ("name: str", "total_memory: _int", "uuid:"):
        assert name in declared
    assert "device" in inspect.signature(torch.cuda.get_device_properties).parameters
