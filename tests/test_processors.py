"""The numeric tests as other processors would run them.

One machine stands for several: torch's own kernels, MKL's matrix products and oneDNN's convolutions each can be held
to older instructions, which sum in another order. What holds under all of these holds to more than one rounding.
"""

import os
import platform
import subprocess
import sys

import pytest

from tests.conftest import ROOT

PROCESSORS = {
    "torch without vectors": {"ATEN_CPU_CAPABILITY": "default"},
    "MKL of any processor": {"MKL_CBWR": "COMPATIBLE"},
    "oneDNN of SSE 4.1, torch of AVX2": {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "avx2"},
}
KNOWN = """
import hashlib
import torch
from torch.nn.functional import conv2d

made = torch.Generator().manual_seed(0)
a, b = torch.randn(64, 257, generator=made), torch.randn(257, 65, generator=made)
image, kernel = torch.randn(1, 3, 56, 56, generator=made), torch.randn(16, 3, 14, 14, generator=made)
for result in (a @ b, a.softmax(1), conv2d(image, kernel, stride=14)):
    print(hashlib.sha256(result.numpy().tobytes()).hexdigest())
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.machine() != "x86_64", reason="these settings are those of x86 processors"),
]


def known_results(**processor: str) -> str:
    """Digests of a matrix product, a softmax and a convolution."""
    command = [sys.executable, "-c", KNOWN]
    return subprocess.run(command, env=os.environ | processor, check=True, capture_output=True, text=True).stdout


NAMES = list(PROCESSORS)


@pytest.mark.parametrize(
    "names", [NAMES[1:], *(pytest.param([name], marks=pytest.mark.chaos) for name in NAMES)], ids=" and ".join
)
def test_the_numeric_tests_hold_on_another_processor(names):
    """Each setting must change the last bits of a known result: one that this machine ignores would test nothing."""
    usual = known_results()
    assert all(known_results(**PROCESSORS[name]) != usual for name in names)
    processor = {setting: value for name in names for setting, value in PROCESSORS[name].items()}
    # By name: to collect all others takes as long as some of these.
    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.numeric" in path.read_text()]
    command = [sys.executable, "-m", "pytest", "-m", "numeric and not slow", "-q", "-W", "ignore"]
    command += ["-p", "no:cacheprovider", *files]
    if processor.get("ATEN_CPU_CAPABILITY") == "default":
        # vLLM's engine dies where torch has no vectors.
        command += ["--ignore", str(ROOT / "tests" / "cluster" / "test_collect.py")]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | processor, capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stdout[-6000:]
