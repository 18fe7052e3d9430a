"""Masks as run-length encoding."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as coco

from umrg.masks import decode_rle, encode_rle


@given(arrays(np.bool_, st.tuples(st.integers(1, 40), st.integers(1, 40))))
def test_a_mask_comes_back(mask):
    encoded = encode_rle(mask)
    assert encoded["size"] == list(mask.shape)
    assert np.array_equal(decode_rle(encoded), mask)


spans = st.tuples(st.integers(0, 199), st.integers(1, 200))


@given(st.lists(st.tuples(spans, spans), max_size=3), st.booleans(), st.floats(0, 0.01))
def test_masks_of_few_and_of_many_runs_are_encoded_as_by_pycocotools(rectangles, inverted, specks):
    mask = np.random.default_rng(0).random((160, 200)) < specks
    for (top, height), (left, width) in rectangles:
        mask[top : top + height, left : left + width] = True
    mask ^= inverted
    expected = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    assert encode_rle(mask) == {"size": [160, 200], "counts": expected["counts"].decode()}
    assert encode_rle(np.asfortranarray(mask)) == encode_rle(mask)


def test_the_encoding_is_cocos():
    mask = np.zeros((3, 4), dtype=np.bool_)
    mask[1, 1:3] = True
    # Column by column: four out, one in, two out, one in; the last run's length is told as a difference.
    assert encode_rle(mask) == {"size": [3, 4], "counts": "41202"}
