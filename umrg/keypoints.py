"""The tight box and the two reference key points of a mask."""

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt


def tight_box(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """Smallest box around a mask's pixels.

    `mask` is bool [H, W]; the result is XYXY in the mask's pixels with inclusive maximum.
    Raises ValueError when the mask is empty.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if rows.size == 0:
        raise ValueError("the mask is empty: give a mask with at least one pixel set")
    return int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1])


def reference_points(mask: NDArray[np.bool_]) -> tuple[tuple[int, int], tuple[int, int]]:
    """The two key points of a mask, as the published method defines them.

    The first is where the Euclidean distance transform is largest; the second is where it is largest among
    mask pixels farther from the first than the median of all mask pixels' distances from it. What lies beyond
    the image border counts as outside the mask. A mask of a single pixel gives the same point twice.

    `mask` is bool [H, W]; points are XY in the mask's pixels. Ties go to the first pixel in row order.
    Raises ValueError when the mask is empty.
    """
    left, top, right, bottom = tight_box(mask)
    padded = np.pad(mask[top : bottom + 1, left : right + 1], 1)
    depth = distance_transform_edt(padded)
    rows, columns = np.nonzero(padded)
    depths = depth[rows, columns]
    first = int(np.argmax(depths))
    distances = np.hypot(rows - rows[first], columns - columns[first])
    far = distances > np.median(distances)
    second = int(np.argmax(np.where(far, depths, -1.0))) if far.any() else first

    def to_image(pixel: int) -> tuple[int, int]:
        return int(columns[pixel]) - 1 + left, int(rows[pixel]) - 1 + top

    return to_image(first), to_image(second)
