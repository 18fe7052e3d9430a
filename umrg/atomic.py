"""Nothing is half-written: files and folders are written aside, then renamed into place; files that grow by lines are
read up to their last whole one."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A path beside `path` to write a file or make a folder at. It is renamed to `path` at the end, over what lies
    there; where the writing fails it is removed, and `path` stays as it was. An OSError names `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with named(path, aside):
            yield aside
            if path.is_dir() and aside.is_dir():
                # A folder cannot be renamed over one that holds files.
                shutil.rmtree(path)
            aside.replace(path)
    finally:
        # What cannot be removed, on a disk that takes no changes, was not made; the error that says so is under way.
        with suppress(OSError):
            shutil.rmtree(aside) if aside.is_dir() else aside.unlink(missing_ok=True)


@contextmanager
def named(path: Path, aside: Path | None = None) -> Iterator[None]:
    """An OSError that names no file, as where a disk is full, names `path`; one that names `aside`, or a file in it,
    names `path`, or the file in that."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        for name in (error.filename, error.filename2):
            # A failed copy names its target second.
            if aside is not None and name is not None and Path(name).is_relative_to(aside):
                error.filename = str(path / Path(name).relative_to(aside))
                del error.filename2
        raise


def remove_leftovers(folder: Path) -> None:
    """Remove what writers that were killed left aside, anywhere in a folder."""
    for aside in list(folder.rglob(".*.part")):
        if aside.is_dir():
            shutil.rmtree(aside)
        else:
            aside.unlink(missing_ok=True)


def whole_lines(path: Path) -> list[Any]:
    """The values of a JSON-lines file, none where there is no file. The last line of a process that was killed may be
    half a line: it is left out."""
    if not path.exists():
        return []
    # Other line separators may stand within a value.
    *whole, _ = path.read_text().split("\n")
    return [json.loads(line) for line in whole]
