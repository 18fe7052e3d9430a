"""Weights made from their names, and an image with prompts: what the original packages and the experts built here are
given alike, so that their outputs can be compared. The outputs of the original packages lie in tests/actors/outputs;
`tests.make_published_outputs` makes them."""

import hashlib
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.experts.layouts import Layout
from actors.experts.protocol import Expert
from actors.experts.sam2_config import HIERA_B, HIERA_L, HIERA_S, HIERA_T, Sam2Config
from actors.experts.sam_config import VIT_B, SamConfig

OUTPUTS = Path(__file__).parent / "actors" / "outputs"
STRIDE = 4
"""Of the logits' pixels that are kept, where there are more than 32 a side."""
LOGITS = 32

_NOISE = np.random.default_rng(0).integers(0, 64, (90, 130, 3))
_SLOPES = np.add.outer(np.arange(90), np.arange(130))[:, :, None] * (1, 0.5, 0.25)
IMAGE: NDArray[np.uint8] = (_NOISE + _SLOPES * 0.8).astype(np.uint8)
BOXES = np.array([[10.0, 5.0, 70.0, 60.0], [50.5, 20.25, 128.0, 88.0]])
POINTS = np.array([[[30.0, 20.0], [60.0, 50.0]], [[80.0, 40.0], [20.5, 70.0]]])
LABELS = np.array([[1, 1], [1, 0]])
PROMPTS: Mapping[str, Mapping[str, Any]] = {
    "boxes": {"boxes": BOXES},
    "points": {"points": POINTS, "labels": LABELS},
    "both": {"boxes": BOXES, "points": POINTS, "labels": LABELS},
}
"""Each is then refined by the logits of `both`, which the outputs have as `refined`."""

SMALL_HIERA = Sam2Config(encoder_dim=16, encoder_heads=1, blocks=(1, 1, 2, 1), global_layers=(3,), image_side=128)
OTHER_HIERA = Sam2Config(
    encoder_dim=16, encoder_heads=2, blocks=(1, 2, 3, 1), global_layers=(4,), windows=(4, 2, 2, 2), background=14,
    image_side=64,
)  # fmt: skip
SMALL_MED2D = SamConfig(
    image_side=64, patch=8, window=5, encoder_dim=64, encoder_depth=2, encoder_heads=2, global_layers=(1,),
    decoder_mlp_dim=256,
)  # fmt: skip


SAM2: Mapping[str, Sam2Config] = {
    "small": SMALL_HIERA,
    "other": OTHER_HIERA,
    "t-1024": HIERA_T,
    "t-512": HIERA_T.model_copy(update={"image_side": 512}),
    "s-256": HIERA_S.model_copy(update={"image_side": 256}),
    "b+-256": HIERA_B.model_copy(update={"image_side": 256}),
    "l-256": HIERA_L.model_copy(update={"image_side": 256}),
}
SAM_MED2D: Mapping[str, SamConfig] = {"small": SMALL_MED2D, "vit_b": VIT_B.model_copy(update={"image_side": 256})}


def weight(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Random numbers that depend on nothing but the name and the shape, of a size that lets no layer explode."""
    numbers = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, dtype=np.float32) * np.float32(
        0.04
    )
    if len(shape) == 1 and name.endswith(".weight"):
        return 1 + numbers
    return 25 * numbers if "positional_encoding_gaussian_matrix" in name else numbers


def model_weights(shapes: Mapping[str, tuple[int, ...]], layout: Layout) -> dict[str, Tensor]:
    """The weights of a model whose checkpoint has the names of a layout."""
    named = {name: torch.from_numpy(weight(name, shape)) for name, shape in layout.shapes(shapes).items()}
    return layout.translated(named, shapes)


def checkpoint_digest(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """sha256 of names and shapes, a line each."""
    lines = "".join(f"{name} {shape}\n" for name, shape in sorted(shapes.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def assert_answers_are(expert: Expert, file: str, upscaled: Callable[[Tensor, tuple[int, int]], Tensor]) -> None:
    """Assert that an expert's scores and logits are those of the original package to 1e-4, and its masks the same but
    where the logit is as near to zero. upscaled: logits [n, h, w] at the size (H, W) of an image."""
    expected = np.load(OUTPUTS / file)
    embedding = expert.embed(IMAGE)
    for kind in (*PROMPTS, "refined"):
        logits = None if kind != "refined" else expert.decode(embedding, **PROMPTS["both"]).logits
        decoded = expert.decode(embedding, **PROMPTS["both" if kind == "refined" else kind], masks=logits)
        np.testing.assert_allclose(decoded.scores, expected[f"{kind}_scores"].max(1), atol=1e-4)
        kept = STRIDE if decoded.logits.shape[-1] > LOGITS else 1
        np.testing.assert_allclose(decoded.logits[:, ::kept, ::kept], expected[f"{kind}_logits"], atol=1e-4)
        masks = np.unpackbits(expected[f"{kind}_masks"], axis=-1, count=IMAGE.shape[1]).astype(bool)
        undecided = upscaled(torch.from_numpy(decoded.logits), IMAGE.shape[:2]).abs().numpy() < 1e-4
        assert ((decoded.masks == masks) | undecided).all()
        assert undecided.mean() < 0.01 < masks.mean()
        assert np.ptp(decoded.logits) > 0.05
