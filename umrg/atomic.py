"""Nothing is half-written: files and folders are written aside, then renamed into place."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A path beside `path` to write a file or make a folder at. It is renamed to `path` at the end, over what lies
    there; where the writing fails it is removed, and `path` stays as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield aside
        if path.is_dir():
            # A folder cannot be renamed over one that holds files.
            shutil.rmtree(path)
        aside.replace(path)
    finally:
        if aside.is_dir():
            shutil.rmtree(aside)
        aside.unlink(missing_ok=True)
