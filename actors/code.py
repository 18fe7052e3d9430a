"""Our code as a package that Ray brings to other nodes: what is sent of a checkout, and what is left out."""

import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import ZipFile, ZipInfo

from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray._private.runtime_env.packaging import get_excludes_from_ignore_files
from ray._private.services import canonicalize_bootstrap_address

from umrg.mistake import Mistake

TEXT_BYTES = 2**20
"""Largest text file that is taken for source, configuration or the like."""
DATA = {".csv", ".tsv", ".jsonl", ".ndjson"}
"""Suffixes of text that is data, of patients perhaps, and no part of the code."""
PACKAGE_BYTES = DASHBOARD_CLIENT_MAX_SIZE - 2**20
"""Largest package: what Ray's dashboard accepts, less a little for the archive itself."""

_BUNDLED = "models/tiny-expert"
"""The expert named `tiny` is part of the code; other models are named by path."""
_FOREIGN = ({"pyvenv.cfg"}, {"conda-meta"}, {"CACHEDIR.TAG"}, {"config.yaml", "summary.json"})
"""What an environment, a cache or a run's folder holds, whatever it is called."""


def checkout() -> Path | None:
    """The folder that holds our packages, if they are run from a checkout; None where they are installed, which is
    then the nodes' own affair."""
    root = Path(__file__).resolve().parents[1]
    return root if (root / "pyproject.toml").is_file() else None


def code(root: Path) -> dict[str, Path]:
    """What is sent of a checkout, by its path in the package: text files, and the bundled expert. Not sent is whatever
    a .gitignore or .rayignore names, is hidden, is data, or is an environment's, a cache's, a run's or a model's
    folder."""
    files = [*_texts(root, _ignored(root)), *(path for path in (root / _BUNDLED).glob("*") if path.is_file())]
    return {path.relative_to(root).as_posix(): path for path in files}


def sources(root: Path, packages: Iterable[str]) -> list[Path]:
    """The Python files of some packages of a checkout that are sent, so that they are the same ones where they are
    sent to."""
    ignored = _ignored(root)
    folders = [root / package for package in packages if (root / package).is_dir()]
    texts = (path for folder in folders for path in _texts(folder, ignored + _ignored(folder)))
    return sorted(path for path in texts if path.suffix == ".py")


def _ignored(folder: Path) -> tuple[Callable[[Path], bool], ...]:
    # Ray's own reading of such files, which holds for `ray job submit` too.
    return tuple(get_excludes_from_ignore_files(folder, include_gitignore=True, logger=logging.getLogger(__name__)))


def _texts(folder: Path, ignored: tuple[Callable[[Path], bool], ...]) -> Iterator[Path]:
    """ignored: what the folder and those above it leave out."""
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith(".") or entry.name == "__pycache__" or any(match(entry) for match in ignored):
            continue
        if entry.is_dir() and not entry.is_symlink():
            if not _is_foreign(entry):
                yield from _texts(entry, ignored + _ignored(entry))
        elif entry.is_file() and _is_text(entry):
            yield entry


def _is_foreign(folder: Path) -> bool:
    names = set(os.listdir(folder))
    return any(marks <= names for marks in _FOREIGN) or any(name.endswith(".safetensors") for name in names)


def _is_text(path: Path) -> bool:
    if path.suffix.lower() in DATA or path.stat().st_size > TEXT_BYTES:
        return False
    content = path.read_bytes()
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return b"\0" not in content


def pack(files: Mapping[str, Path | bytes], archive: Path) -> None:
    """Write files, or their contents, to a zip file, by their path in it. Equal files make equal archives, which Ray
    stores and unpacks once. Raises ValueError, which names the largest files, for more than Ray accepts."""
    sizes = {name: size_of(file) for name, file in files.items()}
    if sum(sizes.values()) > PACKAGE_BYTES:
        largest = sorted(sizes, key=sizes.__getitem__, reverse=True)[:5]
        named = ", ".join(f"{name} ({in_mib(sizes[name])})" for name in largest)
        raise Mistake(
            f"the package has {in_mib(sum(sizes.values()))} in {len(sizes)} files, and Ray accepts "
            f"{in_mib(PACKAGE_BYTES)}; name what is not needed in a .rayignore file. The largest: {named}"
        )
    with ZipFile(archive, "w") as writer:
        for name, file in sorted(files.items()):
            entry = ZipInfo(name)
            entry.external_attr = 0o644 << 16
            writer.writestr(entry, file if isinstance(file, bytes) else file.read_bytes())


def size_of(file: Path | bytes) -> int:
    """In bytes."""
    return len(file) if isinstance(file, bytes) else file.stat().st_size


def in_mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


@contextmanager
def sent_code() -> Iterator[dict[str, Any] | None]:
    """The runtime environment with which `ray.init` sends our code to all nodes, until it has returned. None where
    there is nothing to send: on a cluster that this process starts for itself, in a Ray job, whose working directory
    was chosen when it was submitted, and where our packages are installed."""
    root = checkout()
    if root is None or RAY_JOB_CONFIG_JSON_ENV_VAR in os.environ or canonicalize_bootstrap_address(None) is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "code.zip"
        pack(code(root), archive)
        # A reward term of the user's is found where the driver was started, on nodes that share that folder. Ray puts
        # what is sent before it, and the nodes' own PYTHONPATH after it.
        terms = {} if Path.cwd().resolve() == root else {"env_vars": {"PYTHONPATH": os.getcwd()}}
        yield {"working_dir": str(archive), **terms}
