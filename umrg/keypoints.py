"""The tight box and the two reference key points of a mask."""

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt

from umrg.mistake import Mistake


def tight_box(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """The smallest box that encloses a mask.

    `mask` is bool [H, W]. The box is XYXY with inclusive maximum, in the mask's pixels.
    Raises ValueError if the mask is empty.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if rows.size == 0:
        raise Mistake("the mask is empty: give a mask with at least one pixel set")
    return int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1])


def reference_points(mask: NDArray[np.bool_]) -> tuple[tuple[int, int], tuple[int, int]]:
    """The two key points of a mask, as defined by MedReasoner (arXiv:2508.08177).

    The first point maximises the Euclidean distance transform of the mask. The second maximises it among the mask
    pixels whose distance from the first exceeds the median distance of all mask pixels. Pixels beyond the image border
    count as background. For a mask of one pixel, both points are the same.

    `mask` is bool [H, W], and the points are XY in its pixels. Ties are resolved to the first pixel in row-major order.
    Raises ValueError if the mask is empty.
    """
    left, top, right, bottom = tight_box(mask)
    # Only the box is transformed, which is faster. The padding provides background beyond the image's border.
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
