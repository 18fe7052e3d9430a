"""Quality checks of dataset rows: errors that make a row unusable, and warnings to review.

    row ──read_info, read_sample──► Sample ──image, mask──► check_reference, check_mask ──► Finding …
         └─ a failure on the way is a finding as well ─┘

`CHECKS` lists all checks. `umrg.dataset.Dataset` can read every row without a finding of severity "error".
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import label

from umrg.columns import Row
from umrg.frames import Box, Point, PointPair
from umrg.keypoints import reference_points, tight_box
from umrg.mistake import Mistake
from umrg.names import UNKNOWN, names_outright
from umrg.prompts import clean_query, special_tokens
from umrg.row_groups import Damage
from umrg.rows import (
    RowInfo,
    box_fault,
    coordinates,
    point_fault,
    read_info,
    read_sample,
    reasoning_fault,
    turns,
)
from umrg.sample import Sample

# A mask with fewer pixels than either limit, a number and a share of the image, is probably an annotation error.
TINY_PIXELS = 16
TINY_SHARE = 0.0002
# As a share of the long side: two pixels at the long side of 840 that the released images have.
LOOSE_SHARE = 2 / 840


class Severity(StrEnum):
    """How serious a finding is."""

    ERROR = "error"
    """The row cannot be used."""
    WARNING = "warning"
    """The row can be used, but should be reviewed."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """A check that a row may fail."""

    name: str
    """Its name in tables."""
    severity: Severity
    about: str
    """A short description of the fault."""


def _error(name: str, about: str) -> Check:
    return Check(name=name, severity=Severity.ERROR, about=about)


def _warning(name: str, about: str) -> Check:
    return Check(name=name, severity=Severity.WARNING, about=about)


DAMAGED_ROW = _error("damaged_row", "the parquet file is damaged where the row lies")
SCHEMA = _error("schema", "id, question, image, mask, box or points are missing or malformed")
REPEATED_ID = _error("repeated_id", "an earlier row has the same id")
UNREADABLE_IMAGE = _error("unreadable_image", "the image cannot be decoded")
UNREADABLE_MASK = _error("unreadable_mask", "a mask cannot be decoded, or has another size than the image")
EMPTY_MASK = _error("empty_mask", "no pixel is marked, and the row does not declare `no_target`")
BOX_OUTSIDE = _error("box_outside", "the box is inverted or leaves the image")
POINT_OUTSIDE = _error("point_outside", "a point lies outside the image")
OVER_LIMIT = _error("over_limit", "the prompt is longer than the model or the run allows, or the image too narrow")
LOOSE_BOX = _warning("loose_box", "the box is not the mask's tight box")
POINT_OFF_MASK = _warning("point_off_mask", "a point lies beside the mask")
TINY_MASK = _warning("tiny_mask", "hardly a pixel is marked")
SEVERAL_PARTS = _warning("several_parts", "the mask is not in one piece")
DUPLICATED_IMAGE = _warning(
    "duplicated_image", "the same pixels under two names, in two files, or asked the same twice"
)
SHARED_MASK = _warning("shared_mask", "the same mask stands for another category of the image")
NAMES_CATEGORY = _warning("names_category", "the question names its category, so it is not implicit")
SPECIAL_TOKENS = _warning("special_tokens", "the question holds literal special tokens")
UNSEEN_TURNS = _warning("unseen_turns", "the prompt holds more than one question, of which a model sees the last alone")
BAD_REASONING = _warning("bad_reasoning", "the reasoning is blank or holds tags or control tokens: not for `sft`")
UNNAMED = _warning("unnamed", "category or super-category is missing")
IMAGE_SHRUNK = _warning("image_shrunk", "the model's processor makes the image smaller")
LOW_CEILING = _warning("low_ceiling", "the expert fails even with the reference box and points")

CHECKS = (
    DAMAGED_ROW,
    SCHEMA,
    REPEATED_ID,
    UNREADABLE_IMAGE,
    UNREADABLE_MASK,
    EMPTY_MASK,
    BOX_OUTSIDE,
    POINT_OUTSIDE,
    OVER_LIMIT,
    LOOSE_BOX,
    POINT_OFF_MASK,
    TINY_MASK,
    SEVERAL_PARTS,
    DUPLICATED_IMAGE,
    SHARED_MASK,
    NAMES_CATEGORY,
    SPECIAL_TOKENS,
    UNSEEN_TURNS,
    BAD_REASONING,
    UNNAMED,
    IMAGE_SHRUNK,
    LOW_CEILING,
)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A fault that a check found in a row."""

    check: Check
    message: str
    """A sentence that states the fault and how to fix it."""
    degree: float = 0.0
    """Larger is worse; comparable between findings of the same check only."""


