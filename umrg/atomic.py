"""Atomic writes: a file or folder is written under a temporary name beside its target and then renamed, so that a
reader never sees half of it. Files that grow by appended lines are read up to the last complete line."""

import json
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, at which to write a file or make a folder. On success it replaces `path`;
    on failure it is removed and `path` stays as it was. An OSError names `path`, not the temporary one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Process ids repeat among the containers that share a disk.
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.part")
    try:
        with named(path, aside):
            yield aside
            if path.is_dir() and aside.is_dir():
                # A folder cannot be renamed over one that holds files.
                shutil.rmtree(path)
            aside.replace(path)
    finally:
        # On a read-only disk the removal fails too, but then nothing was written, and the first error is on its way.
        with suppress(OSError):
            shutil.rmtree(aside) if aside.is_dir() else aside.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically."""
    with written_aside(path) as aside:
        aside.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    write_bytes(path, text.encode())


@contextmanager
def named(path: Path, aside: Path | None = None) -> Iterator[None]:
    """Make every OSError name the file that the user knows: `path` where the error names none (a full disk), and the
    corresponding place in `path` where it names `aside` or a file within it."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        for name in (error.filename, error.filename2):
            # A failed copy names its source first and its target second.
            if aside is not None and name is not None and Path(name).is_relative_to(aside):
                error.filename = str(path / Path(name).relative_to(aside))
                del error.filename2
        raise


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that killed writers left anywhere in a folder."""
    for aside in list(folder.rglob(".*.part")):
        if aside.is_dir():
            shutil.rmtree(aside)
        else:
            aside.unlink(missing_ok=True)


def whole_lines(path: Path) -> list[Any]:
    """The values of a JSON-lines file; an empty list where there is no file. A killed process may have left an
    incomplete last line, which is skipped."""
    if not path.exists():
        return []
    # Not `splitlines`: JSON strings may contain other line separators, such as U+2028.
    *whole, _ = path.read_text().split("\n")
    return [json.loads(line) for line in whole]
