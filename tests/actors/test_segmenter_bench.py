"""The benchmarks of experts, with small models: that both sides do the same work, and all figures are there."""

import pytest

from bench import gpu_segmenter, segmenter
from bench.expert_shapes import SIDE, SMALL, asked


def test_both_paths_of_the_bench_draw_the_same_masks(tmp_path):
    costs, unlike = segmenter.compare("tiny", 1, tmp_path)
    # A logit that is next to nothing may fall on either side on another processor.
    assert unlike["pixels_unlike"] < 100 and unlike["largest_logit"] < 1e-4 < unlike["logit_spread"]
    assert unlike["disk_dice_shift"] < 1e-2
    found = segmenter.figures(costs)
    assert min(found.values()) > 0
    assert set(found) >= {"first_touch_ratio", "cached_ratio", "disk_ratio", "decoder_ratio", "embed_per_read"}
    assert len({len(row) for row in segmenter.rows(costs, found)}) == 1


@pytest.mark.parametrize("shape", SMALL)
def test_the_bench_for_gpus_is_rehearsed(shape):
    scale = gpu_segmenter.REHEARSAL
    found = gpu_segmenter.measured(shape, scale)
    assert set(found["masks_per_s"]) == set(scale.prompts)
    assert found["float32"]["features_off"] == found["float32"]["pixels_off"] == 0
    for half in gpu_segmenter.HALVES:
        assert 0 < found[half]["features_off"] < 0.1 and set(found[half]["images_per_s"]) == set(scale.images)
    assert len(gpu_segmenter.rows(shape, found)) == 3


def test_what_is_asked_is_within_the_image_and_has_prompts_in_order():
    work = asked(16, seed=3)
    assert work.image.shape == (SIDE, SIDE, 3) and work.reference.shape == (SIDE, SIDE) and work.reference.any()
    assert (work.boxes[:, :2] <= work.boxes[:, 2:]).all()
    for values in (work.boxes, work.points):
        assert len(values) == 16 and values.min() >= 0 and values.max() < SIDE
