"""What leaves the device of an expert's masks: counts of pixels, and where runs of them begin.

On a GPU both are found there, and a mask itself is not downloaded; in the main memory numpy does the same work in a
fraction of torch's time. Either way they are integers, so that both give the same rewards and the same text.
"""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from umrg.masks import PIXELS_PER_RUN, encode_rle, encode_runs
from umrg.metrics import Overlap
from umrg.mistake import Mistake


def overlaps(drawn: Tensor, reference: NDArray[np.bool_]) -> list[Overlap]:
    """Of masks, bool [n, H, W] on any device, with a reference mask, bool [H, W]. Raises ValueError if they differ in
    size."""
    if tuple(drawn.shape[1:]) != reference.shape:
        raise Mistake(f"masks of {tuple(drawn.shape[1:])} and {reference.shape} cannot be compared; resize one")
    counts = _counts_here(drawn.numpy(), reference) if drawn.device.type == "cpu" else counts_there(drawn, reference)
    area = int(np.count_nonzero(reference))
    return [Overlap(both=both, predicted=predicted, reference=area) for both, predicted in counts]


def encoded(drawn: Tensor) -> list[Mapping[str, object]]:
    """Masks, bool [n, H, W] on any device, as `umrg.masks.encode_rle` encodes each."""
    if drawn.device.type == "cpu":
        return [encode_rle(mask) for mask in drawn.numpy()]
    return [encoded_there(mask) for mask in drawn]


def _counts_here(masks: NDArray[np.bool_], reference: NDArray[np.bool_]) -> list[tuple[int, int]]:
    return [(int(np.count_nonzero(mask & reference)), int(np.count_nonzero(mask))) for mask in masks]


def counts_there(drawn: Tensor, reference: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Pixels that each mask shares with the reference, and its own, counted on its device."""
    target = torch.from_numpy(reference).to(drawn.device)
    # One mask after another: to sum them up takes 8 bytes a pixel.
    counts = [torch.stack([(mask & target).sum(), mask.sum()]) for mask in drawn]
    return [(both, predicted) for both, predicted in torch.stack(counts).tolist()] if counts else []


def encoded_there(mask: Tensor) -> dict[str, object]:
    """One mask, bool [H, W], encoded by the starts of its runs, which are found on its device."""
    height, width = mask.shape
    pixels = mask.T.reshape(-1)
    starts = pixels.clone()
    starts[1:] ^= pixels[:-1]
    if not mask.numel() or int(starts.sum()) > mask.numel() // PIXELS_PER_RUN:
        return encode_rle(mask.cpu().numpy())
    return encode_runs(starts.nonzero()[:, 0].cpu().numpy(), height, width)
