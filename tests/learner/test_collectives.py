"""One door for collectives, and what its other side was read to do: torch's and DeepSpeed's communication on a GPU."""

import ast
import inspect
import subprocess
import sys
from datetime import timedelta
from importlib import import_module
from pathlib import Path

import pytest
import torch
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
from deepspeed.comm.torch import TorchBackend
from torch import distributed
from torch.distributed.constants import default_pg_timeout

from learner.collectives import Ranks
from learner.config import ObjectiveConfig
from learner.grpo import _Sums
from learner.objective import Tokens, token_losses

ROOT = Path(__file__).parents[2]
PACKAGES = ("umrg", "rewards", "phantoms", "reasoner", "learner", "actors", "cluster", "serving")
DOOR = ROOT / "learner" / "collectives.py"
BEHIND = ("torch.distributed", "deepspeed.comm", "deepspeed.init_distributed")


def uses(source: str) -> list[int]:
    """Lines that import or name torch's or DeepSpeed's communication."""
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
        if any(f"{name}.".startswith(f"{behind}.") for name in names for behind in BEHIND):
            lines.append(node.lineno)
    return lines


@pytest.mark.parametrize(
    "line",
    [
        "import torch.distributed",
        "from torch import distributed",
        "torch.distributed.x()",
        "from torch.distributed.distributed_c10d import x",
        "from deepspeed import comm",
        "deepspeed.init_distributed()",
    ],
)
def test_a_use_is_found(line):
    assert uses(line) and not uses("import torch, deepspeed") and not uses("from vllm.distributed import x")


def test_nothing_else_calls_for_a_collective():
    paths = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    assert DOOR in paths and uses(DOOR.read_text())
    assert [path for path in paths if path != DOOR and uses(path.read_text())] == []


OTHER_DEVICE = """
import torch
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore
from learner.collectives import Ranks

def tried(call):
    try:
        call()
    except (RuntimeError, NotImplementedError) as error:
        print(str(error).split("!")[0])

distributed.init_process_group("meta:fake", store=FakeStore(), rank=0, world_size=2)
print(Ranks("meta").total(torch.ones(2)).device)
for device in ("cpu", "meta"):
    ranks = Ranks(device)
    tried(lambda: ranks.summed(1, 2))
    tried(lambda: ranks.highest(1))
    tried(lambda: ranks.with_idle([1], lambda: 0))
"""


def in_a_process(script):
    """Lines that a script prints in a process of its own, which joins a group of its own."""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout.splitlines()


def test_tensors_are_made_on_the_rank_s_device():
    """In a process group that moves tensors of one type of device alone, as NCCL's does: here torch's tensors without
    values, by a backend that does nothing. On that device every collective is passed, and what fails is to read the
    result; on the CPU the group refuses each."""
    refused = "No backend type associated with device type cpu"
    device, *messages = in_a_process(OTHER_DEVICE)[-7:]
    assert device == "meta" and messages[:3] == [refused] * 3
    assert all("meta" in message for message in messages[3:]), messages


BOTH_DEVICES = """
import os
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
from datetime import timedelta
import deepspeed
from deepspeed.utils.groups import _clone_world_group
from torch import device, distributed

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.init_distributed("cpu:gloo,cuda:gloo", timeout=timedelta(seconds=77), verbose=False)
for group in (distributed.group.WORLD, _clone_world_group()):
    print(distributed.get_backend(group), group._get_backend(device("cpu")).options._timeout)
"""


def test_deepspeed_joins_with_a_backend_for_each_device():
    """The names pass through it whole, also to the group that it makes for itself, but the deadline does not: torch's
    own of half an hour holds there. gloo stands in for NCCL, which a CPU build of torch lacks."""
    assert in_a_process(BOTH_DEVICES)[-2:] == ["cpu:gloo,cuda:gloo 0:01:17", "cpu:gloo,cuda:gloo 0:30:00"]


def test_what_a_group_of_gpus_is_given_is_as_it_was_read():
    """A GPU is bound to the group if there are several ranks, so that NCCL meets, or fails, at the start. A deadline
    that passes under NCCL ends the process. With gloo beside NCCL torch's default is 30 minutes, not NCCL's 10."""
    joining = inspect.getsource(TorchBackend.init_process_group)
    assert "kwargs = dict(timeout=timeout, init_method=init_method, rank=rank, world_size=world_size)" in joining
    assert "known_world_size(world_size) != 1" in joining
    assert "kwargs.update(device_id=get_accelerator().device(local_rank))" in joining
    assert "torch.distributed.init_process_group(backend, **kwargs)" in joining
    assert CUDA_Accelerator().device(0) == torch.device("cuda", 0)
    parameters = inspect.signature(distributed.init_process_group).parameters
    assert {"backend", "timeout", "device_id"} <= parameters.keys()
    assert "aborted asynchronously and the process will crash" in str(inspect.getdoc(distributed.init_process_group))
    assert default_pg_timeout == timedelta(minutes=30)


STAGE_2 = "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer"
STAGE_3 = "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3"


@pytest.mark.parametrize(
    ("optimizer", "method", "made"),
    [
        (STAGE_2, "has_overflow", "overflow.byte().to("),
        (STAGE_2, "has_overflow", "get_accelerator().ByteTensor([overflow])"),
        (STAGE_2, "get_grad_norm_direct", ".to(get_accelerator().current_device_name())"),
        (STAGE_2, "complete_grad_norm_calculation_for_cpu_offload", "get_accelerator().FloatTensor("),
        (STAGE_3, "has_overflow", ".to(get_accelerator().current_device_name())"),
        (STAGE_3, "complete_grad_norm_calculation_for_cpu_offload", "get_accelerator().FloatTensor("),
    ],
)
def test_deepspeed_reduces_norm_and_overflow_on_the_accelerator(optimizer, method, made):
    """Also with offload, where the gradients lie in host memory."""
    module, _, name = optimizer.rpartition(".")
    # Of the class, because DeepSpeed decorates its methods.
    (body,) = ast.parse(inspect.getsource(getattr(import_module(module), name))).body
    assert isinstance(body, ast.ClassDef)
    sources = {each.name: ast.unparse(each) for each in body.body if isinstance(each, ast.FunctionDef)}
    assert made in sources[method]


def test_the_accelerator_s_tensors_are_on_the_gpu():
    for tensor in (CUDA_Accelerator().FloatTensor, CUDA_Accelerator().ByteTensor):
        assert tensor.keywords["device"] == "cuda"


@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_no_micro_batch_makes_the_host_wait_for_the_gpu(one_rank, kind):
    """Losses and the report's sums of tensors without values: whatever looked at one would fail."""
    zeros = torch.zeros(6, device="meta")
    tokens = Tokens(
        logprobs=zeros.clone().requires_grad_(),
        entropy=zeros,
        old_logprobs=zeros,
        engine_logprobs=zeros,
        advantages=zeros,
        answer=zeros.long(),
        reference_logprobs=zeros,
    )
    objective = ObjectiveConfig(kl=0.1, entropy=0.1, ratio=kind, correction=kind, dual_clip=3)
    losses = token_losses(tokens, objective)
    _Sums(Ranks("meta")).add(tokens, losses, zeros)
    assert losses.loss.device.type == "meta" and losses.loss.requires_grad
