"""Masks as run-length encoding."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from umrg.masks import decode_rle, encode_rle


@given(arrays(np.bool_, st.tuples(st.integers(1, 40), st.integers(1, 40))))
def test_a_mask_comes_back(mask):
    encoded = encode_rle(mask)
    assert encoded["size"] == list(mask.shape)
    assert np.array_equal(decode_rle(encoded), mask)


def test_the_encoding_is_cocos():
    mask = np.zeros((3, 4), dtype=np.bool_)
    mask[1, 1:3] = True
    # Column by column: four out, one in, two out, one in; the last run's length is told as a difference.
    assert encode_rle(mask) == {"size": [3, 4], "counts": "41202"}
