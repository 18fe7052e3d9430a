"""Image decoding, the same for datasets, models, experts, endpoints and services.

    encoded file ──opened──► one page, not decoded ──load, turn──► upright ──window──► 8 bits ──composite──► RGB

The orientation (EXIF, XMP or TIFF tag) is applied, transparency is composited on white, more than 8 bits per channel
are refused or windowed, and a page must be given if the file has several. Without a window and a page, the pixels are
those of vLLM's own loader.
"""

import io
from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from umrg.frames import Size
from umrg.image_files import FORMATS, TURNS, ImageRefused, depth, opened, orientation, upright_size
from umrg.windowing import Percentiles, Window, eight_bits

_Layers = tuple[Image.Image, Image.Image | None]
"""Colours, and the alpha channel if there is one."""


def image_size(encoded: bytes, what: str) -> Size:
    """The size that an image has once it is decoded and upright, from the file's header. Raises ValueError, naming
    `what`, if the file is not an image, is damaged, or has several pages."""
    with opened(encoded, what) as image:
        return Size(*upright_size(image, encoded))


def decode_image(
    encoded: bytes,
    what: str,
    *,
    window: Window | Percentiles | None = None,
    frame: int | None = None,
    formats: Collection[str] = FORMATS,
) -> NDArray[np.uint8]:
    """Decode an image file to uint8 [H, W, 3] RGB: upright, and opaque on white.

    window: maps the values of an image to 8-bit levels; an image of 8 bits is windowed by its RGB colours. frame: the
    page to decode, counted from 0. formats: those that are read, by Pillow's names.
    Raises ValueError, naming `what`, if the image cannot be decoded, if it has several pages and no frame is given, or
    if it has more than 8 bits per channel and no window is given: Pillow's conversion would clip such an image, or make
    it almost black.
    """
    with opened(encoded, what, frame, formats) as image:
        bits = depth(image, encoded)
        if bits > 8 and window is None:
            raise ImageRefused(
                f"{what} has more than 8 bits a channel ({bits}); window it to 8 bits first (`ground` and the service "
                "take a window: CENTRE,WIDTH or pLOW,pHIGH)"
            )
        if window is None:
            layers = _layers(_upright(image))
        elif bits > 8:
            layers = _layers(_upright(eight_bits(image, encoded, what, window)))
        else:
            layers = _layers(_upright(image), window)
        return np.asarray(_composite(*layers, "white"))


def decode_mask(encoded: bytes, what: str) -> NDArray[np.bool_]:
    """Decode a mask file to bool [H, W], true where the gray value is at least 128. The mask is made upright, and
    transparent pixels are background.

    Raises ValueError, naming `what`, if the mask cannot be decoded, has several pages, or has colours of more than
    8 bits. Gray values of more than 8 bits are not rescaled.
    """
    with opened(encoded, what) as image:
        deep = depth(image, encoded) > 8
        if deep and image.mode in ("RGB", "RGBA", "CMYK"):
            raise ImageRefused(f"{what} has colours of more than 8 bits; write it in gray, 0 and 255")
        upright = _upright(image)
        if deep:
            return np.asarray(upright) >= 128
        if upright.has_transparency_data:
            upright = _composite(*_layers(upright), "black")
        return np.asarray(upright.convert("L")) >= 128


def encode_png(pixels: NDArray[np.uint8] | NDArray[np.bool_]) -> bytes:
    """Encode uint8 [H, W, 3], uint8 [H, W] or a mask (bool [H, W], written as 0/255) as PNG."""
    array = pixels.astype(np.uint8) * 255 if pixels.dtype == np.bool_ else pixels
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def _upright(image: Image.Image) -> Image.Image:
    """The decoded image, turned upright."""
    image.load()
    turn = TURNS.get(orientation(image))
    return image if turn is None else image.transpose(turn)


def _layers(image: Image.Image, window: Window | Percentiles | None = None) -> _Layers:
    """RGB, and alpha if there is any, of a decoded image of 8 bits."""
    alpha = None
    if image.has_transparency_data:
        # Pillow cannot convert premultiplied gray (La) to RGBA directly.
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        alpha = image.getchannel("A")
    colours = image.convert("RGB")
    if window is not None:
        values = np.asarray(colours)
        colours = Image.fromarray(window.fitted(values).apply(values))
    return colours, alpha


def _composite(colours: Image.Image, alpha: Image.Image | None, background: str) -> Image.Image:
    if alpha is None:
        return colours
    canvas = Image.new("RGB", colours.size, background)
    canvas.paste(colours, mask=alpha)
    return canvas
