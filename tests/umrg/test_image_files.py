"""Files with several pages, files that are no images, files that are too large: what is said of them."""

import io
import struct

import numpy as np
import pytest
from PIL import Image
from PIL.TiffImagePlugin import AppendingTiffWriter

from tests.encoded_images import DEEP, PIXELS, SUBFILE, UPRIGHT, encoded, in_mode, pages, png, stack, turned
from umrg.frames import Size
from umrg.images import decode_image, decode_mask, encode_png, image_size
from umrg.windowing import Window

STACK = [Image.fromarray(np.roll(PIXELS, shift, axis=1)) for shift in range(3)]


WINDOW = Window(32768, 65536)


def pages_of(file: bytes) -> int:
    """As Pillow counts them."""
    with Image.open(io.BytesIO(file)) as image:
        return int(getattr(image, "n_frames", 1))


@pytest.mark.parametrize("form", ["TIFF", "GIF", "PNG", "WEBP", "AVIF"])
def test_of_several_pages_one_must_be_named(form):
    known: dict[str, dict[str, object]] = {"WEBP": {"lossless": True}, "AVIF": {"quality": 100, "subsampling": "4:4:4"}}
    file = pages(form, **known.get(form, {}))
    for read in (decode_image, image_size, decode_mask):
        with pytest.raises(ValueError, match=r"the image has 3 pages; save the one .* counted from 0"):
            read(file, "the image")
    for number, page in enumerate(stack()):
        found = decode_image(file, "the image", frame=number).astype(int)
        assert np.abs(found - np.asarray(page)).mean() < (40 if form in ("GIF", "AVIF") else 1e-9)
    for number in (-1, 3):
        with pytest.raises(ValueError, match=rf"has 3 pages and no frame {number}; frames are counted from 0 to 2"):
            decode_image(file, "the image", frame=number)


def test_the_only_page_may_be_named():
    assert np.array_equal(decode_image(encode_png(PIXELS), "the image", frame=0), PIXELS)
    with pytest.raises(ValueError, match="has 1 page and no frame 1"):
        decode_image(encode_png(PIXELS), "the image", frame=1)


def test_pages_may_differ_in_size_mode_and_depth():
    first, *others = Image.fromarray(PIXELS), Image.fromarray(DEEP[:10, :, 0]), Image.new("LA", (5, 7))
    file = encoded(first, "TIFF", save_all=True, append_images=others)
    assert decode_image(file, "the image", frame=0).shape == (20, 30, 3)
    with pytest.raises(ValueError, match="more than 8 bits"):
        decode_image(file, "the image", frame=1)
    windowed = decode_image(file, "the image", frame=1, window=WINDOW)
    assert np.array_equal(windowed[..., 0], WINDOW.apply(DEEP[:10, :, 0]))
    assert (decode_image(file, "the image", frame=2) == np.full((7, 5, 3), 255)).all()


def test_each_page_has_an_orientation_of_its_own():
    buffer = io.BytesIO()
    with AppendingTiffWriter(buffer, new=True) as writer:
        for orientation in (1, 6, 3):
            Image.fromarray(PIXELS).save(writer, "TIFF", exif=turned(orientation))
            writer.newFrame()
    for frame, orientation in enumerate((1, 6, 3)):
        found = decode_image(buffer.getvalue(), "the image", frame=frame)
        assert np.array_equal(found, UPRIGHT[orientation](PIXELS))


