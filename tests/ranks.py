"""What tests of the learner's ranks share: processes that are used again, and what ranks must agree in."""

from functools import partial
from pathlib import Path

import ray
import torch

from actors.config import DeadlineConfig
from actors.learner_rank import LearnerRank
from actors.pools import LearnerPool, gather
from learner.config import LearnerConfig, LearnerTask
from reasoner.model import load_reasoner
from umrg.prompts import PromptSpec

TINY_REASONER = Path(__file__).parents[1] / "models" / "tiny-reasoner"

STEADY = {"lr": 0.1, "eps": 1.0, "threads": 1}
"""What is the same however the work is divided is the gradient, up to its rounding. Adam as it is used divides each
number's gradient by its own size, and so makes a step of the learning rate of what is nothing but rounding. With an eps
far above every gradient a step is proportional to the gradient, and as exact."""


def assert_moved_alike(weights, expected):
    """Both went the same way from the tiny reasoner's weights: each tensor to a thousandth of its way. Beside that a
    millionth of the whole model's way, for tensors whose gradient is little but rounding, and a few roundings of the
    weights themselves, which a norm's gain of 1 hardly rises above."""
    before = dict(load_reasoner(TINY_REASONER).model.named_parameters())
    ways = {name: (tensor - before[name]).norm() for name, tensor in expected.items()}
    whole = torch.stack(list(ways.values())).norm()
    for name, way in ways.items():
        off = (weights[name] - expected[name]).norm()
        assert off <= 1e-3 * way + 1e-6 * whole + 5e-7 * before[name].norm(), name


class Host:
    """A process that holds one rank after another. It imports torch and DeepSpeed once, and keeps its place among the
    ranks, which DeepSpeed takes as it finds it."""

    def become(self, kind, *args, **kwargs):
        self.rank = kind(*args, **kwargs)

    def reduction(self):
        """What DeepSpeed has compiled to reduce with; None where it leaves that to torch."""
        from deepspeed.comm import comm

        return comm.cdb.shm_comm_op

    def call(self, method, *args, **kwargs):
        return getattr(self.rank, method)(*args, **kwargs)


class HostedRank:
    """A host's rank, called as the actor that it would be in a run."""

    def __init__(self, host):
        self._host = host

    def __getattr__(self, method):
        class Call:
            remote = partial(self._host.call.remote, method)

        return Call


def hosted(hosts, ranks, kind, *arguments, **options):
    """Ranks of a kind by name, in the place of those that ran before."""
    made = hosts(ranks)
    ray.get([host.become.remote(kind, *arguments, rank=rank, **options) for rank, host in enumerate(made)])
    return {f"learner {rank}": HostedRank(host) for rank, host in enumerate(made)}


def running(hosts, *, steps=3, kind=LearnerRank, **changes):
    """Started ranks that learn by GRPO; `steps` are those of the whole run."""
    config = LearnerConfig.model_validate({"lr": 1e-4, "micro_batch_tokens": 1000, "threads": 1, **changes})
    task = LearnerTask(model=TINY_REASONER, spec=PromptSpec.of_model(TINY_REASONER), updates=steps, max_tokens=128)
    pool = LearnerPool(hosted(hosts, config.ranks, kind, config, task), DeadlineConfig())
    gather(pool.starting(), seconds=300, doing="starting")
    return pool