@dataclass(frozen=True, kw_only=True)
class CheckedRow:
    """A row with its findings, and with its content as far as it could be read."""

    file: Path
    row: int
    findings: list[Finding]
    info: RowInfo | None = None
    sample: Sample | None = field(default=None, repr=False)
    mask: NDArray[np.bool_] | None = field(default=None, repr=False)
    pixels: bytes | None = None
    """Digest of the decoded image."""

    @property
    def usable(self) -> bool:
        return all(finding.check.severity is not Severity.ERROR for finding in self.findings)


@dataclass(frozen=True, kw_only=True)
class _FirstUse:
    """The first row of an image, and the first row of each of its questions and masks, keyed by digest."""

    info: RowInfo
    questions: dict[bytes, RowInfo] = field(default_factory=dict)
    masks: dict[bytes, RowInfo] = field(default_factory=dict)


class DuplicateIndex:
    """Detects repeated ids, images and masks. It stores the metadata of earlier rows and digests of their images."""

    def __init__(self) -> None:
        self._ids: dict[str, RowInfo] = {}
        self._images: dict[bytes, _FirstUse] = {}
        self._pixels: dict[bytes, bytes] = {}

    def check_id(self, info: RowInfo) -> Iterator[Finding]:
        first = self._ids.setdefault(info.id, info)
        if first is not info:
            message = f"its id {info.id!r} is that of {_place(first, info)}; ids must be unique"
            yield Finding(check=REPEATED_ID, message=message)

    def pixels(self, sample: Sample) -> bytes:
        """Digest of a sample's decoded image. Identical encoded files are decoded only once.

        Raises ValueError if the image cannot be decoded.
        """
        encoded = _digest(sample.image_bytes)
        if encoded not in self._pixels:
            image = sample.image()
            # The shape is included, because images of different shapes can have the same bytes.
            self._pixels[encoded] = _digest(repr(image.shape).encode() + image.tobytes())
        return self._pixels[encoded]

    def check_image(self, info: RowInfo, pixels: bytes) -> Iterator[Finding]:
        """Check that an image recurs only within one file, under one name and with different questions."""
        first = self._images.setdefault(pixels, _FirstUse(info=info))
        question = _digest(clean_query(info.query).casefold().encode())
        asked = first.questions.setdefault(question, info)
        if asked is not info:
            message = f"it asks the question of {_place(asked, info)} about the same image; remove one of the two"
        elif first.info.file != info.file:
            message = (
                f"its image is that of {_place(first.info, info)}; keep an image in one file, or a model is tested on "
                "images that it was trained on"
            )
        elif "" not in (first.info.image, info.image) and first.info.image != info.image:
            message = (
                f"its image {info.image!r} is that of {_place(first.info, info)}, there called {first.info.image!r}; "
                "give one image one name, or remove one"
            )
        else:
            return
        yield Finding(check=DUPLICATED_IMAGE, message=message)

    def check_target(self, info: RowInfo, pixels: bytes, mask: NDArray[np.bool_]) -> Iterator[Finding]:
        """Check that a mask of an image has one category only. `check_image` must have been called for the image."""
        first = self._images[pixels].masks.setdefault(_digest(np.packbits(mask).tobytes()), info)
        if mask.any() and first.category != info.category:
            message = (
                f"its mask is that of {_place(first, info)}, there for {first.category!r}, here for {info.category!r}; "
                "see whether it can be both"
            )
            yield Finding(check=SHARED_MASK, message=message)


