"""Qwen3-VL, which has another coordinate frame, interleaved m-rope and deepstack features, in the same forward."""

import numpy as np
import pytest
import torch
from transformers import (
    AutoTokenizer,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from cluster.train import actors
from cluster.weight_sync import Canary
from cluster.workers import started
from learner.attention import use_shared_prefix
from learner.policy import freeze
from learner.shared_prefix import Branches, branch_scores, pack
from phantoms import rows
from reasoner.model import load_reasoner
from reasoner.prompter import load_prompter
from tests.actors.test_vllm_counts_alike import assert_vllm_sees_alike
from tests.conftest import TINY_REASONER
from umrg.dataset import Dataset
from umrg.dataset_writer import write_rows
from umrg.frames import Frame, Size
from umrg.prompts import PromptSpec

pytestmark = pytest.mark.numeric


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Qwen3-VL of some hundred thousand parameters, with the tiny reasoner's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_REASONER)
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad", "vision_start")}
    end = tokenizer.convert_tokens_to_ids("<|vision_end|>")
    text = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "head_dim": 32,
        "num_key_value_heads": 1,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [6, 5, 5],
            "mrope_interleaved": True,
        },
        "tie_word_embeddings": False,
    }
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 64,
        "deepstack_visual_indexes": [0, 1],
        "num_position_embeddings": 256,
    }
    torch.manual_seed(0)
    config = Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=end,
        tie_word_embeddings=False,
    )
    path = tmp_path_factory.mktemp("qwen3") / "model"
    Qwen3VLForConditionalGeneration(config).save_pretrained(path)
    sizes = {"patch_size": 16, "merge_size": 2, "size": {"shortest_edge": 32 * 32, "longest_edge": 224 * 224}}
    Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**sizes),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(),
        chat_template=tokenizer.chat_template,
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "phantoms.parquet"
    write_rows(path, rows(2, seed=3, modalities=["CT"], queries_per_image=1))
    return list(Dataset.open(path))


def test_its_coordinates_are_thousandths_of_the_image(folder):
    assert PromptSpec.of_model(folder).frame is Frame.RELATIVE


def test_its_answers_stay_thousandths_however_small_it_is_seen(folder):
    whole, small = (load_prompter(folder, PromptSpec.of_model(folder).but(max_pixels=most)) for most in (None, 16384))
    original = Size(224, 112)
    assert [each.image_tokens(original) for each in (whole, small)] == [7 * 4, 5 * 2]
    frames = [
        each.frames(original).box((100, 200, 500, 900), Frame.RELATIVE, Frame.ORIGINAL) for each in (whole, small)
    ]
    assert frames[0] == frames[1] == pytest.approx((22.4, 22.4, 112, 100.8))


def test_shared_prefix_equals_single_sequences(folder, samples):
    reasoner = load_reasoner(folder)
    use_shared_prefix(reasoner.model)
    rng = np.random.default_rng(0)
    trees = [
        Branches(
            prefix=reasoner.encode(sample.query, reasoner.encode_image(sample.image())),
            branches=[torch.tensor(rng.integers(100, 200, length)) for length in (5, 1, 17)],
        )
        for sample in samples
    ]
    alone = [Branches(prefix=tree.prefix, branches=[branch]) for tree in trees for branch in tree.branches]
    found = []
    for parts in ([trees], [[each] for each in alone]):
        reasoner.model.zero_grad()
        logprobs = torch.cat([branch_scores(reasoner.model, pack(part, reasoner.model)).logprobs for part in parts])
        (logprobs * torch.linspace(-1, 1, len(logprobs))).sum().backward()
        found.append((logprobs.detach(), {n: p.grad.clone() for n, p in reasoner.model.named_parameters()}))
    (shared, gradients), (single, expected) = found
    assert (shared - single).abs().max() < 1e-5
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max(), name
    plain = torch.cat([by_transformers(load_reasoner(folder), each) for each in alone])
    assert (shared - plain).abs().max() < 1e-5


@torch.no_grad()
def by_transformers(reasoner, tree):
    """Log-probs of the only branch, by the model's own forward over the whole sequence."""
    (branch,) = tree.branches
    ids = torch.cat([tree.prefix.token_ids, branch])[None]
    image = tree.prefix.image
    logits = reasoner.model(
        input_ids=ids,
        mm_token_type_ids=(ids == reasoner.image_token_id).int(),
        pixel_values=image.pixel_values,
        image_grid_thw=image.grid_thw,
    ).logits[0, len(tree.prefix.token_ids) - 1 : -1]
    return logits.log_softmax(dim=1).gather(1, branch[:, None])[:, 0]


def test_its_deepstack_mergers_are_frozen_with_the_merger(folder):
    model = load_reasoner(folder).model
    freeze(model, ["vision_tower", "language_model"])
    learning = {name.split(".")[2] for name, each in model.named_parameters() if each.requires_grad}
    assert learning == {"merger", "deepstack_merger_list"}


@pytest.mark.slow
@pytest.mark.parametrize(("least", "most"), [(4096, 16384), (None, 1024), (None, None)])
def test_vllm_keeps_its_bounds(folder, least, most):
    """At 1,024, one image token, vLLM would divide by zero if films had this bound too."""
    spec = PromptSpec.of_model(folder).but(min_pixels=least, max_pixels=most)
    assert_vllm_sees_alike(folder, load_prompter(folder, spec))


@pytest.mark.slow
@pytest.mark.parametrize(
    "bounds",
    [
        pytest.param((), id="as the folder says", marks=pytest.mark.chaos),
        pytest.param(("max_pixels=16384",), id="bounded"),
    ],
)
def test_the_engines_log_probs_are_the_learners(ray_cluster, demo_config, folder, samples, bounds):
    """Also where images are seen smaller than the folder says: both resize alike."""
    config = demo_config(f"model={folder}", "learner.freeze=[]", "rollout.max_prompt_tokens=2048", *bounds)
    with started(actors(config), config) as workers:
        gap = Canary(samples[0], config).check(workers)
    assert gap is not None and gap < 1e-5
