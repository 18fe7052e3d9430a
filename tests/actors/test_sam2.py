"""SAM 2.1 and MedSAM2 as sam2's own image predictor answers (see `tests.make_published_outputs`)."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import Sam2VideoConfig, Sam2VideoModel

from actors.experts.layouts import SAM2 as LAYOUT
from actors.experts.layouts import SAM2_IN_TRANSFORMERS
from actors.experts.published import PUBLISHED_EXPERTS
from actors.experts.sam2 import Sam2Expert, build_sam2
from actors.experts.sam2_config import HIERA_T
from actors.experts.weights import shapes_of
from tests.published_experts import (
    BOXES,
    IMAGE,
    LABELS,
    OUTPUTS,
    POINTS,
    SAM2,
    assert_answers_are,
    checkpoint_digest,
    model_weights,
)
from umrg.frames import Size

pytestmark = pytest.mark.numeric

FAST = ("small", "other")


def expert_of(case: str, *, dtype: str = "float32") -> Sam2Expert:
    model = build_sam2(SAM2[case])
    model.load_state_dict(model_weights(shapes_of(model.state_dict()), LAYOUT))
    return Sam2Expert(model, SAM2[case], name="sam2", dtype=dtype)


def upscaled(logits: Tensor, size: tuple[int, int]) -> Tensor:
    return interpolate(logits[:, None], size, mode="bilinear")[:, 0]


@pytest.mark.parametrize(
    "case", [*FAST, *(pytest.param(each, marks=pytest.mark.slow) for each in SAM2 if each not in FAST)]
)
def test_its_answers_are_those_of_its_own_predictor(case: str) -> None:
    assert_answers_are(expert_of(case), f"sam2-{case}.npz", upscaled)


@pytest.mark.parametrize("case", SAM2)
def test_its_checkpoint_has_the_names_and_shapes_of_the_original_but_for_what_is_left_out(case: str) -> None:
    with torch.device("meta"):
        model = shapes_of(build_sam2(SAM2[case]).state_dict())
    original = np.load(OUTPUTS / f"sam2-{case}.npz")
    assert checkpoint_digest(LAYOUT.shapes(model)) == original["shapes"]
    assert len(original["beside"]) > 100
    assert all(str(name).startswith(LAYOUT.left_out) for name in original["beside"])


def test_what_transformers_saves_of_a_video_model_is_known_or_left_out() -> None:
    with torch.device("meta"):
        video, image = Sam2VideoModel(Sam2VideoConfig()).state_dict(), build_sam2(HIERA_T).state_dict()
    used = SAM2_IN_TRANSFORMERS.used(video)
    assert shapes_of(used) == shapes_of(image)
    assert len(video) > len(used)


def test_medsam2_is_published_at_1024_pixels_and_native_at_512() -> None:
    medsam2 = PUBLISHED_EXPERTS["medsam2"]
    assert medsam2.native is not None
    assert (medsam2.config, medsam2.native) == (SAM2["t-1024"], SAM2["t-512"])
    assert [name for name, each in PUBLISHED_EXPERTS.items() if each.native] == ["medsam_vit_b", "medsam2"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_half_precision_encoder_gives_nearly_the_same_logits(dtype: str) -> None:
    exact, half = expert_of("small"), expert_of("small", dtype=dtype)
    expected, logits = (expert.decode(expert.embed(IMAGE), boxes=BOXES).logits for expert in (exact, half))
    assert 0 < np.abs(logits - expected).max() < 0.1 * np.ptp(expected)


def test_a_point_of_the_background_is_another_prompt() -> None:
    expert = expert_of("other")
    embedding = expert.embed(IMAGE)
    foreground, mixed = (expert.decode(embedding, points=POINTS, labels=each).logits for each in (None, LABELS))
    assert np.array_equal(foreground[0], mixed[0])
    assert np.abs(foreground[1] - mixed[1]).max() > 1e-4


def test_an_image_fills_the_input_and_is_embedded_at_three_resolutions() -> None:
    embedding = expert_of("small").embed(IMAGE)
    assert (embedding.content, embedding.original) == (Size(128, 128), Size(130, 90))
    assert [tuple(level.shape) for level in embedding.features] == [
        (1, 256, 8, 8), (1, 64, 16, 16), (1, 32, 32, 32)
    ]  # fmt: skip
