"""More than 8 bits a channel: refused, or windowed."""

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.encoded_images import COLOURS, DEEP, ORIENTATION, PIXELS, UPRIGHT, chunk, encoded, png, tiff, turned
from umrg.images import decode_image, decode_mask, encode_png, image_size
from umrg.mistake import Mistake
from umrg.windowing import Percentiles, Window

WINDOW = Window(30000, 20000)


@pytest.mark.parametrize(
    "file",
    [
        png(DEEP[..., 0], 0),
        png(DEEP[..., :3], 2),
        png(DEEP[..., :2], 4),
        png(DEEP, 6),
        tiff(DEEP[..., :3]),
        tiff(DEEP[..., :3], orders=">"),
        tiff(DEEP, (338, 3, 2)),
        encoded(DEEP[..., 0], "TIFF", compression="tiff_lzw"),
        encoded(DEEP[..., 0].astype(np.int32), "TIFF"),
        encoded(DEEP[..., 0].astype(np.float32), "TIFF"),
        encoded(DEEP[..., 0], "JPEG2000"),
        encoded(DEEP[..., 0].astype(np.int32), "PPM"),
        b"P6\n30 20\n1023\n" + bytes(30 * 20 * 6),
        b"P3\n2 1\n65535\n1 2 3 4 5 6\n",
        b"\x01\xda\x00\x02\x00\x03\x00\x1e\x00\x14\x00\x03" + bytes(500 + 30 * 20 * 6),
    ],
    ids=[
        "gray",
        "rgb",
        "la",
        "rgba",
        "tiff",
        "tiff-be",
        "tiff-rgba",
        "lzw",
        "i",
        "f",
        "jp2",
        "pgm",
        "ppm",
        "plain",
        "sgi",
    ],
)
def test_more_than_eight_bits_are_refused(file):
    with pytest.raises(ValueError, match=r"the image has more than 8 bits a channel \((10|16|32)\); window it"):
        decode_image(file, "the image")
    assert image_size(file, "the image").height in (1, 20)


def expected(values):
    """DICOM's LINEAR function, written out (PS3.3, C.11.2.1.2.1)."""
    centre, width = WINDOW.centre, WINDOW.width
    levels = ((values - (centre - 0.5)) / (width - 1) + 0.5) * 255
    levels[values <= centre - 0.5 - (width - 1) / 2] = 0
    levels[values > centre - 0.5 + (width - 1) / 2] = 255
    return np.rint(levels).astype(np.uint8)


def test_a_window_makes_gray_of_more_than_eight_bits():
    gray = expected(DEEP[..., 0])
    files = [png(DEEP[..., 0], 0), encoded(DEEP[..., 0], "TIFF"), encoded(DEEP[..., 0].astype(np.int32), "TIFF")]
    for file in [*files, encoded(DEEP[..., 0].astype(np.int32), "PPM")]:
        assert np.array_equal(decode_image(file, "the image", window=WINDOW), np.stack([gray] * 3, axis=-1))


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["png", "tiff", "png gray", "tiff gray"])
def test_what_is_windowed_is_upright(kind, orientation):
    exif = turned(orientation)
    file = {
        "png": lambda: png(DEEP[..., :3], 2, chunk(b"eXIf", exif.tobytes()[6:])),
        "tiff": lambda: tiff(DEEP[..., :3], (ORIENTATION, 3, orientation)),
        "png gray": lambda: png(DEEP[..., 0], 0, chunk(b"eXIf", exif.tobytes()[6:])),
        "tiff gray": lambda: encoded(DEEP[..., 0], "TIFF", exif=exif),
    }[kind]()
    values = np.stack([DEEP[..., 0]] * 3, axis=-1) if "gray" in kind else DEEP[..., :3]
    assert np.array_equal(decode_image(file, "the image", window=WINDOW), UPRIGHT[orientation](expected(values)))


