"""Masks as COCO run-length encoding, through pycocotools."""

import warnings
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco


def encode_rle(mask: NDArray[np.bool_]) -> dict[str, object]:
    """A mask bool [H, W] as `{"size": [H, W], "counts": text}`, compressed, column by column as COCO has it."""
    encoded = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in encoded["size"]], "counts": encoded["counts"].decode("ascii")}


def decode_rle(encoded: Mapping[str, object]) -> NDArray[np.bool_]:
    """The mask, bool [H, W]."""
    with warnings.catch_warnings():
        # Of pycocotools' own arrays, which do not know numpy 2's `copy`.
        warnings.simplefilter("ignore", DeprecationWarning)
        mask: NDArray[np.bool_] = coco.decode(dict(encoded)).astype(np.bool_)
    return mask
