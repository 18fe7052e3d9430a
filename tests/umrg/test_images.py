"""How images are decoded: upright and opaque; and the same pixels as vLLM's own loader gives."""

import io
import itertools
import struct
import warnings
from collections.abc import Iterator
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tests.encoded_images import (
    BLOCKS,
    COLOURS,
    DEEP,
    MODES,
    PIXELS,
    UPRIGHT,
    chunk,
    encoded,
    in_mode,
    pages,
    png,
    tiff,
    turned,
)
from umrg.frames import Size
from umrg.images import decode_image, decode_mask, image_size
from umrg.windowing import Window

# Orientation


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP", "JPEG", "AVIF"])
def test_an_image_is_upright_and_so_is_its_size(form, orientation):
    file = encoded(BLOCKS, form, exif=turned(orientation), quality=100)
    upright = UPRIGHT[orientation](BLOCKS)
    found = decode_image(file, "the image")
    assert found.shape == upright.shape
    assert np.abs(found.astype(int) - upright).max() < 60
    assert image_size(file, "the image") == Size(upright.shape[1], upright.shape[0])
    assert np.array_equal(decode_mask(file, "the mask"), upright[..., 0] >= 128)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_every_mode_is_turned(mode):
    file = encoded(Image.fromarray(PIXELS).convert(mode), "TIFF", exif=turned(6))
    plain = decode_image(encoded(Image.fromarray(PIXELS).convert(mode), "TIFF"), "the image")
    assert np.array_equal(decode_image(file, "the image"), np.rot90(plain, -1))


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_png_may_say_its_orientation_before_or_after_its_pixels(where):
    exif = chunk(b"eXIf", turned(8).tobytes()[6:])
    file = png(PIXELS, 2, *([exif] if where == "before" else []), after=exif if where == "after" else b"", bits=8)
    assert image_size(file, "the image") == Size(20, 30)
    assert np.array_equal(decode_image(file, "the image"), np.rot90(PIXELS))


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_an_orientation_in_xmp_counts_where_exif_has_none(form):
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    text = PngInfo()
    text.add_itxt("XML:com.adobe.xmp", xmp.decode())
    file = encoded(PIXELS[..., 0], form, pnginfo=text, xmp=xmp, lossless=True)
    assert image_size(file, "the image") == Size(20, 30)
    assert np.array_equal(decode_image(file, "the image")[..., 0], np.rot90(PIXELS[..., 0], -1))


def test_the_size_is_read_without_decoding_pixels(monkeypatch):
    files = [encoded(PIXELS, form, exif=turned(6)) for form in ("PNG", "JPEG", "TIFF", "WEBP")]
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)
    assert {image_size(file, "the image") for file in files} == {Size(20, 30)}


def test_an_exif_block_that_cannot_be_read_turns_nothing():
    file = encoded(PIXELS, "PNG", exif=b"Exif\0\0nonsense")
    assert np.array_equal(decode_image(file, "the image"), PIXELS)
    assert image_size(file, "the image") == Size(30, 20)


# Transparency

ON_WHITE = [[255, 255, 255], [200, 100, 50], [233, 193, 173]]


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP", "TGA"])
def test_transparent_colours_lie_on_white(form):
    file = encoded(COLOURS, form, lossless=True, exact=True)
    assert decode_image(file, "the image")[0].tolist() == ON_WHITE


@pytest.mark.parametrize(("mode", "form"), [("LA", "PNG"), ("LA", "TIFF"), ("LA", "TGA"), ("PA", "TIFF")])
def test_transparent_gray_lies_on_white(mode, form):
    gray = Image.fromarray(COLOURS[..., 0]).convert(mode[0])
    gray.putalpha(Image.fromarray(COLOURS[..., 3]))
    assert gray.mode == mode
    assert decode_image(encoded(gray, form), "the image")[0].tolist() == [[255] * 3, [200] * 3, [233] * 3]


def test_what_is_multiplied_with_alpha_already_lies_on_white_too():
    gray = Image.fromarray(COLOURS[..., [0, 3]], mode="LA")
    premultiplied = gray.convert("La").tobytes()
    file = encoded(gray, "TIFF").replace(gray.tobytes(), premultiplied)
    # ExtraSamples: 2 is alpha by itself, 1 is alpha that the colours are multiplied with.
    file = file.replace(struct.pack("<HHIHH", 338, 3, 1, 2, 0), struct.pack("<HHIHH", 338, 3, 1, 1, 0))
    assert Image.open(io.BytesIO(file)).mode == "La"
    levels = decode_image(file, "the image")[0, :, 0].tolist()
    assert levels[:2] == [255, 200] and abs(levels[2] - 233) <= 1


