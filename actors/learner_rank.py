"""The learner's actors: one ZeRO rank in a process of its own, which learns by GRPO or from reference answers."""

import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import ray

from actors.engine_report import Receiver, Sent
from actors.failures import TransferFailed
from actors.gpus import ALONE, Lodging, Place, this_place
from actors.weight_files import Bucket, Checksum, pack
from learner.config import LearnerConfig, LearnerTask, ZeroConfig
from learner.update_report import SftReport, UpdateReport
from rewards.scored import ScoredGroup
from umrg.group import Group
from umrg.sample import Sample

if TYPE_CHECKING:
    from actors.weight_sender import WeightSender
    from learner.checkpoint import Records
    from learner.grpo import GrpoRank
    from learner.sft import SftRank
    from learner.zero import ZeroRank


class ZeroActor:
    """One ZeRO rank, number `rank` of `config.ranks`. `start` must have returned on every rank before any other method
    is called. Methods marked "all ranks" are collectives."""

    def __init__(self, config: ZeroConfig, task: LearnerTask, *, rank: int) -> None:
        self._config, self._task, self._rank = config, task, rank
        self._zero: ZeroRank | None = None

    def place(self) -> Place:
        """Where it is; may be called before `start`."""
        return this_place({"model": self._task.model, "runs": self._task.run, "resume": self._task.resume})

    def address(self) -> tuple[str, int]:
        """A rendezvous for the ranks: this host and one of its free ports."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), int(probe.getsockname()[1])

    def start(self, host: str, port: int, seconds: float, lodging: Lodging = ALONE) -> None:
        """Join the process group and load the model; a collective times out after `seconds`. Raises ValueError if the
        model cannot be loaded."""
        config, self._task = self._config, replace(self._task, model=lodging.local(self._task.model))
        import torch

        from actors.threads import share_cores
        from learner.checkpoint import RankCheckpoints
        from learner.collectives import join
        from learner.zero import ZeroRank

        share_cores(config.threads, lodging.sharers)
        torch.manual_seed(self._task.seed)
        device = "cuda" if config.num_gpus > 0 else "cpu"
        join(self._rank, config.ranks, host=host, port=port, device=device, seconds=seconds)
        self._zero = ZeroRank(config, self._task, device=device)
        self._checkpoints = RankCheckpoints(self._zero)

    def save(self, folder: Path) -> None:
        """Copy optimizer, model and random state to host memory and begin to write them; all ranks."""
        self._checkpoints.save(folder)

    def saved(self, seconds: float) -> "Records | None":
        """The files that `save` wrote, told once; None if this rank is still writing after `seconds`."""
        return self._checkpoints.saved(seconds)

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote; all ranks."""
        self._checkpoints.load(folder)

    def running(self) -> "ZeroRank":
        """The rank; it must have been started."""
        assert self._zero is not None, "the learner was not started"
        return self._zero


class LearnerRank(ZeroActor):
    """A rank that learns by GRPO."""

    def __init__(self, config: LearnerConfig, task: LearnerTask, *, rank: int) -> None:
        super().__init__(config, task, rank=rank)
        self._grpo_config = config
        self._grpo: GrpoRank | None = None
        self._sender: WeightSender | None = None

    def start(self, host: str, port: int, seconds: float, lodging: Lodging = ALONE) -> None:
        """As `ZeroActor.start`; the reference model is loaded too, if the objective needs it."""
        super().start(host, port, seconds, lodging)
        from learner.grpo import GrpoRank

        self._grpo = GrpoRank(self.running(), self._grpo_config)

    def update(
        self, groups: Sequence[tuple["ray.ObjectRef[Group]", "ray.ObjectRef[ScoredGroup]"]], work: Sequence[int]
    ) -> UpdateReport:
        """Learn from the groups of a step. Each rank fetches its own share from the object store, by the groups' `work`
        (`LearnerConfig.work`); all ranks."""
        assert self._grpo is not None, "the learner was not started"
        return self._grpo.update(work, lambda i: fetched(*groups[i]))

    def weights(self, everything: bool) -> tuple[str, list["ray.ObjectRef[Bucket]"]]:
        """Checksum of the weights, and references of their buckets, both from the first rank; all ranks. everything:
        those of modules of which nothing learns too."""
        checksum, buckets, exact = Checksum(), [], self._grpo_config.sha256
        for tensors in self.running().named_weights(everything=everything):
            if tensors:
                checksum.add(tensors, exact=exact)
                buckets.append(ray.put(pack(tensors, exact=exact)))
        return checksum.hexdigest(), buckets

    def connect(self, direct: str, receivers: Sequence[Receiver], host: str, port: int, seconds: float) -> None:
        """Form a group with engines, to which `send` sends directly, in the place of the one before; all ranks. host,
        port: of the first rank. seconds, errors: as of `WeightSender`."""
        from actors.weight_sender import WeightSender

        self._disconnect()
        exact = self._grpo_config.sha256
        self._sender = WeightSender(
            self.running(), receivers, direct, host=host, port=port, exact=exact, seconds=seconds
        )

    def send(self, version: int, everything: bool, seconds: float) -> Sent:
        """Send weights of a version to the engines of the group; all ranks. Raises TransferFailed, on the first rank,
        if they did not arrive within so many seconds; another group must then be formed."""
        assert self._sender is not None, "the learner is not connected with engines"
        try:
            return self._sender.send(version, everything=everything, seconds=seconds)
        except TransferFailed:
            self._disconnect()
            raise

    def _disconnect(self) -> None:
        before, self._sender = self._sender, None
        if before is not None:
            before.close()

    def logprobs(self, group: Group, token_ids: Sequence[int]) -> list[float]:
        """Log-probs of a completion's tokens to a group's prompt; all ranks."""
        import torch

        from learner.shared_prefix import Branches

        zero, sample = self.running(), group.sample
        prompt = zero.reasoner.encode(sample.query, zero.reasoner.encode_image(sample.image()))
        with torch.no_grad():
            scores = zero.scores([Branches(prefix=prompt, branches=[torch.tensor(token_ids)])])
        values: list[float] = scores.logprobs.tolist()
        return values

    def park(self, state: bool) -> None:
        """Give the GPU to an engine, as `ZeroRank.park`."""
        self.running().park(state=state)

    def unpark(self) -> None:
        """Take the GPU back."""
        self.running().unpark()


class SupervisedRank(ZeroActor):
    """A rank that learns from reference answers. Every method is a collective and is given all images, each as the list
    of the samples that ask about it; a rank takes its own share."""

    def update(self, images: Sequence[Sequence[Sample]]) -> SftReport:
        """One update towards the reference answers."""
        return self._sft().update(images)

    def loss(self, images: Sequence[Sequence[Sample]]) -> tuple[float, int]:
        """Summed negative log-likelihood of the reference answers, in nats, and the number of their tokens."""
        return self._sft().loss(images)

    def _sft(self) -> "SftRank":
        from learner.sft import SftRank

        return SftRank(self.running())


def fetched(group: "ray.ObjectRef[Group]", scored: "ray.ObjectRef[ScoredGroup]") -> ScoredGroup:
    """A scored group from the object store, its row's image joined to it again."""
    found: ScoredGroup = ray.get(scored)
    return replace(found, group=ray.get(group))
