"""The interface of segmentation experts. Imports torch only for type checking."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from umrg.frames import Size

if TYPE_CHECKING:
    from torch import Tensor

Preprocess = Literal["published", "native"]
"""`published`: the preprocessing of the published evaluation for every expert. `native`: that of the expert's own
code."""


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """An embedded image, as input of `decode`."""

    features: "Tensor"
    """float [1, C, h, w], on the expert's device."""
    original: Size
    """Size of the original image."""
    content: Size
    """Size of the scaled image within the expert's input (the expert frame), without padding."""


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """The masks of n prompts. If an expert predicts several masks for a prompt, it is the one of highest score."""

    masks: NDArray[np.bool_]
    """bool [n, H, W], in original pixels."""
    scores: NDArray[np.float32]
    """float32 [n], the expert's own prediction of each mask's IoU."""
    logits: NDArray[np.float32]
    """float32 [n, h, w], low-resolution logits on the expert's own grid, padding included."""


class Expert(Protocol):
    """A frozen promptable segmenter.

    `embed` is expensive and runs once per image; `decode` is cheap and batched over prompts. For example, a group of 16
    answers about one image needs one `embed`, and one `decode` with boxes [16, 4] and points [16, 2, 2].
    """

    @property
    def name(self) -> str:
        """The name in the registry, or the folder that the expert was loaded from."""
        ...

    @property
    def preprocess(self) -> Preprocess:
        """How images are preprocessed."""
        ...

    @property
    def takes_points(self) -> bool:
        """Whether `decode` takes points, or boxes only."""
        ...

    def embed(self, image: NDArray[np.uint8]) -> Embedding:
        """Embed an image, uint8 [H, W, 3] RGB. Raises ValueError for any other shape or type."""
        ...

    def decode(
        self,
        embedding: Embedding,
        *,
        boxes: NDArray[np.floating] | None = None,
        points: NDArray[np.floating] | None = None,
    ) -> Decoded:
        """Decode masks for n prompts, each of which is a box, k foreground points, or both.

        boxes: [n, 4] XYXY with inclusive maximum, in original pixels. points: [n, k, 2] XY, in original pixels.
        Raises ValueError if both are missing, a shape is wrong, a number is not finite, or the expert does not take
        such prompts.
        """
        ...

    def digest(self) -> str:
        """sha256 over names, dtypes, shapes and bytes of the weights in memory."""
        ...
