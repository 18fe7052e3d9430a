"""Recognises, by its first bytes, a file of another kind than expected: a Git LFS pointer, a web page, an archive.

Failed downloads and incomplete checkouts leave such files behind, so error messages name them and say what to do.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from umrg.mistake import Mistake

_LOOK = 512
"""How many bytes are examined. The pattern that reaches farthest, NIfTI's, ends at byte 348."""


@dataclass(frozen=True, kw_only=True)
class ForeignFile:
    """A kind of file that may be found in place of the expected one."""

    pattern: bytes
    """Regular expression that the first bytes match."""
    name: str
    """What the file is, as a continuation of "the file is …"."""
    remedy: str = ""
    """What to do about it; empty if that depends on the file that was expected."""

    def matches(self, start: bytes) -> bool:
        return re.match(self.pattern, start, re.DOTALL) is not None


ZIP = ForeignFile(pattern=rb"PK\x03\x04", name="a zip archive")
GZIP = ForeignFile(pattern=rb"\x1f\x8b", name="a gzip archive", remedy="unpack it first")
HDF5 = ForeignFile(pattern=rb"\x89HDF", name="an HDF5 file")
NUMPY = ForeignFile(pattern=rb"\x93NUMPY", name="a numpy array")

FOREIGN_FILES = (
    ForeignFile(
        pattern=rb"version https://git-lfs",
        name="a Git LFS pointer, not the file itself",
        remedy="get that with `git lfs pull`",
    ),
    ForeignFile(
        pattern=rb"/annex/objects/",
        name="a git-annex pointer, not the file itself",
        remedy="get that with `git annex get`",
    ),
    ForeignFile(
        # A byte order mark and white space may precede the first tag.
        pattern=rb"(\xef\xbb\xbf)?\s*<(?i:!doctype|html|\?xml|head|body)",
        name="a web page (HTML), not the file itself",
        remedy="download that again",
    ),
    ZIP,
    GZIP,
    ForeignFile(pattern=rb"BZh", name="a bzip2 archive", remedy="unpack it first"),
    ForeignFile(pattern=rb"\xfd7zXZ", name="an xz archive", remedy="unpack it first"),
    ForeignFile(pattern=rb"7z\xbc\xaf", name="a 7z archive", remedy="unpack it first"),
    ForeignFile(pattern=rb"Rar!", name="a rar archive", remedy="unpack it first"),
    ForeignFile(pattern=rb"GGUF", name="a GGUF file, made for other programs", remedy="get the original weights"),
    HDF5,
    NUMPY,
)
"""Kinds of files that may be found in place of any file; `umrg.image_files` adds unsupported image formats."""


def first_bytes(path: Path, count: int = _LOOK) -> bytes:
    """The first bytes of a file. Raises ValueError if it does not exist, is not a regular file, or cannot be read."""
    if path.is_dir():
        raise Mistake(f"{path} is a folder; give the file in it")
    try:
        if path.exists() and not path.is_file():
            raise Mistake(f"{path} is no ordinary file; give one that lies on a disk")
        with path.open("rb") as file:
            return file.read(count)
    except FileNotFoundError as error:
        raise Mistake(f"there is no file {path}") from error
    except OSError as error:
        raise Mistake(f"{path} cannot be read: {error.strerror}") from error


def what_it_is(path: Path) -> str | None:
    """What a file is, as a continuation of "the file is …" with a remedy; None if it is not recognised. Raises
    ValueError as `first_bytes` does."""
    return what_it_is_but_text(path) or _text(first_bytes(path))


def what_it_is_but_text(path: Path) -> str | None:
    """As `what_it_is`, for files that are expected to be text."""
    start = first_bytes(path)
    if not start:
        return "an empty file; download it again"
    kind = next((kind for kind in FOREIGN_FILES if kind.matches(start)), None)
    return None if kind is None else "; ".join(filter(None, (kind.name, kind.remedy)))


def _text(start: bytes) -> str | None:
    """A phrase with the first words of a text file; None for a binary file."""
    # UTF-8 has up to four bytes per character, so the last character may be truncated by up to three.
    text = start.decode("utf-8", errors="ignore")
    readable = all(char.isprintable() or char in "\r\n\t" for char in text)
    if not text.strip() or not readable or len(text.encode()) < len(start) - 3:
        return None
    return f"a text file that begins {' '.join(text.split())[:40]!r}"
