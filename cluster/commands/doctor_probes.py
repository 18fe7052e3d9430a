"""The probes of `medreasoner doctor`: each imports one heavy library and does one tiny thing with it.

`python -m cluster.commands.doctor_probes NAME` runs one probe and prints, last, a line `RESULT …` that says what was
seen. Exceptions and crashes are left to the caller.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from math import log

RESULT = "RESULT "


def torch() -> str:
    """Multiply two matrices on the CPU and on every GPU that torch sees."""
    import torch

    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    for device in devices:
        product = torch.ones(8, 8, device=device) @ torch.ones(8, 8, device=device)
        if product.sum().item() != 512:
            raise RuntimeError(f"a product of ones is wrong on {device}")
    if torch.version.cuda and len(devices) == 1 and shutil.which("nvidia-smi"):
        raise RuntimeError("a CUDA build sees no GPU although nvidia-smi is here; libcuda is missing or too old for it")
    return f"matrix product right on {', '.join(devices)}"


def torchvision() -> str:
    """Resize an image, which is what the reasoner's processors need torchvision for."""
    import torch
    from torchvision.transforms import v2

    shape = tuple(v2.functional.resize(torch.zeros(3, 8, 8, dtype=torch.uint8), [4, 4]).shape)
    if shape != (3, 4, 4):
        raise RuntimeError(f"a resized image has shape {shape}")
    shimmed = "medreasoner_torchvision_shim" in sys.modules
    return "resizes an image" + (", its operators declared by the shim" if shimmed else "")


def transformers() -> str:
    """Run a two-layer Qwen2.5-VL text model with random weights."""
    import torch
    from transformers.models.qwen2_5_vl import Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel

    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    config = Qwen2_5_VLTextConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        rope_parameters=rope,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    states = Qwen2_5_VLTextModel(config)(input_ids=torch.arange(4)[None]).last_hidden_state
    if not torch.isfinite(states).all():
        raise RuntimeError("a tiny Qwen2.5-VL gives values that are not finite")
    return "a tiny Qwen2.5-VL text model runs"


def segment_anything() -> str:
    """Encode a box with segment-anything's prompt encoder."""
    import torch
    from segment_anything.modeling import PromptEncoder

    encoder = PromptEncoder(embed_dim=8, image_embedding_size=(4, 4), input_image_size=(64, 64), mask_in_chans=4)
    sparse, _ = encoder(points=None, boxes=torch.tensor([[1.0, 1.0, 9.0, 9.0]]), masks=None)
    if tuple(sparse.shape) != (1, 2, 8):
        raise RuntimeError(f"a box is encoded with shape {tuple(sparse.shape)}")
    return "encodes a box"


def vllm() -> str:
    """Load vLLM's platform, its compiled operators and its Qwen2.5-VL model."""
    import torch
    import vllm.model_executor.models.qwen2_5_vl  # noqa: F401
    from vllm.platforms import current_platform

    if not current_platform.device_type:
        raise RuntimeError("its CUDA build finds no GPU: NVIDIA's libcuda and NVML see none")
    if current_platform.device_type not in ("cpu", "cuda"):
        raise RuntimeError(f"its platform is {current_platform.device_type!r}, not cpu or cuda")
    current_platform.import_kernels()
    if not hasattr(torch.ops._C, "silu_and_mul"):
        raise RuntimeError("its compiled operators (vllm._C) are not loaded")
    return f"platform {current_platform.device_type}, compiled operators loaded, Qwen2.5-VL imports"


def triton() -> str:
    """Compile a C file as Triton does before it runs its first kernel and, where there is a GPU, run one of vLLM's."""
    import torch
    from triton.runtime.build import compile_module_from_src

    source = """
    #include <Python.h>
    static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "medreasoner_doctor", NULL, -1, NULL};
    PyMODINIT_FUNC PyInit_medreasoner_doctor(void) { return PyModule_Create(&module); }
    """
    with tempfile.TemporaryDirectory() as folder:
        # What was compiled before a compiler went away proves nothing.
        os.environ["TRITON_CACHE_DIR"] = folder
        compile_module_from_src(source, "medreasoner_doctor")
        if not torch.cuda.is_available():
            return "compiles C"
        value = logprob_of_one_in(16)
    if abs(value + log(16)) > 1e-4:
        raise RuntimeError(f"a kernel gives {value} for the log-probability of one in 16")
    return "compiles C, and a kernel of vLLM's sampler is right"


def logprob_of_one_in(tokens: int) -> float:
    """Log-probability of each of so many equally likely tokens, by the kernel of vLLM's sampler; needs a GPU."""
    import torch
    from vllm.v1.worker.gpu.sample.logprob import compute_token_logprobs

    logits = torch.zeros(1, tokens, device="cuda")
    return float(compute_token_logprobs(logits, torch.zeros(1, 1, dtype=torch.int64, device="cuda")).item())


def deepspeed() -> str:
    """Ask DeepSpeed for its accelerator."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed  # noqa: F401
    from deepspeed.accelerator import get_accelerator

    return f"accelerator {get_accelerator()._name}"


def ray() -> str:
    """Start a one-core cluster of its own, run one task, stop it."""
    import ray

    def task() -> int:
        return os.getpid()

    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        worker = ray.get(ray.remote(task).remote())
    finally:
        ray.shutdown()
    if worker == os.getpid():
        raise RuntimeError("the task ran in the driver")
    return "a local cluster starts and runs a task"


PROBES: dict[str, Callable[[], str]] = {
    probe.__name__: probe
    for probe in (torch, torchvision, transformers, segment_anything, deepspeed, triton, vllm, ray)
}


if __name__ == "__main__":
    print(RESULT + PROBES[sys.argv[1]](), flush=True)
