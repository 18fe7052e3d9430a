"""COCO run-length encoding (RLE) of masks, through pycocotools."""

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco

PIXELS_PER_RUN = 256
"""Masks of shorter runs are encoded by pycocotools: each run is a Python number on its way there."""


def encode_rle(mask: NDArray[np.bool_]) -> dict[str, object]:
    """Encode a mask, bool [H, W], as COCO's compressed RLE `{"size": [H, W], "counts": text}`."""
    starts = _starts(mask) if mask.size else None
    if starts is None:
        # COCO counts runs along columns, so pycocotools requires Fortran order.
        return _readable(coco.encode(np.asfortranarray(mask, dtype=np.uint8)))
    return encode_runs(starts, *mask.shape)


def encode_runs(starts: NDArray[np.integer], height: int, width: int) -> dict[str, object]:
    """Encode a mask of that size, of one pixel at least, as `encode_rle` does, by its runs along columns.

    starts: int [k], ascending positions, column by column, of the pixels that differ from the one before them; the
    first pixel of all differs if it is in the mask.
    """
    lengths: list[int] = np.diff(starts, prepend=0, append=height * width).tolist()
    return _readable(coco.frPyObjects({"size": [height, width], "counts": lengths}, height, width))


def _readable(encoded: Mapping[str, Any]) -> dict[str, object]:
    return {"size": [int(side) for side in encoded["size"]], "counts": encoded["counts"].decode("ascii")}


def _starts(mask: NDArray[np.bool_]) -> NDArray[np.integer] | None:
    """The starts of a mask's runs, as `encode_runs` takes them; None if there are many.

    Only the pixels that differ from the one before them are looked at one by one. Putting all pixels into the order of
    columns takes ten times as long for a large image.
    """
    height, width = mask.shape
    starts = np.empty(mask.shape, dtype=np.bool_)
    np.not_equal(mask[1:], mask[:-1], out=starts[1:])
    np.not_equal(mask[0, 1:], mask[-1, :-1], out=starts[0, 1:])
    starts[0, 0] = mask[0, 0]
    if np.count_nonzero(starts) > mask.size // PIXELS_PER_RUN:
        return None
    rows, columns = np.divmod(np.flatnonzero(starts), width)
    return np.sort(columns * height + rows)


def decode_rle(encoded: Mapping[str, object]) -> NDArray[np.bool_]:
    """Decode COCO's compressed RLE to a mask, bool [H, W]."""
    with warnings.catch_warnings():
        # pycocotools' array class lacks the `copy` argument of NumPy 2's `__array__`, and NumPy warns about it.
        warnings.simplefilter("ignore", DeprecationWarning)
        mask: NDArray[np.bool_] = coco.decode(dict(encoded)).astype(np.bool_)
    return mask
