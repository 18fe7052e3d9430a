"""Properties of encoded image files before they are decoded: format, bit depth, pages and orientation.

Only `opened` passes bytes to Pillow. It also makes the messages that tell users how to mend a file that cannot be read.
"""

import io
import re
import struct
import warnings
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from umrg.foreign_files import FOREIGN_FILES, GZIP, HDF5, NUMPY, ZIP, ForeignFile
from umrg.mistake import Mistake

# Pillow's readers of still images that decode within this process. Excluded are formats that need other programs (EPS,
# WMF, HDF5, GRIB), videos, and collections of icons, layers or textures, which have no single main image.
FORMATS = (
    "PNG",
    "JPEG",
    "TIFF",
    "WEBP",
    "BMP",
    "GIF",
    "JPEG2000",
    "AVIF",
    "PPM",
    "QOI",
    "SGI",
    "SUN",
    "PCX",
    "TGA",
)

# The exceptions that Pillow's readers raise for damaged files.
UNDECODABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

# The transposition that makes pixels of a stored orientation upright (EXIF 2.32, 4.6.4).
TURNS: dict[object, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)  # orientations that exchange width and height
_REDUCED, _MASK = 1, 4  # bits of TIFF's NewSubfileType for pages that are not images of their own
_OLD_REDUCED = 2  # the same in the older tag SubfileType

_PREFIXES = {
    "PNG": rb"\x89PNG",
    "JPEG": rb"\xff\xd8\xff",
    "TIFF": rb"II[*+]\x00|MM\x00[*+]",
    "WebP": rb"RIFF....WEBP",
    "GIF": rb"GIF8",
    "BMP": rb"BM",
    "JPEG 2000": rb"\xff\x4f\xff\x51|\x00\x00\x00\x0cjP  ",
    "AVIF": rb"....ftypavi[fs]",
}
_AS_PICTURE = "save it as PNG, JPEG or TIFF"
_AS_SLICE = "export the slice that is meant as PNG, windowed to 8 bits"
_UNREAD_FORMATS = (
    (rb"(\xef\xbb\xbf)?\s*<(?i:\?xml|svg|!--)", "an XML text, such as SVG", _AS_PICTURE),
    (rb".{128}DICM|\x08\x00\x05\x00", "DICOM", _AS_SLICE),
    (rb".{344}n[i+]1\x00", "NIfTI", _AS_SLICE),
    (rb"NRRD", "NRRD", _AS_SLICE),
    (rb"(ObjectType|NDims) *=", "MetaImage", _AS_SLICE),
    # HEIC comes before videos, because both are ISO base media files that differ in their brand.
    (rb"....ftyp(hei|hev|mif1|msf1)", "HEIC", _AS_PICTURE),
    (rb"....ftyp|\x1aE\xdf\xa3|RIFF....AVI ", "a film", "save the frame that is meant as PNG"),
    (rb"\xff\x0a|\x00\x00\x00\x0cJXL ", "JPEG XL", _AS_PICTURE),
    (rb"%PDF", "PDF", _AS_PICTURE),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "PostScript", _AS_PICTURE),
    (rb"8BPS", "Photoshop", _AS_PICTURE),
    (rb"\x00\x00[\x01\x02]\x00", "an icon", _AS_PICTURE),
)
_NOT_READ = (
    *(ForeignFile(pattern=pattern, name=name, remedy=remedy) for pattern, name, remedy in _UNREAD_FORMATS),
    *FOREIGN_FILES,
)
"""Files that users may pass as images and that are not supported. Image formats come first, so that an XML text is
called an SVG here, although `FOREIGN_FILES` calls it a web page."""
_REMEDIES = {
    ZIP: "unpack it",
    GZIP: f"unpack it, and if it is a volume, {_AS_SLICE}",
    HDF5: _AS_SLICE,
    NUMPY: _AS_SLICE,
}
"""Remedies for the kinds of `FOREIGN_FILES` that may contain the image, in place of their general remedies."""


class ImageRefused(Mistake):
    """A file that cannot be used as an image; the message says what to change."""