def with_subfiles(*kinds: int) -> bytes:
    """A TIFF of a page a NewSubfileType, smaller and smaller."""
    buffer = io.BytesIO()
    with AppendingTiffWriter(buffer, new=True) as writer:
        for number, kind in enumerate(kinds, start=1):
            page = Image.fromarray(PIXELS).resize((30 // number, 20 // number))
            page.save(writer, "TIFF", tiffinfo={SUBFILE: kind})
            writer.newFrame()
    return buffer.getvalue()


def test_a_smaller_version_in_a_tiff_is_no_page():
    file = with_subfiles(0, 1, 5)
    assert pages_of(file) == 3
    assert np.array_equal(decode_image(file, "the image"), PIXELS)
    assert image_size(file, "the image") == Size(30, 20)
    assert decode_image(file, "the image", frame=1).shape == (10, 15, 3)
    with pytest.raises(ValueError, match="has 2 pages"):
        decode_image(with_subfiles(0, 2), "the image")  # 2: a page of several


def test_a_phones_picture_is_one_whatever_goes_along():
    thumbnail, gains = Image.fromarray(PIXELS).resize((15, 10)), Image.fromarray(PIXELS[..., 0])
    file = encoded(PIXELS, "MPO", save_all=True, append_images=[thumbnail, gains], quality=95)
    assert pages_of(file) == 3
    assert np.array_equal(
        decode_image(file, "the image"), decode_image(encoded(PIXELS, "JPEG", quality=95), "the image")
    )
    assert image_size(file, "the image") == Size(30, 20)


def test_two_pictures_alike_in_one_file_are_two():
    first, second, _ = stack()
    file = encoded(first, "MPO", save_all=True, append_images=[second])
    with pytest.raises(ValueError, match="has 2 pages"):
        decode_image(file, "the image")
    small = second.resize((15, 10))
    plain = encoded(stack()[0], "MPO", save_all=True, append_images=[small])
    assert image_size(plain, "the image") == Size(30, 20)
    # Of the index's 16-byte entries the second tells of the second picture: 0x020002 is one of a stereo pair.
    place = plain.index(struct.pack("<L", 0x030000), plain.index(b"MPF\0") + 50) + 16
    stereo = plain[:place] + struct.pack("<L", 0x020002) + plain[place + 4 :]
    with pytest.raises(ValueError, match="has 2 pages"):
        decode_image(stereo, "the image")
    assert decode_image(stereo, "the image", frame=1).shape == (10, 15, 3)


# What is no image


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "(the file is empty); write or download it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n", "a Git LFS pointer"),
        (
            b"<!DOCTYPE html><html><body>404</body></html>",
            "(a web page (HTML), not the file itself); download that again",
        ),
        (b"\n  <html lang='en'>", "a web page"),
        (b'<?xml version="1.0"?><svg/>', "such as SVG"),
        (bytes(128) + b"DICM" + bytes(80), "(DICOM); export the slice that is meant as PNG, windowed to 8 bits"),
        (struct.pack("<I", 348) + bytes(340) + b"n+1\0" + bytes(80), "(NIfTI); export the slice"),
        (b"\x1f\x8b\x08" + bytes(80), "(a gzip archive); unpack it, and if it is a volume, export the slice"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(80), "(a 7z archive); unpack it first"),
        (b"NRRD0004\n", "NRRD"),
        (b"ObjectType = Image\n", "MetaImage"),
        (b"\x00\x00\x00\x18ftypheic" + bytes(80), "(HEIC); save it as PNG, JPEG or TIFF"),
        (b"\x00\x00\x00\x18ftypisom" + bytes(80), "a film"),
        (b"PK\x03\x04" + bytes(80), "(a zip archive); unpack it"),
        (b"%PDF-1.7", "PDF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript"),
        (b"\xd7\xcd\xc6\x9a" + bytes(80), "it must be a PNG, JPEG, TIFF, WebP or the like"),
        (b"\x93NUMPY\x01\x00", "(a numpy array); export the slice"),
        (b"no picture", "(unknown format); it must be a PNG, JPEG, TIFF, WebP or the like"),
    ],
)
def test_what_is_no_image_is_named_and_so_is_the_remedy(content, said):
    for read in (decode_image, decode_mask, image_size):
        with pytest.raises(ValueError, match="the image of row 7 cannot be decoded") as raised:
            read(content, "the image of row 7")
        assert said in str(raised.value) and "0x" not in str(raised.value)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP", "JPEG2000", "AVIF"])
@pytest.mark.parametrize("share", [0.05, 0.2, 0.6])
def test_what_is_cut_short_says_what_it_was(form, share):
    whole = encoded(in_mode("RGB"), form)
    name = {"WEBP": "WebP", "JPEG2000": "JPEG 2000"}.get(form, form)
    with pytest.raises(ValueError, match=rf"cannot be decoded \(.*\); the {name} is damaged or cut short"):
        decode_image(whole[: max(12, int(len(whole) * share))], "the image")


def test_a_png_whose_line_ends_were_translated_is_damaged():
    with pytest.raises(ValueError, match="the PNG is damaged"):
        decode_image(encode_png(PIXELS).replace(b"\r\n", b"\n"), "the image")


def test_a_windowed_png_that_is_cut_short_is_refused():
    for whole in (png(DEEP[..., :3], 2), png(DEEP[..., 0], 0)):
        with pytest.raises(ValueError, match="the PNG is damaged or cut short"):
            decode_image(whole[:-400], "the image", window=WINDOW)


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 500)
    for pixels in (PIXELS, np.zeros((40, 30), dtype=np.uint8)):
        for read in (decode_image, decode_mask, image_size):
            with pytest.raises(ValueError, match="the image has more than 500 pixels; make it smaller"):
                read(encode_png(pixels), "the image")


def test_a_later_page_of_too_many_pixels_is_refused(monkeypatch):
    file = encoded(Image.new("L", (9, 9)), "TIFF", save_all=True, append_images=[Image.new("L", (90, 90))])
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 5000)
    with pytest.raises(ValueError, match="has more than 5000 pixels"):
        decode_image(file, "the image", frame=1)
