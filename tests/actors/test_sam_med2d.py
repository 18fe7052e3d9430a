"""SAM-Med2D as its own predictor answers (see `tests.make_published_outputs`)."""

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import interpolate

from actors.experts.layouts import SAM_MED2D as LAYOUT
from actors.experts.sam_med2d import SamMed2dExpert, _nearest, build_sam_med2d
from actors.experts.weights import shapes_of
from tests.published_experts import (
    BOXES,
    IMAGE,
    OUTPUTS,
    SAM_MED2D,
    assert_answers_are,
    checkpoint_digest,
    model_weights,
)
from umrg.frames import Size

pytestmark = pytest.mark.numeric


def expert_of(case: str, *, dtype: str = "float32") -> SamMed2dExpert:
    sam = build_sam_med2d(SAM_MED2D[case])
    sam.load_state_dict(model_weights(shapes_of(sam.state_dict()), LAYOUT))
    return SamMed2dExpert(sam, SAM_MED2D[case], name="sam_med2d", dtype=dtype)


@pytest.mark.parametrize("case", ["small", pytest.param("vit_b", marks=pytest.mark.slow)])
def test_its_answers_are_those_of_its_own_predictor(case: str) -> None:
    expert = expert_of(case)
    side = expert.config.image_side

    def upscaled(logits: Tensor, size: tuple[int, int]) -> Tensor:
        square = interpolate(logits[:, None], (side, side), mode="bilinear")
        return interpolate(square, size, mode="bilinear")[:, 0]

    assert_answers_are(expert, f"sam_med2d-{case}.npz", upscaled)


@pytest.mark.parametrize("case", SAM_MED2D)
def test_its_checkpoint_has_the_names_and_shapes_of_the_original(case: str) -> None:
    with torch.device("meta"):
        model = shapes_of(build_sam_med2d(SAM_MED2D[case]).state_dict())
    assert checkpoint_digest(LAYOUT.shapes(model)) == np.load(OUTPUTS / f"sam_med2d-{case}.npz")["shapes"]


@settings(deadline=None)
@given(length=st.integers(1, 5000), side=st.sampled_from([64, 256]))
def test_nearest_neighbours_are_those_of_opencv(length: int, side: int) -> None:
    line = np.arange(length, dtype=np.float32)[None]
    assert np.array_equal(_nearest(length, side), cv2.resize(line, (side, 1), interpolation=cv2.INTER_NEAREST)[0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_half_precision_encoder_gives_nearly_the_same_logits(dtype: str) -> None:
    exact, half = expert_of("small"), expert_of("small", dtype=dtype)
    expected, logits = (expert.decode(expert.embed(IMAGE), boxes=BOXES).logits for expert in (exact, half))
    assert 0 < np.abs(logits - expected).max() < 0.1 * np.ptp(expected)


def test_an_image_fills_the_input_whatever_its_aspect() -> None:
    expert = expert_of("small")
    embedding = expert.embed(IMAGE[:20])
    assert (embedding.content, embedding.original) == (Size(64, 64), Size(130, 20))
    assert expert.decode(embedding, boxes=BOXES).masks.shape == (2, 20, 130)
