"""A rank's need of memory: its arithmetic against published models, DeepSpeed's own settings and the tiny model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from bench.architectures import ARCHITECTURES, qwen2_5_vl_7b
from learner.config import REDUCE_BUCKET, LearnerConfig
from learner.memory import LIVE, activations, learning_model, rank_need, reference_of
from learner.policy import Policy
from learner.shared_prefix import Branches, pack
from learner.zero import deepspeed_config
from reasoner.footprint import GIB, LiveBytes, empty_model, parameters, text_layer
from reasoner.model import load_reasoner

TINY_REASONER = Path(__file__).parents[2] / "models" / "tiny-reasoner"


def config(**changes):
    return LearnerConfig.model_validate({"lr": 1e-6, "dtype": "bfloat16", "micro_batch_tokens": 16384, **changes})


@pytest.mark.parametrize(
    ("name", "published"),
    [("Qwen2.5-VL-3B", 3_754_622_976), ("Qwen2.5-VL-7B", 8_292_166_656), ("Qwen3-VL-8B", 8_767_123_696)],
)
def test_parameters_are_those_of_the_published_models(name, published):
    assert parameters(empty_model(ARCHITECTURES[name](), torch.bfloat16)) == published


def test_parameters_of_the_tiny_model_are_those_in_its_file():
    held = parameters(load_reasoner(TINY_REASONER).model)
    assert parameters(empty_model(TINY_REASONER, torch.float32)) == held


def tree(reasoner, seed):
    """A prompt about a random image, and four random answers of 60 tokens."""
    random = np.random.default_rng(seed)
    image = reasoner.encode_image(random.integers(0, 255, (224, 224, 3), dtype=np.uint8))
    return Branches(
        prefix=reasoner.encode("which organ?", image),
        branches=list(torch.from_numpy(random.integers(5, 900, (4, 60)))),
    )


@pytest.mark.parametrize("trees", [2, 6])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_checkpointing": True},
        {"lora": {"rank": 8}},
        {"lora": {"rank": 8}, "gradient_checkpointing": True},
        {"freeze": ["vision_tower"]},
        {"freeze": ["language_model"]},
    ],
    ids=str,
)
def test_activations_are_those_measured(changes, trees):
    """The peak of forward and backward pass of the real model lies near the estimate, above its weights. The estimate
    adds up what a rank holds at its worst moment, so it may be a little high."""
    reasoner = load_reasoner(TINY_REASONER)
    packed = [tree(reasoner, seed) for seed in range(trees)]
    tokens, images = sum(map(len, packed)), sum(each.prefix.image.tokens for each in packed)
    settings = config(dtype="float32", micro_batch_tokens=tokens, zero_stage=0, **changes)
    empty = learning_model(TINY_REASONER, settings)
    estimate, _ = activations(empty, settings, images)
    gradients = 4 * parameters(empty, trained=True)

    model = as_learnt(reasoner.model, settings)
    policy = Policy(model, temperature=1.0, forbidden=reasoner.vision_tokens)
    with LiveBytes() as live:
        policy(pack(packed, model)).logprobs.sum().backward()
    assert 0.8 * live.peak <= estimate + gradients
    assert estimate <= 1.2 * live.peak


def as_learnt(model, settings):
    """The model as `ZeroRank` prepares it."""
    from learner.lora import add_adapters
    from learner.policy import freeze

    freeze(model, settings.freeze)
    if settings.lora:
        add_adapters(model, settings.lora)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    return model


def test_a_layer_keeps_what_its_formulas_say():
    """Of a token in bfloat16, h wide: two norms (8 h each: float32 input, normalised and scaled), queries, output and
    its copy (2 h each), keys and values (2 · 512 each), the MLP's four tensors (2 i each), log-sum-exps in float32 (28
    heads), both residual sums (2 h each)."""
    h, i, kv, heads, tokens = 3584, 18944, 512, 28, 1024
    kept = text_layer(empty_model(qwen2_5_vl_7b(), torch.bfloat16), tokens).kept / tokens
    assert kept == pytest.approx(16 * h + 6 * h + 4 * kv + 8 * i + 4 * heads + 4 * h, rel=0.05)


def test_seven_billion_parameters_keep_a_hundred_gigabytes_without_checkpointing():
    frozen = {"freeze": ["vision_tower", "merger"]}
    model = learning_model(qwen2_5_vl_7b(), config(**frozen))
    whole, _ = activations(model, config(**frozen), 3 * 900)
    checkpointed, _ = activations(model, config(**frozen, gradient_checkpointing=True), 3 * 900)
    assert 95 < whole / GIB < 115
    assert checkpointed / GIB < 12


def test_memory_is_linear_in_the_token_budget():
    """Nothing of the size of a mask, or of scores, is counted."""
    model = learning_model(qwen2_5_vl_7b(), config())
    one, two, four = (activations(model, config(micro_batch_tokens=n), n // 4)[0] for n in (8192, 16384, 32768))
    assert four - two == pytest.approx(2 * (two - one), rel=1e-6)


def test_ranks_share_what_their_stage_partitions():
    def parts(**changes):
        return rank_need(qwen2_5_vl_7b(), config(ranks=4, gradient_checkpointing=True, **changes), 2700).certain

    n = 8_292_166_656
    assert parts(zero_stage=2) == {"weights": 2 * n, "gradients": n, "optimizer": 3 * n}
    assert parts(zero_stage=3) == {"weights": n // 2, "gradients": n, "optimizer": 3 * n}


def test_offload_moves_parts_to_the_host():
    need = rank_need(qwen2_5_vl_7b(), config(zero_stage=3, offload="parameters"), 2700)
    assert need.certain == {}
    assert need.host == {"optimizer": 12 * 8_292_166_656, "gradients": 4 * 8_292_166_656, "weights": 2 * 8_292_166_656}


def test_a_parked_reference_is_counted_as_torch_locks_its_pages():
    """torch 2.13 takes the next power of two for each tensor: 29.2 GiB for the 15.4 of a 7B."""
    kl = {"objective": {"kl": 0.01}, "reference": "parked"}
    need = rank_need(qwen2_5_vl_7b(), config(num_gpus=1, **kl), 2700)
    assert need.host["reference"] == pytest.approx(29.2 * GIB, rel=0.01)
    assert rank_need(qwen2_5_vl_7b(), config(**kl), 2700).host == {"reference": 2 * 8_292_166_656}


def test_adapters_need_no_reference_model():
    assert reference_of(config(objective={"kl": 0.01}, lora={})) == "none"
    assert reference_of(config(objective={"kl": 0.01})) != "none"
    assert reference_of(config()) == "none"


def test_deepspeeds_buffers_have_the_sizes_that_are_counted():
    defaults = DeepSpeedZeroConfig()
    assert deepspeed_config(LearnerConfig(lr=1))["zero_optimization"]["reduce_bucket_size"] == REDUCE_BUCKET
    assert defaults.max_live_parameters + defaults.prefetch_bucket_size == LIVE
    assert defaults.contiguous_gradients and defaults.reduce_scatter and defaults.overlap_comm is False
