"""A sample: one row of a dataset in the released schema. Images stay encoded until somebody looks at them."""

import io
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from umrg.frames import Box, PointPair, Size

# What Pillow's decoders raise for damaged files.
_UNDECODABLE = (OSError, SyntaxError, ValueError, TypeError, struct.error, Image.DecompressionBombError)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image, one implicit query, and the reference answer.

    id: `extra_info.id`, unique in a dataset.
    query: the bare question, as the row has it.
    image_bytes: the encoded image file (PNG, JPEG, ...).
    mask_bytes: encoded masks, one file a part, 0 background and 255 target; () where there is none.
    box: reference box, XYXY with inclusive maximum, original pixels.
    points: the two reference key points, XY, original pixels.
    supercategory, category, modality: normalised names; modality is "unknown" where the row has none.
    reasoning: reference reasoning for supervised training, where the row has it.
    extra: the other fields of `extra_info`.
    source: the file that the row was read from, "" where there is none; error messages name it.
    """

    id: str
    query: str
    image_bytes: bytes = field(repr=False)
    mask_bytes: tuple[bytes, ...] = field(repr=False)
    box: Box
    points: PointPair
    supercategory: str
    category: str
    modality: str
    reasoning: str | None = None
    extra: Mapping[str, object] = field(default_factory=dict, repr=False)
    source: str = field(default="", repr=False)

    @property
    def name(self) -> str:
        """How error messages name the sample: by its id and, where known, its file."""
        return f"sample {self.id!r}" + (f" of {self.source}" if self.source else "")

    @cached_property
    def size(self) -> Size:
        """Extent of the image file, read from its header."""
        with open_image(self.image_bytes, f"the image of {self.name}") as image:
            return Size(*image.size)

    def image(self) -> NDArray[np.uint8]:
        """The image, uint8 [H, W, 3] RGB. Raises ValueError where it cannot be decoded."""
        return decode_image(self.image_bytes, f"the image of {self.name}")

    def mask(self) -> NDArray[np.bool_]:
        """The reference mask, bool [H, W].

        Raises ValueError as `mask_union` does, and where the mask is empty in a row that does not declare
        `extra_info.no_target`.
        """
        union = self.mask_union()
        if not union.any() and not self.no_target:
            raise ValueError(f"the mask of {self.name} is empty; mark the row `no_target` or leave it out")
        return union

    @property
    def no_target(self) -> bool:
        """Whether the row declares that its image does not show what is asked for."""
        return bool(self.extra.get("no_target"))

    def mask_union(self) -> NDArray[np.bool_]:
        """The union of the mask's parts, bool [H, W], which may be empty.

        Raises ValueError where the row has no mask, and where one cannot be decoded or has another size than the image.
        """
        if not self.mask_bytes:
            raise ValueError(f"{self.name} has no mask; add one to its `masks` or leave the row out")
        union = np.zeros((self.size.height, self.size.width), dtype=np.bool_)
        for part in self.mask_bytes:
            mask = decode_mask(part, f"the mask of {self.name}")
            if mask.shape != union.shape:
                raise ValueError(
                    f"the mask of {self.name} is {mask.shape[1]}x{mask.shape[0]} px, its image "
                    f"{self.size.width}x{self.size.height}; they must be of one size"
                )
            union |= mask
        return union


def open_image(encoded: bytes, what: str) -> Image.Image:
    """Open an encoded image without decoding its pixels; ValueError names `what` where it is no image."""
    try:
        return Image.open(io.BytesIO(encoded))
    except _UNDECODABLE as error:
        # Pillow's own message for it holds nothing but a memory address.
        reason = "unknown format" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"{what} cannot be decoded ({reason}); it must be a PNG, JPEG or the like") from error


def media_type(encoded: bytes) -> str:
    """The MIME type of an encoded image, such as image/png."""
    with open_image(encoded, "an image") as image:
        return Image.MIME.get(image.format or "", "application/octet-stream")


def decode_image(encoded: bytes, what: str) -> NDArray[np.uint8]:
    """Decode an image file to uint8 [H, W, 3] RGB; ValueError names `what` where it cannot be decoded, or has
    more than 8 bits a channel, which a conversion would clip to white."""
    with open_image(encoded, what) as image:
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"{what} has more than 8 bits a pixel; window it to 8 bits first")
        try:
            return np.asarray(image.convert("RGB"))
        except _UNDECODABLE as error:
            raise ValueError(f"{what} cannot be decoded ({error}); the file is damaged or cut short") from error


def decode_mask(encoded: bytes, what: str) -> NDArray[np.bool_]:
    """Decode a mask file to bool [H, W], true where it is 128 or more; ValueError names `what` where it cannot be."""
    with open_image(encoded, what) as image:
        try:
            return np.asarray(image.convert("L")) >= 128
        except _UNDECODABLE as error:
            raise ValueError(f"{what} cannot be decoded ({error}); the file is damaged or cut short") from error


def encode_png(pixels: NDArray[np.uint8] | NDArray[np.bool_]) -> bytes:
    """Encode uint8 [H, W, 3], uint8 [H, W] or a mask (bool [H, W], written as 0/255) as PNG."""
    array = pixels.astype(np.uint8) * 255 if pixels.dtype == np.bool_ else pixels
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()
