"""The interface of segmentation experts. Imports torch only for type checking."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from umrg.frames import Size
from umrg.mistake import Mistake

if TYPE_CHECKING:
    from torch import Tensor

Preprocess = Literal["published", "native"]
"""`published`: the preprocessing of the published evaluation for every expert. `native`: that of the expert's own
code."""


class NotFinite(Mistake):
    """An expert computed numbers that are not finite: its weights are broken, or its precision has too small a
    range."""


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """An embedded image, as input of `decode`."""

    features: "tuple[Tensor, ...]"
    """float [1, C, h, w] each: one for SAM; for SAM 2 also the finer ones. On the expert's device when they were made,
    in float32; as a cache returns them, on any device and in float32 or float16."""
    original: Size
    """Size of the original image."""
    content: Size
    """Size of the scaled image within the expert's input (the expert frame), without padding."""

    @property
    def nbytes(self) -> int:
        """Bytes of the features."""
        return sum(each.nbytes for each in self.features)


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """n prompts about one embedded image, which are all of the same kinds: a box, k points, a mask, or several of
    them."""

    embedding: Embedding
    """Of this expert, on any device."""
    boxes: NDArray[np.floating] | None = None
    """[n, 4] XYXY with inclusive maximum, in original pixels."""
    points: NDArray[np.floating] | None = None
    """[n, k, 2] XY, in original pixels."""
    labels: NDArray[np.integer] | None = None
    """[n, k], 1 for a point of the foreground and 0 for one of the background; None for points of the foreground."""
    masks: NDArray[np.floating] | None = None
    """[n, h, w], logits of an earlier mask as `Decoded.logits` has them, to be refined."""


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """The masks of n prompts. If an expert predicts several masks for a prompt, it is the one of highest score."""

    drawn: "Tensor"
    """bool [n, H, W], in original pixels, on the expert's device."""
    scores: NDArray[np.float32]
    """float32 [n], the expert's own prediction of each mask's IoU."""
    logits: NDArray[np.float32]
    """float32 [n, h, w], low-resolution logits on the expert's own grid, padding included."""

    @cached_property
    def masks(self) -> NDArray[np.bool_]:
        """`drawn` in the main memory."""
        masks: NDArray[np.bool_] = self.drawn.cpu().numpy()
        return masks


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

    @property
    def takes_masks(self) -> bool:
        """Whether `decode` takes a mask as a prompt."""
        ...

    @property
    def images_at_once(self) -> int:
        """How many images `embed_all` takes in one pass of the encoder; 1 where a pass of more would gain nothing."""
        ...

    def embed(self, image: NDArray[np.uint8]) -> Embedding:
        """Embed an image, uint8 [H, W, 3] RGB. Raises ValueError for any other shape or type, and NotFinite."""
        ...

    def embed_all(self, images: Sequence[NDArray[np.uint8]]) -> list[Embedding]:
        """Embed images, each uint8 [H, W, 3] RGB of its own size, `images_at_once` in a pass of the encoder.

        A pass has 1, 2, 4, 8 … images: fewer are padded up to the next, so that kernels meet few shapes. Where
        `images_at_once` is 1, the embeddings are those of `embed` bit for bit, and otherwise up to rounding. None
        shares its memory with another. Raises ValueError as `embed` does.
        """
        ...

    def decode(
        self,
        embedding: Embedding,
        *,
        boxes: NDArray[np.floating] | None = None,
        points: NDArray[np.floating] | None = None,
        labels: NDArray[np.integer] | None = None,
        masks: NDArray[np.floating] | None = None,
    ) -> Decoded:
        """`decode_all` of one `Prompts` with these fields."""
        ...

    def decode_all(self, requests: Sequence[Prompts]) -> list[Decoded]:
        """Decode masks for prompts about several images together.

        The masks of a request are the same bits whatever is decoded beside it: passes of the decoder have few, padded
        shapes, which depend on nothing but the expert and the request. Raises ValueError if a prompt has neither a box
        nor points, a shape is wrong, a number is not finite, a label is neither 0 nor 1, or the expert does not take
        such prompts; and NotFinite.
        """
        ...

    def digest(self) -> str:
        """sha256 over names, dtypes, shapes and bytes of the weights in memory."""
        ...

    def fingerprint(self) -> str:
        """sha256 over all that an embedding depends on beside the image: the expert's class and size of input, the
        digest of the weights, preprocessing, precision and kind of device, and the version of the code that prepares
        images. Embeddings of two experts with the same fingerprint may stand for each other."""
        ...
