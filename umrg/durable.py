"""Files that outlive a crash: the operations that a durable write consists of, and manifests that tell whole from
damaged.

`umrg.atomic` keeps readers from half-written files; here a file is also on the disk, and checked, before it counts.
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

MANIFEST = "manifest.json"


class Disk:
    """The operations, one method each, so that a test can count them and stop at any."""

    def make_folder(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)

    def write(self, path: Path, data: bytes) -> None:
        with named(path):
            path.write_bytes(data)

    def sync(self, path: Path) -> None:
        """Wait until a file, or a folder's list of names, is on the disk."""
        handle = os.open(path, os.O_RDONLY)
        try:
            with named(path):
                os.fsync(handle)
        finally:
            os.close(handle)

    def rename(self, source: Path, target: Path) -> None:
        source.replace(target)

    def remove(self, path: Path) -> None:
        """A file or a whole folder, where there is one."""
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """size: in bytes. sha256: of what was to be written, in hexadecimal."""

    size: int
    sha256: str


class Damaged(ValueError):
    """A file or folder is not what was written; the message says what is wrong with which."""


def write_durably(disk: Disk, path: Path, data: bytes) -> FileRecord:
    """Write a file and wait until it is on the disk. Its folder must be synced after it."""
    disk.write(path, data)
    disk.sync(path)
    return FileRecord(size=len(data), sha256=hashlib.sha256(data).hexdigest())


def replace_durably(disk: Disk, path: Path, data: bytes) -> None:
    """Replace a file by a rename, so that after a crash it is the old one or the new one."""
    aside = path.with_name(f".{path.name}.part")
    write_durably(disk, aside, data)
    disk.rename(aside, path)
    disk.sync(path.parent)


def manifest(files: Mapping[str, FileRecord]) -> bytes:
    """A folder's manifest: size and sha256 of each file by its path in the folder, and a sha256 of all that."""
    listed = {name: asdict(files[name]) for name in sorted(files)}
    return json.dumps({"files": listed, "sha256": _digest(listed)}, indent=1).encode()


def verify(folder: Path) -> str:
    """Check every file of a folder against its manifest; the manifest's sha256. Raises Damaged."""
    data = _manifest_bytes(folder)
    files = _listed(folder, data)
    with ThreadPoolExecutor(max_workers=4) as pool:
        for name, fault in zip(files, pool.map(lambda name: _fault(folder / name, files[name]), files), strict=True):
            if fault:
                raise Damaged(f"{folder} is damaged: {name} {fault}")
    return hashlib.sha256(data).hexdigest()


def manifest_digest(folder: Path) -> str:
    """The manifest's sha256, as `verify` gives it, without a look at the files."""
    return hashlib.sha256(_manifest_bytes(folder)).hexdigest()


def _manifest_bytes(folder: Path) -> bytes:
    try:
        return (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise Damaged(f"{folder} is damaged: its {MANIFEST} cannot be read ({error.strerror})") from error


def _listed(folder: Path, data: bytes) -> dict[str, FileRecord]:
    """What a manifest lists. Raises Damaged unless the bytes are those that `manifest` made."""
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
    """The folders that relative paths lie in, the deepest first."""
    return sorted({parent for name in names for parent in Path(name).parents}, key=lambda path: -len(path.parts))
