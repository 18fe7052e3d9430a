"""Whether an environment of the GPU set is whole, on a machine without a GPU: `make check-gpu-install` runs it there.

    python -m tests.gpu_install

Everything is at the version that constraints/gpu.txt names, and imports. vLLM's compiled libraries need the driver's
libcuda.so.1, of which a stand-in is compiled here, with the functions that they name and that all fail: then it shows
whether the libraries fit this build of torch.
"""

import os
import subprocess
import sys
import tempfile
from importlib.metadata import distributions
from pathlib import Path

from cluster.commands.doctor_gpu import LEAST_CAPABILITY, cuda_of_torch, pinned_cuda
from cluster.commands.doctor_versions import read_constraints
from umrg.package_names import normalised

ROOT = Path(__file__).parents[1]
PINS = ROOT / "constraints" / "gpu.txt"
MODULES = (
    *("torch", "torchvision", "torchaudio", "transformers", "segment_anything", "peft", "triton", "flashinfer"),
    *("vllm.v1.worker.gpu_worker", "vllm.v1.worker.gpu.model_runner", "vllm.model_executor.models.qwen2_5_vl"),
    *("vllm.model_executor.models.qwen3_vl", "actors.engine", "actors.weight_transfer", "actors.segmenter"),
    *("learner.zero", "learner.grpo", "learner.sft", "cluster.train", "cluster.sft", "cluster.evaluate", "serving.app"),
)
COMPILED = ("vllm._C_stable_libtorch", "vllm.vllm_flash_attn", "vllm.cumem_allocator")
