"""Images of more than 8 bits a channel, made ones of 8 through a window of their values."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from umrg.image_files import ImageRefused, depth

_WHITE_IS_ZERO = 0
_RGB = 2
_PREMULTIPLIED = 1


@dataclass(frozen=True)
class Window:
    """Which of a file's values become black and white, as DICOM's Window Center and Window Width say it.

    centre, width: in the values that are stored in the file. Levels follow DICOM's LINEAR function for whole numbers,
    and LINEAR_EXACT for floating point (PS3.3, C.11.2.1.2 and C.11.2.1.3): with 128 and 256, 8-bit values stay as they
    are.
    """

    centre: float
    width: float

    def __post_init__(self) -> None:
        if not (np.isfinite(self.centre) and np.isfinite(self.width) and self.width > 0):
            raise ValueError(
                f"the window {self.centre:g},{self.width:g} has no levels; CENTRE must be a number, WIDTH one above 0"
            )

    @classmethod
    def parse(cls, text: str) -> "Window":
        """Read "CENTRE,WIDTH". Raises ValueError for anything else."""
        try:
            centre, width = map(float, text.split(","))
        except ValueError:
            raise ValueError(
                f"the window {text!r} cannot be read; it must be CENTRE,WIDTH in the image's own values, such as 40,400"
            ) from None
        return cls(centre, width)

    def apply(self, values: NDArray[Any]) -> NDArray[np.uint8]:
        """Levels from 0 to 255, of the same shape; what is no number becomes 0."""
        if values.dtype in (np.uint8, np.uint16):
            # A table takes an eighth of the memory that floating point would.
            levels: NDArray[np.uint8] = self._levels(np.arange(1 << 8 * values.itemsize))[values]
            return levels
        return self._levels(values)

    def _levels(self, values: NDArray[Any]) -> NDArray[np.uint8]:
        whole = np.issubdtype(values.dtype, np.integer)
        centre, width = (self.centre - 0.5, self.width - 1) if whole else (self.centre, self.width)
        if width <= 0:
            return np.where(values > centre, 255, 0).astype(np.uint8)
        shares = (np.nan_to_num(values.astype(np.float64), nan=-np.inf) - centre) / width + 0.5
        levels: NDArray[np.uint8] = np.rint(shares.clip(0, 1) * 255).astype(np.uint8)
        return levels


def eight_bits(image: ImageFile.ImageFile, encoded: bytes, what: str, window: Window) -> Image.Image:
    """An image of more than 8 bits as L, LA, RGB or RGBA, not turned yet where Pillow leaves that to others: what says
    its orientation goes along. Alpha is not windowed. Raises ImageRefused for colours that OpenCV does not read as they
    are.

    image: `encoded`, open at the page that counts, not decoded.
    """
    page, bits = image.tell(), depth(image, encoded)
    if image.mode.startswith(("I", "F")):
        levels, alpha = _gray(image, window)
    else:
        # Pillow gives a part of each value only, but does not let a damaged file pass, as OpenCV does.
        image.load()
        values = _colours(image, encoded, what, page)
        levels = window.apply(values[..., 2::-1])
        opaque = values.shape[2] == 3 or not image.has_transparency_data
        alpha = None if opaque else (values[..., 3] >> (bits - 8)).astype(np.uint8)
    windowed = Image.fromarray(levels)
    if alpha is not None:
        windowed.putalpha(Image.fromarray(alpha))
    windowed.info = {name: value for name, value in image.info.items() if name != "transparency"}
    return windowed


def _gray(image: ImageFile.ImageFile, window: Window) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
    """Levels and alpha [H, W]."""
    args = image.tile[0].args if image.format == "PPM" else None
    white_is_zero = (
        isinstance(image, TiffImageFile) and image.tag_v2.get(ExifTags.Base.PhotometricInterpretation) == _WHITE_IS_ZERO
    )
    values = np.asarray(image)
    if isinstance(args, tuple) and image.mode == "I":
        # Pillow has stretched them to 65535.
        values = np.rint(values * (float(args[1]) / 65535)).astype(np.int32)
    levels = window.apply(values)
    transparent = image.info.get("transparency")
    alpha = np.where(values == transparent, 0, 255).astype(np.uint8) if isinstance(transparent, int) else None
    return 255 - levels if white_is_zero else levels, alpha


def _colours(image: ImageFile.ImageFile, encoded: bytes, what: str, page: int) -> NDArray[np.uint16]:
    """The values [H, W, 3 or 4], in OpenCV's order: blue, green, red, alpha."""
    import cv2

    known = image.mode in ("RGB", "RGBA") and (_plain(image) if isinstance(image, TiffImageFile) else page == 0)
    values: Any = None
    if known:
        before = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
        try:
            _, pages = cv2.imdecodemulti(np.frombuffer(encoded, np.uint8), cv2.IMREAD_UNCHANGED, range=(page, page + 1))
            values = pages[0] if pages else None
        except cv2.error:
            pass
        finally:
            cv2.utils.logging.setLogLevel(before)
    if values is None or values.ndim != 3 or values.dtype != np.uint16:
        raise ImageRefused(f"{what} has colours that cannot be windowed here; window it to 8 bits first")
    colours: NDArray[np.uint16] = values
    return colours


def _plain(image: TiffImageFile) -> bool:
    """Whether a TIFF is of the kind that OpenCV reads as it stands: red, green and blue side by side, not yet
    multiplied with alpha."""
    tags = image.tag_v2
    return (
        tags.get(ExifTags.Base.PhotometricInterpretation) == _RGB
        and tags.get(ExifTags.Base.PlanarConfiguration, 1) == 1
        and _PREMULTIPLIED not in tags.get(ExifTags.Base.ExtraSamples, ())
    )
