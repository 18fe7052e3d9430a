"""A sample's image and mask, and what is said of damaged ones."""

import hashlib
import random
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tests.encoded_images import UPRIGHT, encoded, turned
from umrg.frames import Size
from umrg.images import decode_image, decode_mask, encode_png
from umrg.sample import Sample

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def mask(*rows: int) -> np.ndarray:
    pixels = np.zeros((20, 30), dtype=np.bool_)
    pixels[list(rows)] = True
    return pixels


def stored(pixels: np.ndarray, orientation: int) -> bytes:
    return encoded(Image.fromarray(pixels), "PNG", exif=turned(orientation))


def sample(image: bytes | None = None, *masks: bytes) -> Sample:
    return Sample(
        id="ct-7",
        query="Which organ filters blood?",
        image_bytes=encode_png(PIXELS) if image is None else image,
        mask_bytes=masks,
        box=(0, 0, 29, 19),
        points=((5, 5), (20, 10)),
        supercategory="abdomen",
        category="kidney",
        modality="ct",
    )


def test_an_image_is_read_as_it_was_written() -> None:
    assert sample().size == Size(30, 20)
    assert np.array_equal(sample().image(), PIXELS)


def test_rows_that_share_an_image_file_share_its_key() -> None:
    one, other = sample(), sample(None, encode_png(mask(1)))
    assert one.image_key == other.image_key == hashlib.sha256(one.image_bytes).hexdigest()
    assert sample(encode_png(PIXELS[::-1])).image_key != one.image_key
    # A row without its files has another, and not that of the row that it was made of.
    assert replace(one, image_bytes=b"").image_key == hashlib.sha256(b"").hexdigest()


def test_a_mask_is_read_as_it_was_written() -> None:
    assert np.array_equal(sample(None, encode_png(mask(3, 4))).mask(), mask(3, 4))


def test_the_parts_of_a_mask_are_joined() -> None:
    parts = sample(None, encode_png(mask(1)), encode_png(mask(5, 6)))
    assert np.array_equal(parts.mask(), mask(1, 5, 6))


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK"])
def test_images_of_any_mode_become_rgb(mode: str) -> None:
    image = decode_image(encoded(Image.new(mode, (30, 20)), "TIFF"), "the image")
    assert image.shape == (20, 30, 3) and image.dtype == np.uint8


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_an_image_of_more_than_eight_bits_is_refused_rather_than_clipped(dtype: type) -> None:
    deep = encoded(Image.fromarray(np.full((20, 30), 3000, dtype=dtype)), "TIFF")
    with pytest.raises(ValueError, match=r"sample 'ct-7' has more than 8 bits a channel .*; window it"):
        sample(deep).image()


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_image_is_named(content: bytes) -> None:
    broken = sample(content, encode_png(mask(1)))
    for read in (lambda: broken.size, broken.image, broken.mask):
        with pytest.raises(ValueError, match="the image of sample 'ct-7' cannot be decoded"):
            read()


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_a_truncated_image_is_named(form: str) -> None:
    whole = encoded(Image.fromarray(PIXELS), form)
    cut = sample(whole[: len(whole) * 2 // 3])
    assert cut.size == Size(30, 20)  # the header is whole
    with pytest.raises(ValueError, match=r"the image of sample 'ct-7' cannot be decoded .*cut short"):
        cut.image()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF"])
def test_damaged_bytes_give_pixels_or_a_clear_error(form: str) -> None:
    rng, whole = random.Random(form), encoded(Image.fromarray(PIXELS), form)
    failures = 0
    for _ in range(500):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[rng.randrange(200)] = rng.randrange(256)
        try:
            decode_image(bytes(damaged), "the image")
        except ValueError as error:
            assert str(error).startswith("the image ")
            failures += 1
    assert failures > 0


def test_a_sample_without_a_mask_says_so() -> None:
    with pytest.raises(ValueError, match="'ct-7' has no mask"):
        sample().mask()


def test_a_damaged_mask_is_named() -> None:
    with pytest.raises(ValueError, match="the mask of sample 'ct-7' cannot be decoded"):
        sample(None, b"oops").mask()
    with pytest.raises(ValueError, match=r"the mask .* cut short"):
        decode_mask(encode_png(mask(1))[:-30], "the mask")


def test_a_mask_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="mask of sample 'ct-7' is 20x30 px, its image 30x20"):
        sample(None, encode_png(mask(1).T)).mask()


def test_image_and_mask_lie_upon_each_other_whichever_way_they_are_stored() -> None:
    marked = np.zeros((20, 30), dtype=np.bool_)
    marked[3:9, 12:29] = True
    picture = np.where(marked[..., None], 200, 40).astype(np.uint8).repeat(3, axis=2)
    for orientation, upright in UPRIGHT.items():
        whole = sample(stored(picture, orientation), encode_png(upright(marked)))
        assert whole.size == Size(*upright(marked).shape[::-1])
        assert np.array_equal(whole.image()[..., 0] == 200, whole.mask())
        assert np.array_equal(sample(stored(picture, orientation), stored(marked, orientation)).mask(), whole.mask())
