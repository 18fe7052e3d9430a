"""SAM-Med2D (Cheng et al., 2023, arXiv:2308.16184) as an expert: Segment Anything at 256 px with an adapter in each
block of the image encoder."""

import numpy as np
import torch
from numpy.typing import NDArray
from segment_anything.modeling import Sam
from segment_anything.modeling.common import MLPBlock
from torch import Tensor, nn
from torch.nn.functional import interpolate

from actors.experts.protocol import Embedding
from actors.experts.sam import SamExpert, build_sam
from actors.experts.sam_config import SamConfig
from umrg.frames import Size


class Adapter(nn.Module):
    """What SAM-Med2D adds to the MLP of a block: channels are weighed by what the whole image holds of them, then
    neighbours are mixed at half the resolution."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.channel = nn.Sequential(
            nn.Linear(dim, dim // 4, bias=False), nn.ReLU(), nn.Linear(dim // 4, dim, bias=False), nn.Sigmoid()
        )
        self.spatial = nn.Sequential(
            nn.Conv2d(dim, dim, kernel_size=3, stride=2, padding=1, bias=False),
            nn.ReLU(),
            nn.ConvTranspose2d(dim, dim, kernel_size=4, stride=2, padding=1, bias=False),
            nn.ReLU(),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: [B, h, w, C] with h and w even; returns the same shape."""
        weighed = tokens * self.channel(tokens.mean((1, 2)))[:, None, None]
        mixed = self.spatial(weighed.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        adapted: Tensor = self.norm(tokens + mixed)
        return adapted


class AdaptedMlp(MLPBlock):
    """A block's MLP with an adapter beside it: both see the same normalised tokens, and the block adds their sum."""

    def __init__(self, dim: int, mlp_dim: int) -> None:
        super().__init__(dim, mlp_dim)
        self.adapter = Adapter(dim)

    def forward(self, tokens: Tensor) -> Tensor:
        changed: Tensor = super().forward(tokens) + self.adapter(tokens)
        return changed


def build_sam_med2d(config: SamConfig) -> Sam:
    """A SAM-Med2D model of these sizes, in float32 with random weights."""
    sam = build_sam(config)
    for block in sam.image_encoder.blocks:
        block.mlp = AdaptedMlp(config.encoder_dim, block.mlp.lin1.out_features)
    return sam


class SamMed2dExpert(SamExpert):
    """SAM-Med2D as its own predictor uses it: the image is squeezed into the square input by nearest neighbour, a
    prompt gets the mask of highest score, and logits are brought to the input's size before they are brought to the
    image's."""

    def _pixels(self, image: NDArray[np.uint8]) -> Tensor:
        side = self.config.image_side
        rows, columns = (_nearest(length, side) for length in image.shape[:2])
        # The original normalises first; as nearest neighbours are mere copies, the result is the same bits.
        square = torch.from_numpy(image[rows[:, None], columns]).to(self._device).permute(2, 0, 1)[None]
        normalised: Tensor = (square.float() - self._sam.pixel_mean) / self._sam.pixel_std
        return normalised

    def _content(self, original: Size) -> Size:
        return Size(self.config.image_side, self.config.image_side)

    def _to_image(self, logits: Tensor, embedding: Embedding) -> Tensor:
        side, original = self.config.image_side, embedding.original
        square = interpolate(logits[:, None], (side, side), mode="bilinear")
        return interpolate(square, (original.height, original.width), mode="bilinear")[:, 0] > 0


def _nearest(length: int, side: int) -> NDArray[np.intp]:
    """[side], the source of each pixel when `length` pixels are scaled to `side` as by OpenCV's INTER_NEAREST."""
    sources: NDArray[np.intp] = np.floor(np.arange(side) * (1 / (side / length))).astype(np.intp)
    return sources.clip(max=length - 1)
