"""One door for collectives."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("umrg", "rewards", "phantoms", "reasoner", "learner", "actors", "cluster", "serving")
DOOR = ROOT / "learner" / "collectives.py"


def uses(source: str) -> list[int]:
    """Lines that import or name torch.distributed."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{each.name}" for each in node.names]
        elif isinstance(node, ast.Import):
            names = [each.name for each in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        else:
            continue
        if any(name.startswith("torch.distributed") for name in names):
            lines.append(node.lineno)
    return lines


@pytest.mark.parametrize("line", ["import torch.distributed", "from torch import distributed", "torch.distributed.x()"])
def test_a_use_is_found(line):
    assert uses(line) and not uses("import torch")


def test_nothing_else_calls_torch_distributed():
    paths = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    assert DOOR in paths and uses(DOOR.read_text())
    assert [path for path in paths if path != DOOR and uses(path.read_text())] == []


OTHER_DEVICE = """
import torch
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore
from learner.collectives import Ranks

distributed.init_process_group("meta:fake", store=FakeStore(), rank=0, world_size=2)
try:
    Ranks("cpu").summed(1)
except RuntimeError as error:
    print(error)
print(Ranks("meta").total(torch.ones(2)).device)
"""


def test_tensors_are_made_on_the_rank_s_device():
    """In a process group that moves tensors of one type of device alone, as NCCL's does: here torch's tensors without
    values, by a backend that does nothing."""
    done = subprocess.run(
        [sys.executable, "-c", OTHER_DEVICE], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.splitlines()[-2:] == ["No backend type associated with device type cpu", "meta"]
