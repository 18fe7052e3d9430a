"""Experts of the published sizes without a download, and what they are asked.

Weights are random, but for the bundled tiny expert, which is trained. Its own size is `tiny`; `tiny_vit` has the
architecture of the ViTs with alternative masks at a size that a CPU computes in milliseconds.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from segment_anything.modeling import Sam

from actors.experts.promptable import Promptable
from actors.experts.protocol import Embedding, Prompts
from actors.experts.registry import TINY_FOLDER
from actors.experts.sam import SamExpert, build_sam
from actors.experts.sam_config import VIT_B, VIT_H, SamConfig, read_config
from actors.experts.weights import load_into

TINY_VIT = SamConfig(
    encoder_dim=32, encoder_depth=4, encoder_heads=2, global_layers=(1, 3), image_side=256, window=8, prompt_dim=32,
    decoder_heads=2, decoder_mlp_dim=64,
)  # fmt: skip
SIDE = 840
"""Of the released images, in pixels."""


def random_sam(config: SamConfig, *, seed: int = 0) -> Sam:
    torch.manual_seed(seed)
    return build_sam(config)


def tiny_sam() -> tuple[Sam, SamConfig]:
    """The bundled expert's model and its sizes."""
    config = read_config(TINY_FOLDER / "config.json")
    sam = build_sam(config)
    load_into(sam, TINY_FOLDER / "model.safetensors", name="tiny")
    return sam, config


def _sam_expert(config: SamConfig, name: str, **settings: Any) -> Promptable:
    return SamExpert(random_sam(config), config, name=name, **settings)


EXPERTS: Mapping[str, Callable[..., Promptable]] = {
    "vit_b": partial(_sam_expert, VIT_B, "vit_b"),
    "vit_h": partial(_sam_expert, VIT_H, "vit_h"),
    "tiny_vit": partial(_sam_expert, TINY_VIT, "tiny_vit"),
}
"""By shape; called with device, dtype and whatever else the expert's class takes. The weights are always the same."""


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