@contextmanager
def opened(
    encoded: bytes, what: str, frame: int | None = None, formats: Collection[str] = FORMATS
) -> Iterator[ImageFile.ImageFile]:
    """An encoded image, opened but not decoded. Errors while it is decoded within the context become ImageRefused too.

    what: the image's name in messages. frame: the page to open, counted from 0. formats: those of `FORMATS` that are
    read.
    Raises ImageRefused if the file is not an image, is damaged, has more pixels than Pillow's limit, or has several
    pages and no frame is given. Pillow's warnings, about unreadable texts and profiles, do not concern the pixels and
    are ignored.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(encoded), formats=tuple(formats)) as image:
                # To go to a page of a PNG is to decode those before it.
                _check_pixels(image)
                _choose_page(image, what, frame)
                _check_pixels(image)
                yield image
    except Mistake:
        raise
    except Image.DecompressionBombError as error:
        limit = f"has more than {Image.MAX_IMAGE_PIXELS} pixels"
        raise ImageRefused(f"{what} {limit}; make it smaller, or crop the part that is meant") from error
    except UnidentifiedImageError as error:
        raise ImageRefused(f"{what} cannot be decoded {_not_opened(encoded, formats)}") from error
    except UNDECODABLE as error:
        reason = str(error) or type(error).__name__
        raise ImageRefused(f"{what} cannot be decoded ({reason}); {_broken(encoded)}") from error


def _check_pixels(image: Image.Image) -> None:
    if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError


def _not_opened(encoded: bytes, formats: Collection[str]) -> str:
    """The kind of a file that no reader accepts, and what to do about it."""
    if not encoded:
        return "(the file is empty); write or download it again"
    if (known := _kind(encoded)) is not None:
        if known.upper().replace(" ", "") not in formats:
            return f"({known}, which is not read here); {_AS_PICTURE}"
        return f"(its header cannot be read); {_broken(encoded)}"
    for kind in _NOT_READ:
        if kind.matches(encoded):
            return f"({kind.name}); {_REMEDIES.get(kind, kind.remedy)}"
    return f"(unknown format); {_broken(encoded)}"


def _kind(encoded: bytes) -> str | None:
    """The image format that the file's first bytes announce."""
    return next((name for name, prefix in _PREFIXES.items() if re.match(prefix, encoded, re.DOTALL)), None)


def _broken(encoded: bytes) -> str:
    match _kind(encoded):
        case None:
            return "it must be a PNG, JPEG, TIFF, WebP or the like"
        case "JPEG" | "TIFF" as kind:
            # Pillow does not read lossless JPEG, nor TIFF in floating point of a width other than 32 bits.
            return f"the {kind} is damaged or cut short, or of a kind that is not read here; save it as PNG"
        case kind:
            return f"the {kind} is damaged or cut short; write or download it again"


def _choose_page(image: ImageFile.ImageFile, what: str, frame: int | None) -> None:
    """Go to the given page or, if none is given, check that there is only one."""
    count = int(getattr(image, "n_frames", 1))
    if frame is None:
        if count > 1 and _several(image, count):
            raise ImageRefused(
                f"{what} has {count} pages; save the one that is meant (`ground` and the service take a frame, counted "
                "from 0)"
            )
    elif not 0 <= frame < count:
        pages = "1 page" if count == 1 else f"{count} pages"
        raise ImageRefused(f"{what} has {pages} and no frame {frame}; frames are counted from 0 to {count - 1}")
    elif count > 1:
        image.seek(frame)


def _several(image: ImageFile.ImageFile, count: int) -> bool:
    """Whether any page after the first is an image of its own, rather than an auxiliary of the first: a smaller version
    or a transparency mask in a TIFF, a preview or a gain map in a phone's MPO."""
    if image.format == "MPO":
        return any(_is_view(image, page) for page in range(1, count))
    if isinstance(image, TiffImageFile):
        return any(_is_page(image, page) for page in range(1, count))
    return True


def _is_page(image: TiffImageFile, page: int) -> bool:
    try:
        image.seek(page)
        tags = image.tag_v2
        new, old = tags.get(ExifTags.Base.NewSubfileType, 0), tags.get(ExifTags.Base.SubfileType, 0)
    finally:
        image.seek(0)
    return not (new & (_REDUCED | _MASK) or old == _OLD_REDUCED)