def check_row(row: Row | Damage, file: Path, number: int, duplicates: DuplicateIndex) -> CheckedRow:
    """Run all checks that need no model. Checks that depend on an unreadable part of the row are skipped."""
    checked = CheckedRow(file=file, row=number, findings=[])
    if isinstance(row, Damage):
        return _found(checked, DAMAGED_ROW, f"the row cannot be read: {row.reason}; write the file again")
    try:
        info = read_info(row, file, number, "the row")
        checked = replace(
            checked, info=info, findings=[*duplicates.check_id(info), *check_words(info), *check_texts(row)]
        )
        # Messages need not name the file, because it has a column of its own in the table of findings.
        sample = replace(read_sample(row, info, "the row"), source="")
    except Mistake as error:
        return _found(checked, SCHEMA, str(error))
    return _check_pictures(replace(checked, sample=sample), info, sample, duplicates)


def _check_pictures(checked: CheckedRow, info: RowInfo, sample: Sample, duplicates: DuplicateIndex) -> CheckedRow:
    try:
        pixels = duplicates.pixels(sample)
    except Mistake as error:
        return _found(checked, UNREADABLE_IMAGE, str(error))
    found = [*checked.findings, *duplicates.check_image(info, pixels), *check_reference(sample)]
    checked = replace(checked, pixels=pixels, findings=found)
    try:
        mask = sample.mask_union()
    except Mistake as error:
        return _found(checked, UNREADABLE_MASK, str(error))
    found = [*checked.findings, *check_mask(sample, mask), *duplicates.check_target(info, pixels, mask)]
    return replace(checked, mask=mask, findings=found)


def check_words(info: RowInfo) -> Iterator[Finding]:
    """Check the question and the category names."""
    if not clean_query(info.query):
        yield Finding(check=SCHEMA, message="the question has no words of its own; write one, or leave the row out")
    if tokens := special_tokens(info.query):
        listed = ", ".join(tokens[:5])
        message = f"the question holds {listed}, which no model gets to see; write it without special tokens"
        yield Finding(check=SPECIAL_TOKENS, message=message, degree=len(tokens))
    if info.category != UNKNOWN and names_outright(info.query, info.category):
        message = f"the question names its category {info.category!r}; ask by function, complaint or finding instead"
        yield Finding(check=NAMES_CATEGORY, message=message)
    for name in ("supercategory", "category"):
        if getattr(info, name) == UNKNOWN:
            yield Finding(check=UNNAMED, message=f"the row has no {name}; fill in extra_info.{name}")


def check_texts(row: Row) -> Iterator[Finding]:
    """Check the remaining texts: further turns of the prompt, and the reasoning."""
    *others, last = [role for role, _ in turns(row)]
    if others or last != "user":
        said = ", ".join(role for role, _ in turns(row))
        message = (
            f"the prompt has several turns ({said}); a model is asked the user's last turn alone: put into it what has "
            "to be known, and remove the others"
        )
        yield Finding(check=UNSEEN_TURNS, message=message, degree=len(others))
    reasoning = row["extra_info"].get("reasoning")
    if isinstance(reasoning, str) and (fault := reasoning_fault(reasoning)):
        yield Finding(check=BAD_REASONING, message=f"the row has {fault}")


def check_reference(sample: Sample) -> Iterator[Finding]:
    """Check that box and points lie within the image, whose header must be readable."""
    if fault := box_fault(sample.box, sample.size):
        yield Finding(check=BOX_OUTSIDE, message=f"the row has {fault}")
    for point in sample.points:
        if fault := point_fault(point, sample.size):
            yield Finding(check=POINT_OUTSIDE, message=f"the row has {fault}")


