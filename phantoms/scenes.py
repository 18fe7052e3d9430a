"""Phantoms: synthetic images with the exact masks of the structures that they show."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from phantoms import looks
from phantoms.anatomy import (
    ct,
    dermoscopy,
    endoscopy,
    fundus,
    mammography,
    mri,
    oct,
    pathology,
    ultrasound,
    xray,
)
from phantoms.canvas import Canvas, Mask
from phantoms.optical import OPTICAL
from phantoms.radiology import RADIOLOGY
from phantoms.structure import Structure
from phantoms.tomography import TOMOGRAPHY
from umrg.keypoints import tight_box
from umrg.mistake import Mistake

STRUCTURES: tuple[Structure, ...] = TOMOGRAPHY + RADIOLOGY + OPTICAL

_PAINTERS: dict[str, Callable[[np.random.Generator, int], Canvas]] = {
    "CT": ct.draw,
    "MRI": mri.draw,
    "X-ray": xray.draw,
    "ultrasound": ultrasound.draw,
    "endoscopy": endoscopy.draw,
    "fundus": fundus.draw,
    "pathology": pathology.draw,
    "dermoscopy": dermoscopy.draw,
    "mammography": mammography.draw,
    "OCT": oct.draw,
}
MODALITIES: tuple[str, ...] = tuple(_PAINTERS)

SMALLEST_IMAGE = 112
# Structures smaller than this are no targets; in pixels of an image of side 224.
SMALLEST_AREA = 250
SMALLEST_SIDE = 16
FEWEST_TARGETS, MOST_TARGETS = 2, 6

_BY_NAME = {structure.name: structure for structure in STRUCTURES}


@dataclass(frozen=True, kw_only=True)
class Target:
    """A structure that is visible in an image."""

    structure: Structure
    mask: NDArray[np.bool_]
    """Its visible pixels, bool [H, W]."""


@dataclass(frozen=True, kw_only=True)
class Phantom:
    """A synthetic image with its targets."""

    modality: str
    image: NDArray[np.uint8]
    """uint8 [H, W, 3] RGB."""
    targets: tuple[Target, ...]
    """Two to six structures."""


def draw(modality: str, rng: np.random.Generator, *, size: int = 224) -> Phantom:
    """Draw a phantom of `size` by `size` pixels, repeatedly until at least two structures are large enough.

    Raises ValueError for an unknown modality or a size below 112.
    """
    if modality not in _PAINTERS:
        raise Mistake(f"unknown modality {modality!r}: choose one of {', '.join(MODALITIES)}")
    if size < SMALLEST_IMAGE:
        raise Mistake(f"a phantom of {size} pixels shows too little: ask for {SMALLEST_IMAGE} or more")
    while True:
        canvas = _PAINTERS[modality](rng, size)
        names = [name for name, mask in canvas.masks.items() if large_enough(mask)]
        if len(names) >= FEWEST_TARGETS:
            break
    kept = sorted(rng.permutation(len(names))[:MOST_TARGETS].tolist())
    targets = (Target(structure=_BY_NAME[names[k]], mask=canvas.masks[names[k]]) for k in kept)
    return Phantom(modality=modality, image=looks.to_uint8(canvas.image), targets=tuple(targets))


def large_enough(mask: Mask) -> bool:
    """Whether a mask's area and its box's sides are large enough for a target in an image of its size."""
    scale = mask.shape[0] / 224
    if np.count_nonzero(mask) < SMALLEST_AREA * scale**2:
        return False
    left, top, right, bottom = tight_box(mask)
    return bool(min(right - left, bottom - top) + 1 >= SMALLEST_SIDE * scale)
