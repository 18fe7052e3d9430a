"""The torchvision shim, in fresh processes: it declares what is missing, late, and only where it is needed.

A stand-in for torchvision on PYTHONPATH fails as the CUDA build of the real one does beside CPU torch; the
last test imports the real one of this environment, whichever build it is.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.commands.torchvision_shim import INSTALLED_NAME, OFF_SWITCH, install, settle, uninstall

# Describing the output shape of an operator nobody declared is where the real import fails.
CUDA_BUILD = """
import torch
@torch.library.register_fake("torchvision::nms")
def fake_nms(boxes, scores, iou_threshold):
    return boxes.new_empty(0, dtype=torch.long)
"""


def run_with(packages: Path, program: str) -> subprocess.CompletedProcess[str]:
    """Run `program` in a process that knows only the shim in `packages`, from another working directory."""
    environment = os.environ | {"PYTHONPATH": str(packages), OFF_SWITCH: "1"}
    start = f"import os; del os.environ['{OFF_SWITCH}']; exec(open('{packages}/{INSTALLED_NAME}.pth').read())\n"
    return subprocess.run(
        [sys.executable, "-c", start + program],
        env=environment,
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """A folder of packages with the shim installed."""
    install(str(tmp_path))
    return tmp_path


def test_the_import_fails_without_the_shim_and_works_with_it(packages: Path) -> None:
    (packages / "torchvision.py").write_text(CUDA_BUILD)
    environment = os.environ | {"PYTHONPATH": str(packages), OFF_SWITCH: "1"}
    command = [sys.executable, "-c", "import torchvision"]
    plain = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "operator torchvision::nms does not exist" in plain.stderr
    shimmed = run_with(packages, "import torchvision, torch; print(torch.ops.torchvision.qnms)")
    assert shimmed.stdout == "torchvision.qnms\n", shimmed.stderr


def test_torch_is_not_imported_before_torchvision_is(packages: Path) -> None:
    (packages / "torchvision.py").write_text(CUDA_BUILD)
    program = (
        "import sys, importlib.util; found = importlib.util.find_spec('torchvision') is not None\n"
        "print(found, 'torch' in sys.modules)\n"
        "import torchvision; print('torch' in sys.modules)"
    )
    assert run_with(packages, program).stdout == "True False\nTrue\n"


def test_a_missing_torchvision_stays_missing(packages: Path) -> None:
    program = f"""
import sys
import {INSTALLED_NAME} as shim
shim.PathFinder = type("Empty", (), {{"find_spec": staticmethod(lambda *_: None)}})
print(shim.TorchvisionFinder.find_spec("torchvision"), shim.TorchvisionFinder.find_spec("json"))
"""
    assert run_with(packages, program).stdout == "None None\n"


@pytest.mark.parametrize(("torchvision", "needed"), [(CUDA_BUILD, True), ("", False), ("import nothing", False)])
def test_it_is_installed_only_where_the_operators_are_what_is_missing(
    torchvision: str, needed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in, site_packages = tmp_path / "stand_in", tmp_path / "site_packages"
    for folder in (stand_in, site_packages):
        folder.mkdir()
    (stand_in / "torchvision.py").write_text(torchvision)
    monkeypatch.setenv("PYTHONPATH", str(stand_in))
    if not needed:
        install(str(site_packages))
    exit_code = settle(str(site_packages))
    written = {path.name for path in site_packages.iterdir()}
    assert written == ({f"{INSTALLED_NAME}.py", f"{INSTALLED_NAME}.pth"} if needed else set())
    assert needed or exit_code == bool(torchvision)


def test_uninstall_leaves_nothing(packages: Path) -> None:
    uninstall(str(packages))
    assert list(packages.iterdir()) == []
    uninstall(str(packages))


def test_torchvision_of_this_environment_imports_in_any_working_directory() -> None:
    program = "from torchvision.transforms import v2; print(v2.Resize.__name__)"
    outcome = subprocess.run([sys.executable, "-c", program], cwd="/", capture_output=True, text=True, check=False)
    assert outcome.stdout == "Resize\n", outcome.stderr
