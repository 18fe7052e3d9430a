"""A sample: one row of a dataset in the released schema. Images stay encoded until somebody looks at them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from umrg.frames import Box, PointPair, Size
from umrg.images import decode_image, decode_mask, image_size


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image, one implicit query, and the reference answer.

    id: `extra_info.id`, unique in a dataset.
    query: the bare question, as the row has it.
    image_bytes: the encoded image file (PNG, JPEG, ...), as `umrg.images` reads it.
    mask_bytes: encoded masks, one file a part, 0 background and 255 target; () where there is none.
    box: reference box, XYXY with inclusive maximum, original pixels: those of the image as it is decoded, upright.
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
        """Extent of the image, upright, read from its file's header."""
        return image_size(self.image_bytes, f"the image of {self.name}")

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