def test_a_colour_that_a_png_declares_transparent_is_white():
    gray = np.array([[0, 100, 200]], dtype=np.uint8)
    assert decode_image(encoded(gray, "PNG", transparency=100), "the image")[0, :, 0].tolist() == [0, 255, 200]
    rgb = np.stack([gray] * 3, axis=-1)
    found = decode_image(encoded(rgb, "PNG", transparency=(100, 100, 100)), "the image")
    assert found[0, :, 0].tolist() == [0, 255, 200]
    palette = Image.fromarray(gray // 100).convert("P")
    palette.putpalette([10, 10, 10, 20, 20, 20, 30, 30, 30])
    found = decode_image(encoded(palette, "PNG", transparency=bytes([255, 0, 128])), "the image")
    assert found[0, :, 0].tolist() == [10, 255, 142]
    assert decode_image(encoded(palette, "GIF", transparency=1), "the image")[0, :, 0].tolist() == [10, 255, 30]


def test_a_transparent_pixel_of_a_mask_is_background():
    white = np.full((1, 3, 4), 255, dtype=np.uint8)
    white[0, :, 3] = 0, 255, 100
    assert decode_mask(encoded(white, "PNG"), "the mask").tolist() == [[False, True, False]]
    gray = Image.fromarray(white[..., [0, 3]], mode="LA")
    assert decode_mask(encoded(gray, "TIFF"), "the mask").tolist() == [[False, True, False]]
    keyed = encoded(np.array([[0, 255, 200]], dtype=np.uint8), "PNG", transparency=255)
    assert decode_mask(keyed, "the mask").tolist() == [[False, False, True]]


# vLLM's own loader

FORMS = ("PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP", "JPEG2000", "AVIF", "PPM", "QOI", "SGI", "PCX", "TGA", "MPO")
REFUSED = {
    *(("I", form) for form in ("PPM", "TIFF")),
    *(("I;16", form) for form in ("PNG", "TIFF", "JPEG2000", "PPM")),
    *(("F", form) for form in ("TIFF", "PPM")),
}
# vLLM takes a palette's own alpha into account only where it stands in a PNG's chunk.
ON_WHITE_HERE = {("P", "TGA")}


def written() -> Iterator[tuple[str, str, bytes]]:
    """Every mode in every format that Pillow writes it in."""
    for mode, form in itertools.product(MODES, FORMS):
        with suppress(OSError, ValueError):
            yield mode, form, encoded(in_mode(mode), form)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("mode", "form", "file"), [pytest.param(*case, id=f"{case[0]}-{case[1]}") for case in written()]
)
def test_the_pixels_are_those_of_vllms_loader(mode, form, file):
    loader = pytest.importorskip("vllm.multimodal.media.image").ImageMediaIO()
    if (mode, form) in REFUSED:
        with pytest.raises(ValueError, match="has more than 8 bits a channel"):
            decode_image(file, "the image")
        return
    theirs = np.asarray(loader.load_bytes(file).media)
    assert np.array_equal(decode_image(file, "the image"), theirs) == ((mode, form) not in ON_WHITE_HERE)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize(("mode", "form"), [("RGB", "JPEG"), ("RGBA", "PNG"), ("LA", "TIFF"), ("RGBA", "WEBP")])
def test_vllms_loader_turns_alike(mode, form, orientation):
    loader = pytest.importorskip("vllm.multimodal.media.image").ImageMediaIO()
    file = encoded(in_mode(mode), form, exif=turned(orientation))
    assert np.array_equal(decode_image(file, "the image"), np.asarray(loader.load_bytes(file).media))


# Whatever bytes

SEEDS = [
    encoded(PIXELS, "PNG", exif=turned(6)),
    encoded(in_mode("P"), "PNG"),
    encoded(PIXELS, "JPEG", exif=turned(3)),
    encoded(PIXELS, "TIFF", exif=turned(6)),
    encoded(in_mode("RGBA"), "WEBP"),
    pages("GIF"),
    pages("PNG"),
    pages("TIFF"),
    pages("MPO"),
    encoded(PIXELS, "BMP"),
    encoded(PIXELS, "JPEG2000"),
    encoded(PIXELS, "AVIF"),
    encoded(PIXELS, "PPM"),
    encoded(in_mode("RGBA"), "TGA"),
    png(DEEP[..., :3], 2),
    tiff(DEEP[..., :3]),
    encoded(DEEP[..., 0], "TIFF"),
]


@st.composite
def damaged(draw) -> bytes:
    """An encoded image with bytes changed, mostly in its header, and perhaps cut short."""
    content = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(0, 8))):
        reach = draw(st.sampled_from([64, 256, len(content)]))
        content[draw(st.integers(0, min(reach, len(content)) - 1))] = draw(st.integers(0, 255))
    return bytes(content[: draw(st.sampled_from([len(content), len(content), draw(st.integers(0, len(content)))]))])


@settings(max_examples=400, deadline=None)
@given(damaged(), st.sampled_from([None, Window(30000, 20000)]), st.sampled_from([None, 0, 1]))
def test_damaged_bytes_give_pixels_or_a_sentence(content, window, frame):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            size = image_size(content, "the image") if frame is None else None
            pixels = decode_image(content, "the image", window=window, frame=frame)
        except ValueError as error:
            assert str(error).startswith("the image ")
            return
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
    assert size is None or pixels.shape[:2] == (size.height, size.width)


@settings(deadline=None)
@given(st.binary(max_size=400))
def test_bytes_of_any_kind_are_no_image(content):
    with pytest.raises(ValueError, match=r"the image (cannot be decoded|has)"):
        decode_image(content, "the image")
