"""Crash-safe files: durable writes, and manifests with checksums that reveal damaged files.

`umrg.atomic` only ensures that readers never see a partial file. Here, files are also synced to disk and verified.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from umrg.atomic import named
from umrg.mistake import Mistake

MANIFEST = "manifest.json"


class Disk:
    """File-system operations behind one interface, so that a test can simulate a crash at any of them."""

    def make_folder(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)

    def write(self, path: Path, data: bytes) -> None:
        with named(path):
            path.write_bytes(data)

    def sync(self, path: Path) -> None:
        """Flush a file, or a folder's directory entries, to disk."""
        handle = os.open(path, os.O_RDONLY)
        try:
            with named(path):
                os.fsync(handle)
        finally:
            os.close(handle)

    def rename(self, source: Path, target: Path) -> None:
        source.replace(target)

    def remove(self, path: Path) -> None:
        """Remove a file or a folder with its content, if it exists."""
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """Size and checksum of a file, computed from the data in memory rather than from the disk."""

    size: int
    """Size in bytes."""
    sha256: str
    """Hexadecimal digest."""


class Damaged(Mistake):
    """Raised for a file or folder that differs from what was written."""


def write_durably(disk: Disk, path: Path, data: bytes) -> FileRecord:
    """Write a file and sync it to disk. The caller must sync its folder afterwards."""
    disk.write(path, data)
    disk.sync(path)
    return FileRecord(size=len(data), sha256=hashlib.sha256(data).hexdigest())


def replace_durably(disk: Disk, path: Path, data: bytes) -> None:
    """Replace a file atomically: after a crash, it has either its old or its new content."""
    aside = path.with_name(f".{path.name}.part")
    write_durably(disk, aside, data)
    disk.rename(aside, path)
    disk.sync(path.parent)


def manifest(files: Mapping[str, FileRecord]) -> bytes:
    """The manifest of a folder: size and sha256 of each file by relative path, and a sha256 of this list."""
    listed = {name: asdict(files[name]) for name in sorted(files)}
    return json.dumps({"files": listed, "sha256": _digest(listed)}, indent=1).encode()


def verify(folder: Path) -> str:
    """Check every file of a folder against its manifest and return the manifest's sha256.

    Raises Damaged if a file is missing or differs.
    """
    data = _manifest_bytes(folder)
    files = _listed(folder, data)
    with ThreadPoolExecutor(max_workers=4) as pool:
        for name, fault in zip(files, pool.map(lambda name: _fault(folder / name, files[name]), files), strict=True):
            if fault:
                raise Damaged(f"{folder} is damaged: {name} {fault}")
    return hashlib.sha256(data).hexdigest()


def manifest_digest(folder: Path) -> str:
    """The manifest's sha256, as `verify` returns it, without reading the files."""
    return hashlib.sha256(_manifest_bytes(folder)).hexdigest()


def _manifest_bytes(folder: Path) -> bytes:
    try:
        return (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise Damaged(f"{folder} is damaged: its {MANIFEST} cannot be read ({error.strerror})") from error


def _listed(folder: Path, data: bytes) -> dict[str, FileRecord]:
    """The files that a manifest lists. Raises Damaged unless the bytes are exactly those that `manifest` made."""
    try:
        files = {name: FileRecord(**record) for name, record in json.loads(data)["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        files = None
    if files is None or manifest(files) != data:
        raise Damaged(f"{folder} is damaged: its {MANIFEST} is not as it was written")
    return files


def _fault(path: Path, record: FileRecord) -> str | None:
    try:
        with path.open("rb") as file:
            if (size := os.fstat(file.fileno()).st_size) != record.size:
                return f"has {size} bytes, not {record.size}"
            same = hashlib.file_digest(file, "sha256").hexdigest() == record.sha256
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None if same else f"has another sha256 than its {MANIFEST} says"


def _digest(listed: Mapping[str, Mapping[str, object]]) -> str:
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def parents(names: Iterable[str]) -> list[Path]:
    """All parent folders of relative paths, the deepest first, which is the order in which to sync them."""
    return sorted({parent for name in names for parent in Path(name).parents}, key=lambda path: -len(path.parts))
