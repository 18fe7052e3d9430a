"""One setting bounds the area of images for processor, engine and learner, and with it the frame of the answers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from reasoner.model import load_reasoner
from reasoner.prompter import load_prompter
from serving.config import ServeConfig
from tests.conftest import TINY_REASONER
from umrg.frames import Frame, Size
from umrg.prompts import PromptSpec

SPEC = PromptSpec.of_model(TINY_REASONER)


@settings(max_examples=30)
@given(
    width=st.integers(30, 600),
    height=st.integers(30, 600),
    least=st.integers(1, 40).map(lambda tokens: 784 * tokens),
    more=st.integers(0, 100).map(lambda tokens: 784 * tokens),
)
def test_images_are_resized_within_the_bounds(width, height, least, more):
    prompter = load_prompter(TINY_REASONER, SPEC.but(min_pixels=least, max_pixels=least + more))
    expected = smart_resize(height, width, factor=28, min_pixels=least, max_pixels=least + more)
    frames = prompter.frames(Size(width, height))
    assert (frames.model.height, frames.model.width) == tuple(expected)
    assert prompter.image_tokens(Size(width, height)) == expected[0] * expected[1] // 784


def test_prompt_frames_and_coordinates_follow():
    """An image of 224 px is seen at 112, and an answer in those pixels is scaled back."""
    whole, half = (load_prompter(TINY_REASONER, SPEC.but(max_pixels=most)) for most in (None, 112 * 112))
    picture = np.zeros((224, 224, 3), dtype=np.uint8)
    prompts = [each.encode("Where?", each.encode_image(picture)) for each in (whole, half)]
    assert [prompt.image.tokens for prompt in prompts] == [64, 16]
    assert len(prompts[0].token_ids) - len(prompts[1].token_ids) == 48
    frames = half.frames(Size(224, 224))
    assert frames == prompts[1].image.frames and frames.model == Size(112, 112)
    assert frames.box((10, 20, 30, 40), Frame.MODEL, Frame.ORIGINAL) == (20, 40, 60, 80)


def test_a_saved_model_keeps_them(tmp_path):
    """A served or evaluated model resizes as the trained one did, also where only its processor is read."""
    load_reasoner(TINY_REASONER, SPEC.but(max_pixels=112 * 112)).save(tmp_path)
    assert load_prompter(tmp_path).resize.max_pixels == 112 * 112
    (tmp_path / "prompt.json").unlink()
    assert load_prompter(tmp_path).resize.max_pixels == 112 * 112


def test_a_service_takes_them():
    config = ServeConfig(model=TINY_REASONER, max_pixels=112 * 112)
    assert load_prompter(config.model, config.spec()).size["longest_edge"] == 112 * 112


def test_without_bounds_a_folder_is_as_it_was():
    assert load_prompter(TINY_REASONER).size == {"shortest_edge": 3136, "longest_edge": 1003520}


def test_a_low_upper_bound_lowers_the_folder_s_own_lower_bound():
    assert load_prompter(TINY_REASONER, SPEC.but(max_pixels=784)).size == {"shortest_edge": 784, "longest_edge": 784}


def test_bounds_without_room_are_refused():
    with pytest.raises(ValueError, match="max_pixels is 100, less than one image token's 28x28 px"):
        load_prompter(TINY_REASONER, SPEC.but(max_pixels=100))
    with pytest.raises(ValueError, match="min_pixels is 2000000, above max_pixels, 1003520; lower it"):
        load_prompter(TINY_REASONER, SPEC.but(min_pixels=2_000_000))
    with pytest.raises(ValidationError, match="min_pixels 900 is above max_pixels 800; lower it"):
        ServeConfig(model=TINY_REASONER, min_pixels=900, max_pixels=800)
