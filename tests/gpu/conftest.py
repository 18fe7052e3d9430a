"""What `make test-gpu` runs: real shapes on a GPU, with random weights and no download.

On a machine without a GPU the same tests run as a rehearsal, with the tiny model and short lengths. The report's header
says which it is, and what stands in for a GPU's own operators.

`test_learner.py` needs torch, transformers and DeepSpeed alone; `make test-gpu PART=learner` runs it by itself.
"""

import os
from dataclasses import dataclass

import pytest
import torch

from bench.published_shapes import PUBLISHED, REHEARSAL, Work, write_reasoner

ON_GPU = torch.cuda.is_available()
os.environ.setdefault("DS_ACCELERATOR", "cuda" if ON_GPU else "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The size of what is tested."""

    device: str
    shape: str
    """Of `bench.published_shapes.SHAPES`."""
    layers: int | None
    """Of the language model; None for all."""
    work: Work
    dtype: str = "bfloat16"


# With 4 of 28 layers a 7B has 2.7e9 parameters: 49 GB of weights, fp32 gradients and optimizer state on one rank.
SCALE = (
    Scale(device="cuda", shape="7b", layers=4, work=PUBLISHED)
    if ON_GPU
    else Scale(device="cpu", shape="tiny", layers=None, work=REHEARSAL)
)


def pytest_report_header():
    if ON_GPU:
        return f"GPU tests on {torch.cuda.get_device_name()}, torch {torch.__version__}"
    return "GPU tests: a rehearsal on a CPU with the tiny model. Stand-ins: attention by the CPU's kernels; gloo for NCCL"


@pytest.fixture(scope="session")
def scale():
    return SCALE


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A reasoner folder with random weights."""
    return write_reasoner(
        tmp_path_factory.mktemp("reasoner"), SCALE.shape, layers=SCALE.layers, device=SCALE.device
    )


@pytest.fixture(scope="session")
def process_group():
    """This process as the only rank."""
    import socket

    from learner.collectives import join

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    join(0, 1, host="127.0.0.1", port=port, device=SCALE.device, seconds=300)
