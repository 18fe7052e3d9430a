"""Changing frame is a scaling, and back again; the model frame is the processor's own."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from umrg.frames import Box, Frame, Frames, PointPair, ResizeRule, Size, rescale

relaxed = settings(deadline=None, max_examples=300)

sides = st.integers(1, 5000)
sizes = st.builds(Size, sides, sides)
frames_of_images = st.builds(lambda original, model: Frames(original=original, model=model), sizes, sizes)
frame = st.sampled_from(Frame)
number = st.floats(-10_000, 10_000)
pairs = st.tuples(st.tuples(number, number), st.tuples(number, number))


@given(frames_of_images, frame, frame, st.tuples(number, number, number, number), pairs)
def test_there_and_back_again(frames: Frames, source: Frame, target: Frame, box: Box, points: PointPair) -> None:
    assert frames.box(frames.box(box, source, target), target, source) == pytest.approx(box)
    back = frames.points(frames.points(points, source, target), target, source)
    assert np.asarray(back) == pytest.approx(np.asarray(points))


@given(frames_of_images, frame, frame)
def test_the_whole_image_is_the_whole_image_in_every_frame(frames: Frames, source: Frame, target: Frame) -> None:
    old, new = frames.size(source), frames.size(target)
    whole = frames.box((0, 0, old.width, old.height), source, target)
    assert whole == pytest.approx((0, 0, new.width, new.height))


def test_x_and_y_scale_each_by_its_own_side() -> None:
    frames = Frames(original=Size(200, 100), model=Size(400, 50))
    assert frames.box((10, 20, 30, 40), Frame.ORIGINAL, Frame.MODEL) == (20, 10, 60, 20)
    assert frames.points(((10, 20), (30, 40)), Frame.MODEL, Frame.ORIGINAL) == ((5, 40), (15, 80))
    assert frames.box((500, 500, 1000, 1000), Frame.RELATIVE, Frame.ORIGINAL) == (100, 50, 200, 100)


@given(sizes, sizes, st.tuples(number, number, number, number))
def test_rescaling_an_array_is_changing_frame(original: Size, model: Size, box: Box) -> None:
    expected = Frames(original=original, model=model).box(box, Frame.ORIGINAL, Frame.MODEL)
    assert rescale(np.array([box, box]), original, model) == pytest.approx(np.array([expected, expected]))
    points = rescale(np.array(box).reshape(2, 2), original, model)
    assert points.ravel() == pytest.approx(np.array(expected))


def test_a_size_has_a_long_side_and_a_diagonal() -> None:
    assert (Size(30, 40).long_side, Size(30, 40).diagonal) == (40, 50)


def test_the_model_frame_is_the_processors_own() -> None:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    @relaxed
    @given(
        st.one_of(sizes, st.builds(Size, st.integers(1, 60), sides)),
        st.sampled_from([14, 28, 32]),
        st.integers(1, 500),
        st.integers(0, 2000),
    )
    def check(size: Size, factor: int, least: int, more: int) -> None:
        pixels = factor * factor
        rule = ResizeRule(factor=factor, min_pixels=least * pixels, max_pixels=(least + more) * pixels)
        try:
            height, width = smart_resize(
                size.height, size.width, factor=factor, min_pixels=rule.min_pixels, max_pixels=rule.max_pixels
            )
        except ValueError:
            with pytest.raises(ValueError, match="aspect ratio over 200"):
                rule.model_size(size)
            return
        assert rule.model_size(size) == Size(width, height)

    check()
    # A side under half a patch is grown with its image, not rounded up alone.
    assert ResizeRule().model_size(Size(2000, 10)) == Size(*reversed(smart_resize(10, 2000)))
    assert ResizeRule().model_size(Size(840, 840)) == Size(840, 840)


@pytest.mark.parametrize("size", [Size(201, 1), Size(1, 201)])
def test_an_image_like_a_thread_is_refused(size: Size) -> None:
    with pytest.raises(ValueError, match="aspect ratio over 200; crop it"):
        ResizeRule().model_size(size)