def check_mask(sample: Sample, mask: NDArray[np.bool_]) -> Iterator[Finding]:
    """Check a mask, bool [H, W] of the image's size, and compare box and points with it."""
    if mask.any():
        yield from check_shape(mask)
        yield from check_tightness(sample.box, mask)
        yield from check_points(sample.points, mask)
    elif not sample.no_target:
        message = "no pixel of the mask is 128 or more; write the target as 255, or mark the row `no_target`"
        yield Finding(check=EMPTY_MASK, message=message)


def check_shape(mask: NDArray[np.bool_]) -> Iterator[Finding]:
    """Check size and connected components (8-connectivity) of a non-empty mask."""
    area = int(np.count_nonzero(mask))
    if area < max(TINY_PIXELS, TINY_SHARE * mask.size):
        message = (
            f"the mask has {area} px, {_percent(area / mask.size)} of its image; see whether the whole target is "
            "marked, or crop the image"
        )
        yield Finding(check=TINY_MASK, message=message, degree=-area)
    left, top, right, bottom = tight_box(mask)
    parts, count = label(mask[top : bottom + 1, left : right + 1], np.ones((3, 3)))
    if count > 1:
        sizes = sorted(np.bincount(parts.ravel())[1:].tolist(), reverse=True)
        listed = ", ".join(map(str, sizes[:5])) + (", …" if count > 5 else "")
        message = (
            f"the mask has {count} parts ({listed} px); remove specks, or give parts that are not meant as one rows of "
            "their own"
        )
        yield Finding(check=SEVERAL_PARTS, message=message, degree=1 - sizes[0] / area)


def check_tightness(box: Box, mask: NDArray[np.bool_]) -> Iterator[Finding]:
    """Compare a box with the tight box of a non-empty mask.

    Each edge may differ by one pixel or, in large images, by `LOOSE_SHARE` of the long side.
    """
    tight = tight_box(mask)
    off = max(abs(edge - best) for edge, best in zip(box, tight, strict=True))
    if off > max(1.0, LOOSE_SHARE * max(mask.shape)):
        message = (
            f"the box {coordinates(box)} is up to {_pixels(off)} off the mask's tight box {coordinates(tight)}; take "
            "that, or mend the mask"
        )
        yield Finding(check=LOOSE_BOX, message=message, degree=off / max(mask.shape))


def check_points(points: PointPair, mask: NDArray[np.bool_]) -> Iterator[Finding]:
    """Check that the pixel nearest to each point belongs to the mask, which must not be empty."""
    for point in points:
        if off := _distance(point, mask):
            better = " and ".join(map(coordinates, reference_points(mask)))
            message = f"the point {coordinates(point)} lies {_pixels(off)} off the mask; its key points are {better}"
            yield Finding(check=POINT_OFF_MASK, message=message, degree=off / max(mask.shape))


def _distance(point: Point, mask: NDArray[np.bool_]) -> float:
    """Distance in pixels from a point to the nearest pixel of a mask, 0 on the mask."""
    height, width = mask.shape
    # `point_fault` accepts x = width and y = height, and a point outside the image is a finding of its own.
    x, y = (min(side - 1, max(0, round(value))) for value, side in zip(point, (width, height), strict=True))
    if mask[y, x]:
        return 0.0
    rows, columns = np.nonzero(mask)
    return float(np.hypot(rows - point[1], columns - point[0]).min())


def _found(checked: CheckedRow, check: Check, message: str) -> CheckedRow:
    return replace(checked, findings=[*checked.findings, Finding(check=check, message=message)])


def _place(other: RowInfo, info: RowInfo) -> str:
    return f"row {other.row}" + ("" if other.file == info.file else f" of {other.file}")


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _pixels(length: float) -> str:
    return f"{length:.1f}".removesuffix(".0") + " px"


def _percent(share: float) -> str:
    """Format a share as per cent with two significant digits and no exponent."""
    digits = np.format_float_positional(100 * share, precision=2, fractional=False, trim="-")
    return f"{digits} %"