def test_transparency_of_more_than_eight_bits_lies_on_white():
    values = np.array([[[30000, 30000, 30000, 0], [65535, 0, 30000, 65535]]], dtype=np.uint16)
    lit = [[255, 255, 255], [255, 0, 128]]
    for file in (png(values, 6), tiff(values, (338, 3, 2))):
        assert decode_image(file, "the image", window=WINDOW)[0].tolist() == lit
    assert decode_image(png(values[..., 2:], 4), "the image", window=WINDOW)[0].tolist() == [[255] * 3, [128] * 3]
    keyed = png(values[..., 0], 0, chunk(b"tRNS", struct.pack(">H", 30000)))
    assert decode_image(keyed, "the image", window=WINDOW)[0].tolist() == [[255] * 3, [255] * 3]
    keyed = png(values[..., :3], 2, chunk(b"tRNS", struct.pack(">HHH", 30000, 30000, 30000)))
    assert decode_image(keyed, "the image", window=WINDOW)[0].tolist() == lit


def test_a_fourth_channel_that_is_not_alpha_is_left_out():
    found = decode_image(tiff(DEEP, (338, 3, 0)), "the image", window=WINDOW)
    assert np.array_equal(found, expected(DEEP[..., :3]))


@pytest.mark.parametrize(
    "file",
    [tiff(DEEP, (338, 3, 1)), tiff(DEEP, photometric=5), tiff(DEEP[..., :3], (284, 3, 2))],
    ids=["premultiplied", "cmyk", "planes"],
)
def test_values_that_are_out_of_reach_are_refused(file):
    with pytest.raises(ValueError, match="the image has values that cannot be windowed here"):
        decode_image(file, "the image", window=WINDOW)


def test_values_in_other_units_are_windowed_as_they_are_stored():
    hounsfield = np.array([[-1000, -160, 40, 240, 3000]], dtype=np.int32)
    soft_tissue = Window.parse("40,400")
    assert decode_image(encoded(hounsfield, "TIFF"), "ct", window=soft_tissue)[0, :, 0].tolist() == [
        0,
        0,
        128,
        255,
        255,
    ]
    shares = np.array([[0, 0.25, 0.5, 1, np.nan, np.inf]], dtype=np.float32)
    found = decode_image(encoded(shares, "TIFF"), "map", window=Window(0.5, 1))
    assert found[0, :, 0].tolist() == [0, 64, 128, 255, 0, 255]
    ten_bits = b"P5\n3 1\n1023\n" + struct.pack(">3H", 0, 511, 1023)
    assert decode_image(ten_bits, "x-ray", window=Window(512, 1024))[0, :, 0].tolist() == [0, 127, 255]


def test_a_tiff_whose_zero_is_white_is_windowed_and_inverted():
    plain = tiff(DEEP[..., :1], photometric=1)
    inverted = tiff(DEEP[..., :1], photometric=0)
    found = [decode_image(file, "the image", window=WINDOW) for file in (plain, inverted)]
    assert np.array_equal(found[1], 255 - found[0])


def test_a_window_works_on_eight_bits_too():
    assert np.array_equal(decode_image(encode_png(PIXELS), "the image", window=Window(128, 256)), PIXELS)
    ramp = np.arange(256, dtype=np.uint8)[None]
    found = decode_image(encode_png(ramp), "the image", window=Window(100, 50))[0, :, 0]
    assert found[75] == 0 and found[124] == 255 and (np.diff(found.astype(int)) >= 0).all()
    # Alpha is no brightness, and what lies under the image stays white.
    found = decode_image(encoded(COLOURS, "PNG"), "the image", window=Window(250, 2))
    assert found[0].tolist() == [[255] * 3, [0] * 3, [153] * 3]


@pytest.mark.parametrize("text", ["", "40", "40,", "40,400,1", "a,b", "40;400", "nan,400", "40,0", "40,-1", "40,inf"])
def test_a_window_that_says_nothing_is_refused(text):
    with pytest.raises(ValueError, match="the window"):
        Window.parse(text)


def test_a_width_of_one_divides_black_from_white():
    assert Window(5, 1).apply(np.arange(3, 8, dtype=np.uint8)).tolist() == [0, 0, 255, 255, 255]
    assert Window(5, 1).apply(np.arange(3, 8, dtype=np.int32)).tolist() == [0, 0, 255, 255, 255]


@given(st.floats(-70000, 70000), st.floats(0.1, 140000), st.lists(st.integers(0, 65535), min_size=2, max_size=9))
def test_levels_rise_with_values_whatever_their_type(centre, width, values):
    window, ordered = Window(centre, width), np.sort(np.array(values))
    levels = window.apply(ordered.astype(np.uint16))
    assert (np.diff(levels.astype(int)) >= 0).all()
    assert np.array_equal(levels, window.apply(ordered.astype(np.int32)))


