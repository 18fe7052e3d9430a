"""Whether an environment of the GPU set is whole; needs no GPU: `make check-gpu-install` makes one and runs this in it.

Everything is installed as constraints/gpu.txt says and can be imported. vLLM's compiled libraries need the driver's
libcuda.so.1. A stand-in for it is compiled here, in which every function fails; with it the libraries load if they fit
this build of torch.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from sysconfig import get_path

from cluster.commands.doctor_gpu import LEAST_CAPABILITY, cuda_of_torch, pinned_cuda
from cluster.commands.doctor_versions import installed_versions, read_constraints

ROOT = Path(__file__).parents[1]
PINS = ROOT / "constraints" / "gpu.txt"
MODULES = (
    *("torch", "torchvision", "torchaudio", "transformers", "segment_anything", "peft", "triton", "flashinfer"),
    *("deepspeed", "ray", "vllm.v1.engine.async_llm", "vllm.v1.worker.gpu_worker", "vllm.v1.worker.gpu.model_runner"),
    *("vllm.model_executor.models.qwen2_5_vl", "vllm.model_executor.models.qwen3_vl"),
    *("actors.engine", "actors.weight_transfer", "actors.rollout", "actors.segmenter", "actors.learner_rank"),
    *("learner.zero", "learner.grpo", "learner.sft", "learner.memory"),
    *("cluster.train", "cluster.sft", "cluster.evaluate", "serving.app", "serving.grounder"),
)
COMPILED = ("vllm._C_stable_libtorch", "vllm.vllm_flash_attn", "vllm.cumem_allocator")


def other_versions() -> list[str]:
    """What is missing, or of another version than pinned."""
    installed = installed_versions()
    pins = read_constraints(PINS)
    return [
        f"{name} is {installed.get(name, 'missing')}, pinned {version}"
        for name, version in pins.items()
        if installed.get(name, "").split("+")[0] != version
    ]


def other_torch() -> list[str]:
    """How torch's build differs from what the doctor says of it."""
    import torch

    found = []
    if cuda_of_torch() != pinned_cuda(PINS) or torch.version.cuda != pinned_cuda(PINS):
        found.append(f"torch is built for CUDA {torch.version.cuda}, pinned {pinned_cuda(PINS)}")
    kernels = min(int(name.removeprefix("sm_")) for name in (torch._C._cuda_getArchFlags() or "sm_0").split())
    if divmod(kernels, 10) != LEAST_CAPABILITY:
        found.append(f"torch's kernels begin at sm_{kernels}; correct LEAST_CAPABILITY")
    return found


def import_fault(module: str, environment: dict[str, str]) -> list[str]:
    """Why a module cannot be imported in a process of its own; empty if it can."""
    # The libraries declare their operators on torch's.
    command = [sys.executable, "-W", "ignore", "-c", f"import torch, {module}"]
    outcome = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    print(f"{'ok  ' if outcome.returncode == 0 else 'FAIL'} {module}", flush=True)
    return [f"{module}: {(outcome.stderr.strip() or 'killed').splitlines()[-1]}"] if outcome.returncode else []


def stand_in_for_driver(folder: Path) -> None:
    """Compile a libcuda.so.1 with every function that vLLM's libraries take from it. Needs cc and nm."""
    names: set[str] = set()
    for library in Path(get_path("platlib"), "vllm").rglob("*.so"):
        command = ["nm", "-D", "--undefined-only", str(library)]
        symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        names.update(symbol for symbol in symbols if re.match("cu[A-Z]", symbol))
    source = folder / "cuda.c"
    source.write_text("".join(f"int {name}(void) {{ return 999; }}\n" for name in sorted(names)), encoding="utf-8")
    output = folder / "libcuda.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", f"-Wl,-soname,{output.name}", "-o", output, source], check=True)


def main() -> int:
    """Print what is wrong; the exit code is 1 if anything is."""
    faults = other_versions() + other_torch()
    checked = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False)
    faults += checked.stdout.splitlines() if checked.returncode else []
    plain = dict(os.environ)
    for module in MODULES:
        faults += import_fault(module, plain)
    with tempfile.TemporaryDirectory() as folder:
        stand_in_for_driver(Path(folder))
        paths = [folder, *filter(None, [plain.get("LD_LIBRARY_PATH")])]
        for module in COMPILED:
            faults += import_fault(module, plain | {"LD_LIBRARY_PATH": os.pathsep.join(paths)})
    print("\n".join(faults) or "the GPU set is whole")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