def _is_view(image: ImageFile.ImageFile, page: int) -> bool:
    """Whether a page of an MPO (CIPA DC-007) is an image of its own: it is declared as one of several, or it has no
    declared type and the size and mode of the first."""
    kind: str = image.mpinfo[0xB002][page]["Attribute"]["MPType"]  # type: ignore[attr-defined]
    first = (image.size, image.mode)
    try:
        image.seek(page)
        alike = (image.size, image.mode) == first
    finally:
        image.seek(0)
    return kind.startswith("Multi-Frame") or (kind == "Undefined" and alike)


def depth(image: ImageFile.ImageFile, encoded: bytes) -> int:
    """Bits per channel in the file. They are read from the file, because Pillow silently reduces 16-bit colours to 8.

    image: `encoded`, opened at the chosen page and not decoded. Formats that are not listed have at most 8 bits.
    """
    match image.format:
        case "PNG":
            return encoded[encoded.index(b"IHDR") + 12]
        case "TIFF":
            assert isinstance(image, TiffImageFile)
            return int(max(image.tag_v2.get(ExifTags.Base.BitsPerSample, (1,))))
        case "SGI":
            return 8 * encoded[3]
        case "JPEG2000":
            return _depth_of_jpeg2000(encoded)
        case "AVIF":
            return _depth_of_avif(encoded)
        case "PPM":
            return _depth_of_ppm(image)
        case _:
            return 8


def _depth_of_jpeg2000(encoded: bytes) -> int:
    """Read from the codestream's SIZ segment, which has the number of components at byte 40 and then three bytes per
    component (ISO 15444-1, A.5.1)."""
    siz = encoded[encoded.index(b"\xff\x4f\xff\x51") :]
    (count,) = struct.unpack_from(">H", siz, 40)
    return max((ssiz & 0x7F) + 1 for ssiz in siz[42 : 42 + 3 * count : 3])


def _depth_of_avif(encoded: bytes) -> int:
    """Read from the flags high_bitdepth and twelve_bit of the AV1 configuration box."""
    flags = encoded[encoded.index(b"av1C") + 6]
    return 8 if not flags & 0x40 else 12 if flags & 0x20 else 10


def _depth_of_ppm(image: ImageFile.ImageFile) -> int:
    if image.mode == "F":
        return 32
    if image.mode == "I":
        return 16
    args = image.tile[0].args
    return int(args[1]).bit_length() if isinstance(args, tuple) and args[0] != "F" else 8


def orientation(image: Image.Image) -> object:
    """The EXIF orientation, 1 to 8, or None if the image has none. For a PNG that is not decoded, only metadata before
    the pixels is read. For a decoded TIFF, it is the orientation that Pillow has not applied already."""
    try:
        # The PNG class's own method would decode the pixels to read the metadata after them.
        return Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    except UNDECODABLE:
        return None


def upright_size(image: ImageFile.ImageFile, encoded: bytes) -> tuple[int, int]:
    """Width and height that an undecoded image has once it is upright."""
    if image.format == "PNG" and _speaks_late(encoded):
        image.load()
    width, height = image.size
    # Pillow reports the size of a TIFF with its orientation tag already applied.
    counted = isinstance(image, TiffImageFile) and image.tag_v2.get(ExifTags.Base.Orientation) in _SIDEWAYS
    return (height, width) if not counted and orientation(image) in _SIDEWAYS else (width, height)


def _speaks_late(encoded: bytes) -> bool:
    """Whether a PNG has metadata that may hold its orientation after its pixels (IDAT)."""
    texts = (b"Raw profile type exif", b"XML:com.adobe.xmp")
    place, pixels = 8, False
    while place + 8 <= len(encoded):
        length, kind = struct.unpack_from(">I4s", encoded, place)
        pixels = pixels or kind == b"IDAT"
        if pixels and (kind == b"eXIf" or encoded.startswith(texts, place + 8)):
            return True
        place += 12 + length
    return False
