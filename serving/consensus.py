"""TEMPORARY: to be replaced by the branch that owns the consensus; only the interface is right."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Vote:
    """The consensus of several masks."""

    mask: NDArray[np.bool_]
    """bool [H, W]."""
    chosen: int
    """Index of the mask that stands for all."""
    confidence: float | None
    """Agreement, 0 to 1; None for a single mask."""


def vote(masks: Sequence[NDArray[np.bool_] | None]) -> Vote | None:
    """The mask closest to the majority of all; None where there is no mask."""
    present = [(i, mask) for i, mask in enumerate(masks) if mask is not None]
    if not present:
        return None
    majority = np.mean([mask for _, mask in present], axis=0) > 0.5
    shares = [float(np.mean(mask == majority)) for _, mask in present]
    best = int(np.argmax(shares))
    return Vote(mask=present[best][1], chosen=present[best][0], confidence=float(np.mean(shares)))
