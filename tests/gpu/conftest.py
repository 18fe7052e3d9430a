"""What `make test-gpu` runs: real shapes on a GPU, with random weights and no download.

On a machine without a GPU the same tests are a rehearsal, with the tiny model and short lengths. The report's header
says which it is, and what stands in for what only a GPU has. `test_learner.py` needs torch, transformers and DeepSpeed
alone.
"""

import os
import socket
from dataclasses import dataclass

import pytest
import torch

from bench.published_shapes import PUBLISHED, REHEARSAL, Work, write_reasoner

ON_GPU = torch.cuda.is_available()
os.environ["DS_ACCELERATOR"] = "cuda" if ON_GPU else "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The size of what is tested, and where."""

    device: str
    shape: str
    """Of `bench.published_shapes.SHAPES`."""
    layers: int | None
    """Of the language model; None for all."""
    work: Work
    dtype: str = "bfloat16"

    @property
    def gpus(self) -> float:
        """GPUs of an actor that has one to itself."""
        return 1.0 if self.device == "cuda" else 0.0


# With 4 of 28 layers a 7B has 2.7e9 parameters: 49 GB of weights, float32 gradients and optimizer state on one rank.
SCALE = (
    Scale(device="cuda", shape="7b", layers=4, work=PUBLISHED)
    if ON_GPU
    else Scale(device="cpu", shape="tiny", layers=None, work=REHEARSAL)
)


def pytest_report_header():
    if ON_GPU:
        return f"GPU tests on {torch.cuda.get_device_name()}, torch {torch.__version__}"
    return (
        "GPU tests: a rehearsal on a CPU with the tiny model. Stand-ins: attention by CpuFlash for Flash and "
        "MemoryEfficient, gloo for NCCL, AdamW unfused, nothing page-locked, no CUDA graphs"
    )


@pytest.fixture(scope="session")
def scale():
    return SCALE


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A reasoner folder with random weights."""
    return write_reasoner(tmp_path_factory.mktemp("reasoner"), SCALE.shape, layers=SCALE.layers, device=SCALE.device)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def process_group():
    """This process as the only rank."""
    from learner.collectives import join

    join(0, 1, host="127.0.0.1", port=free_port(), device=SCALE.device, seconds=300)
