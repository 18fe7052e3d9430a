"""COCO run-length encoding (RLE) of masks, through pycocotools."""

import warnings
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco


def encode_rle(mask: NDArray[np.bool_]) -> dict[str, object]:
    """Encode a mask, bool [H, W], as COCO's compressed RLE `{"size": [H, W], "counts": text}`."""
    # COCO counts runs along columns, so pycocotools requires Fortran order.
    encoded = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in encoded["size"]], "counts": encoded["counts"].decode("ascii")}


def decode_rle(encoded: Mapping[str, object]) -> NDArray[np.bool_]:
    """Decode COCO's compressed RLE to a mask, bool [H, W]."""
    with warnings.catch_warnings():
        # pycocotools' array class lacks the `copy` argument of NumPy 2's `__array__`, and NumPy warns about it.
        warnings.simplefilter("ignore", DeprecationWarning)
        mask: NDArray[np.bool_] = coco.decode(dict(encoded)).astype(np.bool_)
    return mask
