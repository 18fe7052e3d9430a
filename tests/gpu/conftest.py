"""What `make test-gpu` runs: real shapes on a GPU, with random weights and no download.

On a machine without a GPU the same tests are a rehearsal, with the tiny model and short lengths. The report's header
says which it is, and what stands in for what only a GPU has. `test_learner.py` needs torch, transformers and DeepSpeed
alone.
"""

import gc
import os
import socket
import time
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import wait

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
    """Of `bench.published_shapes.write_reasoner`."""
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
    Scale(device="cuda", shape="Qwen2.5-VL-7B", layers=4, work=PUBLISHED)
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


def held():
    """Bytes of the tensors that this process holds on the device; what it keeps for later ones is given back."""
    gc.collect()
    if ON_GPU:
        torch._C._cuda_clearCublasWorkspaces()  # kept by torch after the first matrix product
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated()
    alive = [each for each in gc.get_objects() if type(each) is torch.Tensor]
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in alive}.values())


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def in_processes(function, arguments, environments=({},), seconds=400):
    """Call a function in a process for each environment, with the environment's index as the first argument where there
    are several. DeepSpeed's engines need one, since they hold on to a GPU's memory beyond their `destroy`; and so does
    CUDA_VISIBLE_DEVICES, which is read when torch first looks for GPUs, at an import."""
    processes = []
    for i, environment in enumerate(environments):
        own = (i, *arguments) if len(environments) > 1 else arguments
        processes.append(get_context("spawn").Process(target=function, args=own))
        kept = dict(os.environ)
        os.environ.update(environment)
        try:
            processes[-1].start()
        finally:
            os.environ.clear()
            os.environ.update(kept)
    deadline = time.monotonic() + seconds
    try:
        while running := [process.sentinel for process in processes if process.exitcode is None]:
            assert wait(running, deadline - time.monotonic()), f"{function.__name__} did not end within {seconds} s"
            # One that failed leaves the others waiting for it.
            failed = [process.exitcode for process in processes if process.exitcode]
            assert not failed, f"{function.__name__} failed; its traceback is in the captured output"
    finally:
        for process in processes:
            process.kill()
            process.join(30)