# Percentiles


@pytest.mark.parametrize(
    "text", ["p1", "p1,99", "1,p99", "p99,p1", "p5,p5", "p-1,p99", "p1,p101", "pnan,p99", "p1,p99,p2", "p,p9", "p1;p2"]
)
def test_percentiles_that_say_nothing_are_refused(text):
    with pytest.raises(ValueError, match="the window"):
        Window.parse(text)


def test_percentiles_are_those_of_the_stored_values():
    hounsfield = np.arange(-1000, 1001, dtype=np.int32).reshape(3, 667)
    assert Window.parse("p10,p90") == Window.parse(" p10 , p90 ") == Percentiles(10, 90)
    # 10 % of the values lie below -800, and 10 % above 800.
    assert Percentiles(10, 90).fitted(hounsfield) == Window(0.5, 1601)
    assert Percentiles(10, 90).fitted(hounsfield.astype(np.float32)) == Window(0, 1600)
    found = decode_image(encoded(hounsfield, "TIFF"), "ct", window=Window.parse("p10,p90"))
    assert np.array_equal(found, decode_image(encoded(hounsfield, "TIFF"), "ct", window=Window(0.5, 1601)))
    assert found.min() == 0 and found.max() == 255


@pytest.mark.parametrize("file", [png(DEEP[..., :3], 2), tiff(DEEP[..., :3]), tiff(DEEP[..., :3], orders=">")])
def test_colours_share_one_window_of_percentiles(file):
    window = Percentiles(5, 95).fitted(DEEP[..., :3])
    found = decode_image(file, "the image", window=Percentiles(5, 95))
    assert np.array_equal(found, window.apply(DEEP[..., :3]))


def test_percentiles_stretch_eight_bits_too():
    dim = np.arange(100, 120, dtype=np.uint8)[None]
    found = decode_image(encode_png(dim), "the image", window=Percentiles(0, 100))[0, :, 0]
    assert found[0] == 0 and found[-1] == 255


def test_what_is_not_finite_has_no_rank():
    values = np.array([[np.nan, -np.inf, 1, 2, 3, np.inf]], dtype=np.float32)
    assert Percentiles(0, 100).fitted(values) == Window(2, 2)
    with pytest.raises(Mistake, match=r"^the image has no finite values"):
        decode_image(encoded(values[:, :2], "TIFF"), "map", window=Percentiles(0, 100))


NUMBERS = st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=40).map(lambda found: np.array([found], "i4"))
FRACTIONS = st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=40).map(
    lambda found: np.array([[*found, np.inf, -np.inf]], "f4")
)
RANKS = st.tuples(st.floats(0, 100), st.floats(0, 100)).filter(lambda ranks: ranks[0] < ranks[1])


@given(st.one_of(NUMBERS, FRACTIONS), RANKS)
def test_what_lies_beyond_the_percentiles_is_black_and_white(values, ranks):
    levels = Percentiles(*ranks).fitted(values).apply(values)
    low, high = np.percentile(values[np.isfinite(values)], ranks, method="nearest")
    assert (levels[values < low] == 0).all() and (levels[values > high] == 255).all()
    ordered = np.argsort(values, axis=None)
    assert (np.diff(levels.ravel()[ordered].astype(int)) >= 0).all()


@given(st.integers(0, 255), st.lists(st.integers(0, 255), min_size=1, max_size=5), st.sampled_from(["u1", "i4", "f4"]))
def test_where_both_percentiles_are_one_value_what_lies_above_is_white(common, others, kind):
    values = np.array([[common] * 600 + others], dtype=kind)
    levels = Percentiles(10, 90).fitted(values).apply(values)
    assert np.array_equal(levels, np.where(values > common, 255, 0))


def test_a_gray_mask_may_have_more_bits_but_not_colours():
    values = np.array([[0, 127, 128, 255, 65535]], dtype=np.uint16)
    for file in (encoded(values, "PNG"), encoded(values, "TIFF"), encoded(values.astype(np.float32), "TIFF")):
        assert decode_mask(file, "the mask").tolist() == [[False, False, True, True, True]]
    with pytest.raises(ValueError, match="the mask has colours of more than 8 bits"):
        decode_mask(png(DEEP[..., :3], 2), "the mask")
