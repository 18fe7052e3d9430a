import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt

from umrg.keypoints import reference_points, tight_box

masks = st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=7, max_size=7).map(
    lambda rows: np.array(rows, dtype=np.bool_)
)


def rectangle(left: int, top: int, right: int, bottom: int) -> NDArray[np.bool_]:
    mask = np.zeros((60, 80), dtype=np.bool_)
    mask[top : bottom + 1, left : right + 1] = True
    return mask


def test_the_box_is_tight_with_inclusive_maximum() -> None:
    assert tight_box(rectangle(10, 20, 30, 24)) == (10, 20, 30, 24)
    assert tight_box(rectangle(79, 0, 79, 0)) == (79, 0, 79, 0)


def test_an_empty_mask_has_neither_box_nor_points() -> None:
    empty = np.zeros((5, 5), dtype=np.bool_)
    for function in (tight_box, reference_points):
        with pytest.raises(ValueError, match="the mask is empty"):
            function(empty)


def test_the_points_of_two_discs_are_their_centres_the_larger_first() -> None:
    y, x = np.mgrid[:60, :80]
    discs = (np.hypot(x - 20, y - 30) <= 12) | (np.hypot(x - 60, y - 25) <= 9)
    assert reference_points(discs) == ((20, 30), (60, 25))


def test_the_image_border_counts_as_outside() -> None:
    # Without it, the deepest pixel of a mask that fills the image's left half would lie on the border.
    (x, y), _ = reference_points(rectangle(0, 0, 20, 59))
    assert x == 10
    assert 10 <= y <= 49


def test_one_pixel_is_both_points() -> None:
    assert reference_points(rectangle(7, 9, 7, 9)) == ((7, 9), (7, 9))


@given(masks)
def test_points_follow_the_definition(mask: NDArray[np.bool_]) -> None:
    if not mask.any():
        return
    (x1, y1), (x2, y2) = reference_points(mask)
    assert mask[y1, x1]
    assert mask[y2, x2]
    depth = distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    assert depth[y1, x1] == depth.max()
    rows, columns = np.nonzero(mask)
    distance = np.hypot(columns - x1, rows - y1)
    far = distance > np.median(distance)
    if far.any():
        assert np.hypot(x2 - x1, y2 - y1) > np.median(distance)
        assert depth[y2, x2] == depth[rows, columns][far].max()
