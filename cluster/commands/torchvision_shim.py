"""Let a CUDA build of torchvision be imported beside a CPU build of torch.

The package index's torchvision is a CUDA build. Beside CPU torch its compiled part cannot be loaded, so
the operators `torchvision::nms` and `torchvision::qnms` are never declared, and the import ends in
`RuntimeError: operator torchvision::nms does not exist` where torchvision describes their output shapes.
vLLM and transformers need torchvision's image transforms, not these operators; declaring the two is enough.
Calling one still fails, with torch's message that it has no kernel.

It must happen in every process (Ray workers, vLLM's engines) before torchvision is imported, whatever the
working directory. So `python -m cluster.commands.torchvision_shim`, run by `make setup`, tries the plain import and
only where that fails copies this file into site-packages, beside a `.pth` file through which every Python
process of the environment calls `activate()`. Where the plain import works, both files are removed.
This file is therefore self-contained, and imports next to nothing: each interpreter start pays for it.
"""

import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType

INSTALLED_NAME = "medreasoner_torchvision_shim"
OFF_SWITCH = "MEDREASONER_NO_TORCHVISION_SHIM"
SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
MISSING_OPERATOR = "operator torchvision::nms does not exist"

# torch withdraws declared operators when their library object is collected.
_libraries: list[object] = []


def declare_operators() -> None:
    """Declare, without kernels, those of the operators that nothing has declared yet. Imports torch."""
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    _libraries.append(library)
    for name, signature in SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            library.define(name + signature)


class DeclaringLoader(SourceFileLoader):
    """Loads torchvision after its operators have been declared."""

    def exec_module(self, module: ModuleType) -> None:
        declare_operators()
        super().exec_module(module)


class TorchvisionFinder:
    """Meta path finder of the one name `torchvision`; torch is imported only when torchvision is run."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "torchvision":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = DeclaringLoader(spec.loader.name, spec.loader.path)
        return spec


def activate() -> None:
    """Put the finder first, unless the environment variable MEDREASONER_NO_TORCHVISION_SHIM is set."""
    if not os.environ.get(OFF_SWITCH) and TorchvisionFinder not in sys.meta_path:
        sys.meta_path.insert(0, TorchvisionFinder)


def import_error(*, shimmed: bool) -> str:
    """The last line of the error of `import torchvision` in a fresh process; empty when it works."""
    import subprocess

    environment = {name: value for name, value in os.environ.items() if name != OFF_SWITCH}
    if not shimmed:
        environment[OFF_SWITCH] = "1"
    command = [sys.executable, "-c", "import torchvision"]
    outcome = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if outcome.returncode == 0:
        return ""
    return (outcome.stderr.strip() or f"exit code {outcome.returncode}").splitlines()[-1]


def install(site_packages: str) -> list[str]:
    """Write module and `.pth` file into `site_packages`; return their paths."""
    from pathlib import Path

    module = Path(site_packages, f"{INSTALLED_NAME}.py")
    start = Path(site_packages, f"{INSTALLED_NAME}.pth")
    module.write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    start.write_text(f"import {INSTALLED_NAME}; {INSTALLED_NAME}.activate()\n", encoding="utf-8")
    return [str(module), str(start)]


def uninstall(site_packages: str) -> None:
    """Remove what `install` wrote, the start file first, so that no process names a module that is gone."""
    from pathlib import Path

    for suffix in (".pth", ".py"):
        Path(site_packages, INSTALLED_NAME + suffix).unlink(missing_ok=True)


def settle(site_packages: str) -> int:
    """Install the shim into `site_packages` if, and only if, torchvision needs it; return the exit code."""
    error = import_error(shimmed=False)
    if MISSING_OPERATOR not in error:
        uninstall(site_packages)
        print(f"torchvision: {error or 'imports as it is'}")
        return int(bool(error))
    install(site_packages)
    remaining = import_error(shimmed=True)
    print(f"torchvision: {remaining or 'imports beside CPU torch through ' + INSTALLED_NAME + '.pth'}")
    return int(bool(remaining))


if __name__ == "__main__":
    import sysconfig

    sys.exit(settle(sysconfig.get_paths()["purelib"]))
