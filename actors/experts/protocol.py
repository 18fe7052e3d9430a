"""What a segmentation expert is to the rest of the system. Free of torch until an expert is loaded."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from umrg.frames import Size

if TYPE_CHECKING:
    from torch import Tensor

Preprocess = Literal["published", "native"]
"""published: as the published evaluation runs every expert. native: as the expert's own code does."""


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """An embedded image: what `decode` needs of it.

    features: float [1, C, h, w], on the expert's device.
    original: extent of the image file.
    content: extent of the image inside the expert's input (the expert frame), padding left out.
    """

    features: "Tensor"
    original: Size
    content: Size


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """The masks of n prompts; where an expert offers several for a prompt, the one of highest score.

    masks: bool [n, H, W], original pixels.
    scores: float32 [n], the expert's own prediction of each mask's IoU.
    logits: float32 [n, h, w], low-resolution logits on the expert's own grid (padding included).
    """

    masks: NDArray[np.bool_]
    scores: NDArray[np.float32]
    logits: NDArray[np.float32]


class Expert(Protocol):
    """A frozen promptable segmenter.

    `embed` is expensive and runs once an image; `decode` is cheap, and batched over prompts. For example, a
    group of 16 answers about one image is one `embed` and one `decode` with boxes [16, 4], points [16, 2, 2].
    """

    @property
    def name(self) -> str: ...

    @property
    def preprocess(self) -> Preprocess: ...

    @property
    def takes_points(self) -> bool:
        """Whether `decode` takes points, or boxes only."""
        ...

    def embed(self, image: NDArray[np.uint8]) -> Embedding:
        """Embed an image: uint8 [H, W, 3], RGB. ValueError for any other layout."""
        ...

    def decode(
        self,
        embedding: Embedding,
        *,
        boxes: NDArray[np.floating] | None = None,
        points: NDArray[np.floating] | None = None,
    ) -> Decoded:
        """Masks for n prompts, each a box, k foreground points, or both.

        boxes: [n, 4] XYXY, inclusive maximum, original pixels. points: [n, k, 2] XY, original pixels.
        ValueError where both are missing, a shape is wrong, a number is not finite, or this expert cannot
        take such a prompt.
        """
        ...

    def digest(self) -> str:
        """sha256 over names, dtypes, shapes and bytes of the weights, as held."""
        ...
