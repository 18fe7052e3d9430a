"""Encoded images to test with, also of kinds that Pillow does not write."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (20, 30, 4), dtype=np.uint16)
# Black and white, which a lossy encoder keeps apart.
BLOCKS = np.kron(RNG.integers(0, 2, (3, 4, 1), dtype=np.uint8) * 255, np.ones((16, 16, 3), dtype=np.uint8))
# Hidden, opaque, and 40 % opaque.
COLOURS = np.array([[[200, 100, 50, 0], [200, 100, 50, 255], [200, 100, 50, 102]]], dtype=np.uint8)
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "F")
ORIENTATION, SUBFILE = 274, 254
# What a viewer shows of the rows and columns that a file stores, by orientation (EXIF 2.32, 4.6.4).
UPRIGHT = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: np.rot90(stored),
}


def encoded(image, form, **options) -> bytes:
    buffer = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(values, colour: int, *before: bytes, after: bytes = b"", bits: int = 16) -> bytes:
    """A PNG of a colour type that Pillow does not write. values: [H, W] or [H, W, C]."""
    height, width = values.shape[:2]
    kind = ">u2" if bits == 16 else "u1"
    rows = b"".join(b"\0" + row.astype(kind).tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = [chunk(b"IHDR", header), *before, chunk(b"IDAT", zlib.compress(rows)), after, chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def tiff(values, *more: tuple[int, int, int], photometric: int = 2, orders: str = "<") -> bytes:
    """An uncompressed TIFF [H, W, C] of 16 bits. more: tags of a kind, with their one value; 3 is a short."""
    height, width, channels = values.shape
    pixels = values.astype(f"{orders}u2").tobytes()
    depths = struct.pack(f"{orders}{channels}H", *[16] * channels)
    place = 8 + len(pixels)
    tags = [
        (256, 3, 1, width),
        (257, 3, 1, height),
        (258, 3, channels, 16 if channels == 1 else place),
        (259, 3, 1, 1),
        (262, 3, 1, photometric),
        (273, 4, 1, 8),
        (277, 3, 1, channels),
        (278, 3, 1, height),
        (279, 4, 1, len(pixels)),
        *((tag, kind, 1, value) for tag, kind, value in more),
    ]
    entries = [
        struct.pack(f"{orders}HHI", tag, kind, count)
        + struct.pack(f"{orders}{'H2x' if kind == 3 and count == 1 else 'I'}", value)
        for tag, kind, count, value in sorted(tags)
    ]
    directory = struct.pack(f"{orders}H", len(entries)) + b"".join(entries) + bytes(4)
    mark = b"II*\0" if orders == "<" else b"MM\0*"
    return mark + struct.pack(f"{orders}I", place + len(depths)) + pixels + depths + directory


def in_mode(mode: str) -> Image.Image:
    """A picture of noise, 53 by 37 pixels, in one of `MODES`."""
    whole = Image.fromarray(np.random.default_rng(1).integers(0, 256, (37, 53, 4), dtype=np.uint8))
    match mode:
        case "I;16":
            return Image.fromarray(np.random.default_rng(1).integers(0, 65536, (37, 53), dtype=np.uint16))
        case "LAB":
            return Image.frombytes("LAB", whole.size, whole.convert("RGB").tobytes())
        case "PA":
            palette = whole.convert("RGB").convert("P")
            palette.putalpha(whole.getchannel("A"))
            return palette
        case "HSV" | "YCbCr" | "RGBX" | "CMYK":
            return whole.convert("RGB").convert(mode)
        case _:
            return whole.convert(mode)


def stack() -> list[Image.Image]:
    """Three pages of one size."""
    return [Image.fromarray(np.roll(PIXELS, shift, axis=1)) for shift in range(3)]


def pages(form: str, **options) -> bytes:
    """`stack` as one file."""
    first, *others = stack()
    return encoded(first, form, save_all=True, append_images=others, **options)
