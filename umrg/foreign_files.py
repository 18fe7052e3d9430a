"""Files that people were handed in place of others: what one is, by its first bytes, and what is to be done."""

from pathlib import Path

_LOOK = 512

_LFS, _ANNEX = b"version https://git-lfs", b"/annex/objects/"

_PAGES = (b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")

_BINARY = {
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "a gzip archive; unpack it first",
    b"BZh": "a bzip2 archive; unpack it first",
    b"\xfd7zXZ": "an xz archive; unpack it first",
    b"7z\xbc\xaf": "a 7z archive; unpack it first",
    b"Rar!": "a rar archive; unpack it first",
    b"GGUF": "a GGUF file, made for other programs; get the original weights",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a numpy array",
}


def first_bytes(path: Path, count: int = _LOOK) -> bytes:
    """The beginning of a file. Raises ValueError where it is not there, is no file, or cannot be read."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the file in it")
    try:
        if path.exists() and not path.is_file():
            raise ValueError(f"{path} is no ordinary file; give one that lies on a disk")
        with path.open("rb") as file:
            return file.read(count)
    except FileNotFoundError as error:
        raise ValueError(f"there is no file {path}") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def what_it_is(path: Path) -> str | None:
    """A phrase that goes on from "the file is …", with what to do where it is no sound file at all; None where the
    bytes tell nothing. Raises ValueError as `first_bytes` does."""
    return what_it_is_but_text(path) or _text(first_bytes(path))


def what_it_is_but_text(path: Path) -> str | None:
    """As `what_it_is`, where a text may be in its place."""
    start = first_bytes(path)
    if not start:
        return "an empty file; download it again"
    if start.startswith(_LFS):
        return "a Git LFS pointer, not the file itself; get that with `git lfs pull`"
    if start.startswith(_ANNEX):
        return "a git-annex pointer, not the file itself; get that with `git annex get`"
    if start.lstrip(b"\xef\xbb\xbf \r\n\t").lower().startswith(_PAGES):
        return "a web page (HTML), not the file itself; download that again"
    for magic, kind in _BINARY.items():
        if start.startswith(magic):
            return kind
    return None


def _text(start: bytes) -> str | None:
    """Of a file of text, its first words."""
    # The last character may be cut.
    text = start.decode("utf-8", errors="ignore")
    readable = all(char.isprintable() or char in "\r\n\t" for char in text)
    if not text.strip() or not readable or len(text.encode()) < len(start) - 3:
        return None
    return f"a text file that begins {' '.join(text.split())[:40]!r}"
