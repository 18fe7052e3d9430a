"""A sample: one row of a dataset in the released schema, with images that are decoded on demand."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from umrg.frames import Box, PointPair, Size
from umrg.images import decode_image, decode_mask, image_size
from umrg.mistake import Mistake


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image, one implicit query and the reference answer."""

    id: str
    """`extra_info.id`, unique in a dataset."""
    query: str
    """The question as it stands in the row, without instructions."""
    image_bytes: bytes = field(repr=False)
    """The encoded image file, in one of the formats that `umrg.images` decodes."""
    mask_bytes: tuple[bytes, ...] = field(repr=False)
    """Encoded masks whose union is the target; gray values of 128 or more mark it. Empty if there is no mask."""
    box: Box
    """Reference box, XYXY with inclusive maximum, in original pixels (those of the decoded, upright image)."""
    points: PointPair
    """The two reference key points, XY in original pixels."""
    supercategory: str
    """Normalised name, "unknown" if missing, as are `category` and `modality`."""
    category: str
    modality: str
    reasoning: str | None = None
    """Reference reasoning for supervised fine-tuning, if the row has one."""
    extra: Mapping[str, object] = field(default_factory=dict, repr=False)
    """The remaining fields of `extra_info`."""
    source: str = field(default="", repr=False)
    """The file that the row was read from, for error messages; "" if there is none."""

    @property
    def name(self) -> str:
        """The sample's name in error messages: its id and, if known, its file."""
        return f"sample {self.id!r}" + (f" of {self.source}" if self.source else "")

    @cached_property
    def size(self) -> Size:
        """Size of the upright image, read from the header of the encoded file."""
        return image_size(self.image_bytes, f"the image of {self.name}")

    @cached_property
    def image_key(self) -> str:
        """sha256 of the encoded image file, by which its embedding is kept: rows that share a file share it."""
        return hashlib.sha256(self.image_bytes).hexdigest()

    def image(self) -> NDArray[np.uint8]:
        """The decoded image, uint8 [H, W, 3] RGB. Raises ValueError if it cannot be decoded."""
        return decode_image(self.image_bytes, f"the image of {self.name}")

    def mask(self) -> NDArray[np.bool_]:
        """The reference mask, bool [H, W].

        Raises ValueError in the cases of `mask_union`, and if the mask is empty although the row does not declare
        `extra_info.no_target`.
        """
        union = self.mask_union()
        if not union.any() and not self.no_target:
            raise Mistake(f"the mask of {self.name} is empty; mark the row `no_target` or leave it out")
        return union

    @property
    def no_target(self) -> bool:
        """Whether the row declares that the image does not show the target of the query."""
        return bool(self.extra.get("no_target"))

    def mask_union(self) -> NDArray[np.bool_]:
        """The union of all masks, bool [H, W], which may be empty.

        Raises ValueError if the row has no mask, or if a mask cannot be decoded or differs in size from the image.
        """
        if not self.mask_bytes:
            raise Mistake(f"{self.name} has no mask; add one to its `masks` or leave the row out")
        union = np.zeros((self.size.height, self.size.width), dtype=np.bool_)
        for part in self.mask_bytes:
            mask = decode_mask(part, f"the mask of {self.name}")
            if mask.shape != union.shape:
                raise Mistake(
                    f"the mask of {self.name} is {mask.shape[1]}x{mask.shape[0]} px, its image "
                    f"{self.size.width}x{self.size.height}; they must be of one size"
                )
            union |= mask
        return union
