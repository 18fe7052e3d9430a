"""Experts of the published sizes without a download, and what they are asked. Weights are random."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import Module

from actors.experts.promptable import Promptable
from actors.experts.protocol import Embedding, Prompts
from actors.experts.published import Config, FamilyName
from actors.experts.registry import FAMILIES
from actors.experts.sam2_config import HIERA_T, Sam2Config
from actors.experts.sam_config import VIT_B, VIT_H, SamConfig

SIDE = 840
"""Of the released images, in pixels."""

SHAPES: Mapping[str, tuple[FamilyName, Config]] = {
    "vit_b": ("sam", VIT_B),
    "vit_h": ("sam", VIT_H),
    "hiera_t": ("sam2", HIERA_T),
}

SMALL: Mapping[str, tuple[FamilyName, Config]] = {
    "small_vit": (
        "sam",
        SamConfig(
            encoder_dim=32,
            encoder_depth=4,
            encoder_heads=2,
            global_layers=(1, 3),
            image_side=256,
            window=8,
            prompt_dim=32,
            decoder_heads=2,
            decoder_mlp_dim=64,
        ),
    ),
    "small_hiera": (
        "sam2",
        Sam2Config(
            encoder_dim=16,
            encoder_heads=1,
            blocks=(1, 1, 2, 1),
            global_layers=(3,),
            image_side=256,
            prompt_dim=32,
            decoder_heads=2,
            decoder_mlp_dim=64,
        ),
    ),
}
"""Of the same architectures; a CPU embeds an image in a tenth of a second."""


def random_model(shape: str) -> Module:
    """A model in float32, always of the same weights. shape: of `SHAPES` or `SMALL`."""
    family, config = {**SHAPES, **SMALL}[shape]
    torch.manual_seed(0)
    return FAMILIES[family].build(config)


def random_expert(shape: str, **settings: Any) -> Promptable:
    """The expert of `random_model`. settings: device, dtype and what else its class takes."""
    family, config = {**SHAPES, **SMALL}[shape]
    return FAMILIES[family].expert(random_model(shape), config, name=shape, **settings)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """An image, what is in it, and answers that are more or less about that."""

    image: NDArray[np.uint8]
    """[H, W, 3]."""
    reference: NDArray[np.bool_]
    """[H, W]."""
    boxes: NDArray[np.float64]
    """[n, 4] XYXY, in pixels."""
    points: NDArray[np.float64]
    """[n, 2, 2] XY, in pixels."""

    def prompts(self, embedding: Embedding) -> Prompts:
        return Prompts(embedding=embedding, boxes=self.boxes, points=self.points)


def asked(n: int, *, side: int = SIDE, seed: int = 0) -> Asked:
    """A phantom scaled to a square, and n answers of a box and two points that are off by some 5 % of its side."""
    from phantoms import draw

    rng = np.random.default_rng(seed)
    phantom = draw("CT", rng)
    target = max(phantom.targets, key=lambda each: int(each.mask.sum()))
    image = np.array(Image.fromarray(phantom.image).resize((side, side), Image.Resampling.BICUBIC))
    reference = np.array(Image.fromarray(target.mask).resize((side, side), Image.Resampling.NEAREST))
    rows, columns = np.nonzero(reference)
    box = np.array([columns.min(), rows.min(), columns.max(), rows.max()], dtype=float)
    boxes = (box + rng.normal(0, side / 20, (n, 4))).clip(0, side - 1).reshape(n, 2, 2)
    within = rng.integers(0, len(rows), (n, 2))
    points = np.stack([columns[within], rows[within]], axis=-1) + rng.normal(0, side / 40, (n, 2, 2))
    return Asked(
        image=image,
        reference=reference,
        boxes=np.sort(boxes, axis=1).reshape(n, 4),
        points=points.clip(0, side - 1),
    )
