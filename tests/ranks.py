"""Shared by the tests of the learner's ranks: processes that are reused, and what the ranks must agree on."""

from functools import partial
from pathlib import Path

import ray
import torch

from actors.calls import Calls
from actors.config import DeadlineConfig
from actors.learner_rank import LearnerRank
from actors.pools import LearnerPool
from learner.config import LearnerConfig, LearnerTask
from reasoner.model import load_reasoner
from rewards.scored import ScoredAnswer, ScoredGroup
from rewards.scoring import Reward
from umrg.answers import parse_answer
from umrg.prompts import PromptSpec

TINY_REASONER = Path(__file__).parents[1] / "models" / "tiny-reasoner"

STEADY = {"lr": 0.1, "eps": 1.0, "threads": 1}
"""However the work is divided over ranks and ZeRO stages, the gradient is the same up to rounding; the step of Adam is
not, because Adam normalises each component's gradient by its own magnitude and so turns pure rounding noise into a step
of the size of the learning rate. With an eps far above every gradient a step is proportional to the gradient, and as
exact."""


def assert_moved_alike(weights, expected):
    """Both models moved by the same update from the tiny reasoner's weights: each tensor to a thousandth of the norm of
    its update. Two absolute tolerances are added: a millionth of the whole model's update, for tensors whose gradient
    is mostly rounding noise, and a few roundings of the weights themselves, because the update of a norm's gain of 1 is
    hardly larger than those."""
    before = dict(load_reasoner(TINY_REASONER).model.named_parameters())
    updates = {name: (tensor - before[name]).norm() for name, tensor in expected.items()}
    whole = torch.stack(list(updates.values())).norm()
    for name, update in updates.items():
        difference = (weights[name] - expected[name]).norm()
        assert difference <= 1e-3 * update + 1e-6 * whole + 5e-7 * before[name].norm(), name


class Host:
    """A process that hosts one rank after another. It imports torch and DeepSpeed once and stays in the same process
    group, which `deepspeed.init_distributed` reuses if it is initialised."""

    def become(self, kind, *args, **kwargs):
        self.rank = kind(*args, **kwargs)

    def reduction(self):
        """DeepSpeed's own compiled reduction; None if it leaves reductions to torch."""
        from deepspeed.comm import comm

        return comm.cdb.shm_comm_op

    def compiled(self):
        """Names of DeepSpeed's own operators that this process has compiled or loaded."""
        from deepspeed.ops.op_builder.builder import OpBuilder

        return sorted(OpBuilder._loaded_ops)

    def call(self, method, *args, **kwargs):
        return getattr(self.rank, method)(*args, **kwargs)


class HostedRank:
    """The rank of a host, with the interface of the Ray actor that it is in a run."""

    def __init__(self, host):
        self._host = host

    def __getattr__(self, method):
        class Call:
            remote = partial(self._host.call.remote, method)

        return Call


def hosted(hosts, ranks, kind, *arguments, **options):
    """Ranks of a class by name; they replace the ranks that the hosts held before."""
    made = hosts(ranks)
    ray.get([host.become.remote(kind, *arguments, rank=rank, **options) for rank, host in enumerate(made)])
    return {f"learner {rank}": HostedRank(host) for rank, host in enumerate(made)}


def scored_group(group, samples, rewards):
    """The group as a segmenter would score it, with these rewards."""
    answers = tuple(
        ScoredAnswer(
            reward=Reward(total=reward, parts={}), answer=parse_answer(completion.text), failure=None, metrics={}
        )
        for completion, reward in zip(samples.completions, rewards, strict=True)
    )
    return ScoredGroup(group=group.without_files(), samples=samples, answers=answers)


def running(hosts, *, steps=3, kind=LearnerRank, **changes):
    """Started ranks that learn by GRPO. steps: of the whole run."""
    config = LearnerConfig.model_validate({"lr": 1e-4, "micro_batch_tokens": 1000, "threads": 1, **changes})
    task = LearnerTask(model=TINY_REASONER, spec=PromptSpec.of_model(TINY_REASONER), updates=steps, max_tokens=128)
    pool = LearnerPool(hosted(hosts, config.ranks, kind, config, task), DeadlineConfig())
    Calls().gather(pool.starting(), seconds=300, doing="starting")
    return pool
