"""Windowing: images of more than 8 bits per channel are mapped to 8 bits through a window of their values."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from umrg.image_files import ImageRefused, opened
from umrg.mistake import Mistake

# Values [H, W] or [H, W, 3], and alpha [H, W] in 8 bits if there is any.
_Decoded = tuple[NDArray[Any], NDArray[np.uint8] | None]

_WHITE_IS_ZERO = 0  # TIFF's PhotometricInterpretation for inverted gray
_SEPARATE = 2  # TIFF's PlanarConfiguration for one plane per colour
# Pillow reads only the high byte of a 16-bit value, which a raw mode names by byte order: little-endian (L), big-endian
# (B) or native (N). In the opposite byte order it reads the low byte.
_OTHER_BYTE = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}


@dataclass(frozen=True)
class Window:
    """The range of stored values that is mapped to levels from black to white.

    The mapping is DICOM's LINEAR function for integers and LINEAR_EXACT for floating point (PS3.3, C.11.2.1.2 and
    C.11.2.1.3). The window 128,256 leaves 8-bit values as they are.
    """

    centre: float
    """DICOM's Window Center, in stored values."""
    width: float
    """DICOM's Window Width, in stored values."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.centre) and math.isfinite(self.width) and self.width > 0):
            raise Mistake(
                f"the window {self.centre:g},{self.width:g} has no levels; CENTRE must be a number, WIDTH one above 0"
            )

    @classmethod
    def parse(cls, text: str) -> "Window | Percentiles":
        """Read "CENTRE,WIDTH" or "pLOW,pHIGH". Raises ValueError for anything else."""
        bounds = [bound.strip() for bound in text.split(",")]
        ranked = all(bound.startswith("p") for bound in bounds)
        try:
            first, second = (float(bound[1:] if ranked else bound) for bound in bounds)
        except ValueError:
            raise Mistake(
                f"the window {text!r} cannot be read; it must be CENTRE,WIDTH in the image's own values, such as "
                "40,400, or two of their percentiles, such as p1,p99"
            ) from None
        return Percentiles(first, second) if ranked else cls(first, second)

    def fitted(self, _: NDArray[Any]) -> "Window":
        """Itself, whatever the values."""
        return self

    def apply(self, values: NDArray[Any]) -> NDArray[np.uint8]:
        """Levels from 0 to 255, of the same shape; NaN becomes 0."""
        if values.dtype in (np.uint8, np.uint16):
            # A lookup table needs an eighth of the memory that floating-point arithmetic would.
            levels: NDArray[np.uint8] = self._levels(np.arange(1 << 8 * values.itemsize))[values]
            return levels
        return self._levels(values)

    def _levels(self, values: NDArray[Any]) -> NDArray[np.uint8]:
        # LINEAR is LINEAR_EXACT with half a level less in the centre and one level less in the width.
        whole = np.issubdtype(values.dtype, np.integer)
        centre, width = (self.centre - 0.5, self.width - 1) if whole else (self.centre, self.width)
        if width <= 0:
            return np.where(values > centre, 255, 0).astype(np.uint8)
        known = np.nan_to_num(values.astype(np.float64), nan=-np.inf, posinf=np.inf, neginf=-np.inf)
        shares = (known - centre) / width + 0.5
        levels: NDArray[np.uint8] = np.rint(shares.clip(0, 1) * 255).astype(np.uint8)
        return levels


@dataclass(frozen=True)
class Percentiles:
    """The window from one percentile of an image's own values to another: what lies at or below the first becomes
    black, what lies at or above the second white. Where both are one value, what lies above it becomes white."""

    low: float
    """From 0 to 100."""
    high: float
    """From `low`, which it exceeds, to 100."""

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 100:
            raise Mistake(
                f"the window p{self.low:g},p{self.high:g} has no levels; its percentiles must rise, from 0 to 100"
            )

    def fitted(self, values: NDArray[Any]) -> Window:
        """The window for an image's values, of any shape. A percentile is the value whose rank is nearest; NaN and
        infinite values have none. Raises ValueError where there are no others."""
        ranked = values if np.issubdtype(values.dtype, np.integer) else values[np.isfinite(values)]
        if not ranked.size:
            raise Mistake("the image has no finite values to take percentiles of; give its window as CENTRE,WIDTH")
        # Interpolation between two values may overflow their type.
        black, white = map(float, np.percentile(ranked, (self.low, self.high), method="nearest"))
        if ranked is values:
            # Of integers, LINEAR's bounds lie half a level below the centre and are one less apart than the width.
            return Window((black + white + 1) / 2, white - black + 1)
        # Where both are one value, the next one that 32 bits can hold is white.
        white = max(white, float(np.nextafter(np.float32(black), np.float32(np.inf))))
        return Window((black + white) / 2, white - black)


def eight_bits(image: ImageFile.ImageFile, encoded: bytes, what: str, window: Window | Percentiles) -> Image.Image:
    """An image of more than 8 bits, windowed to L, LA, RGB or RGBA. It keeps the metadata with its orientation, which
    is not applied yet. Alpha is not windowed. Raises ImageRefused if Pillow does not give access to the stored values.

    image: `encoded`, opened at the chosen page and not decoded.
    """
    gray = image.mode.startswith(("I", "F"))
    values, alpha = _gray(image) if gray else _colours(image, encoded, what)
    levels = window.fitted(values).apply(values)
    if isinstance(image, TiffImageFile) and image.tag_v2.get(ExifTags.Base.PhotometricInterpretation) == _WHITE_IS_ZERO:
        levels = 255 - levels
    windowed = Image.fromarray(levels)
    if alpha is not None:
        windowed.putalpha(Image.fromarray(alpha))
    windowed.info = {name: value for name, value in image.info.items() if name != "transparency"}
    return windowed


def _gray(image: ImageFile.ImageFile) -> _Decoded:
    args = image.tile[0].args if image.format == "PPM" else None
    values = np.asarray(image)
    if image.mode == "I" and isinstance(args, tuple):
        # Pillow has scaled the values from the file's own maximum to 65535.
        values = np.rint(values * (float(args[1]) / 65535)).astype(np.int32)
    return values, _keyed(image, values[..., None])


def _colours(image: ImageFile.ImageFile, encoded: bytes, what: str) -> _Decoded:
    """Values and alpha of a colour image. Pillow returns only one byte of each 16-bit value, so the file is decoded
    once for the high bytes and once for the low ones."""
    tiles = image.tile
    if image.format == "PPM" and encoded.startswith(b"P6"):
        return _ppm(image, encoded), None
    modes = {_raw_mode(tile) for tile in tiles}
    if modes == {"LA;16B"}:
        # Pillow has no mode for 16-bit gray with alpha, so the four bytes of a pixel are read as RGBA.
        decoded = _decoded_as(image, tiles, "RGBA")
        values = decoded[..., 0].astype(np.uint16) << 8 | decoded[..., 1]
        return values, decoded[..., 2]
    kind, _, order = modes.pop().partition(";16") if len(modes) == 1 else ("", "", "")
    planes = isinstance(image, TiffImageFile) and image.tag_v2.get(ExifTags.Base.PlanarConfiguration) == _SEPARATE
    if planes or kind not in ("RGB", "RGBX", "RGBA") or order not in _OTHER_BYTE:
        raise ImageRefused(f"{what} has values that cannot be windowed here; window it to 8 bits first")
    with opened(encoded, what, image.tell()) as again:
        low = _decoded_as(again, again.tile, f"{kind};16{_OTHER_BYTE[order]}")
    high = _decoded_as(image, tiles, f"{kind};16{order}")
    values = high.astype(np.uint16) << 8 | low
    alpha = high[..., 3] if kind == "RGBA" else _keyed(image, values)
    return values[..., :3], alpha


def _ppm(image: ImageFile.ImageFile, encoded: bytes) -> NDArray[np.uint16]:
    """The stored values, read from the file's bytes, because Pillow would scale them."""
    start, shape = image.tile[0].offset, (image.height, image.width, 3)
    image.load()
    values = np.frombuffer(encoded, ">u2", math.prod(shape), start)
    return values.astype(np.uint16).reshape(shape)


def _raw_mode(tile: Any) -> str:
    """The raw mode, which says how the tile's bytes form pixels: the first argument of its decoder."""
    return str(tile.args if isinstance(tile.args, str) else tile.args[0])


def _decoded_as(image: ImageFile.ImageFile, tiles: Sequence[Any], raw_mode: str) -> NDArray[np.uint8]:
    """The image, decoded as if its bytes were in another raw mode of the same width."""
    image.tile = [
        tile._replace(args=raw_mode if isinstance(tile.args, str) else (raw_mode, *tile.args[1:])) for tile in tiles
    ]
    return np.asarray(image)


def _keyed(image: Image.Image, values: NDArray[Any]) -> NDArray[np.uint8] | None:
    """Alpha [H, W] of values [H, W, C] if a PNG declares one colour as transparent."""
    if (colour := image.info.get("transparency")) is None:
        return None
    alpha: NDArray[np.uint8] = np.where((values == colour).all(axis=-1), 0, 255).astype(np.uint8)
    return alpha
