"""The pools of a run's actors, as typed facades: only they and `cluster.hiring` call `.remote`.

Every wait has a deadline and a name. Rollouts and segmenters come and go (`actors.pool`), and what they were doing when
they died is done again. The ranks of a learner live and die together.
"""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from actors.calls import Call, Calls, Ended, Ref
from actors.collector import Post
from actors.config import DeadlineConfig
from actors.engine_report import Receiver, Sent, UpdateReceipt
from actors.experts.desk import CacheUse
from actors.failures import ActorDied, ActorFailed, DeadlinePassed, Lost, TransferFailed
from actors.gpus import ALONE, Lodging
from actors.ledger import Entry
from actors.pool import ERRORS, Member, Pool, Starter
from learner.update_report import SftReport, UpdateReport
from rewards.scored import ScoredGroup, ScoringDepth
from umrg.durable import FileRecord
from umrg.group import Group, GroupSamples, SamplingParams
from umrg.sample import Sample

GROUPS_AT_ONCE = 4
"""Groups that a segmenter has at the same time: those that wait are decoded together, while others are measured."""
FORMING_S = 400.0
"""Seconds within which a group of learner and engines is formed."""


class LearnerDied(ActorDied):
    """A rank of the learner died, hung, or lost what it was to learn from; the others wait for it in a collective, and
    are of no use."""


@dataclass(frozen=True, kw_only=True)
class GroupRefs:
    """A group in Ray's object store, where its image is stored once for all actors."""

    group: Ref
    """Of the `Group` without its row's masks."""
    masks: Ref
    """Of the masks' files (`Sample.mask_bytes`), which only segmenters read."""
    image: str
    """Key of its image (`Sample.image_key`)."""

    @classmethod
    def put(cls, group: Group) -> Self:
        stored, masks = group.without_masks(), group.sample.mask_bytes
        # Asked for before it is stored, so that the key travels with it.
        return cls(image=stored.sample.image_key, group=ray.put(stored), masks=ray.put(masks))


@dataclass(kw_only=True, eq=False)
class Weights:
    """A version of the learner's weights."""

    version: int
    checksum: str
    """As `actors.weight_files.Checksum` has it."""
    buckets: tuple[Ref, ...] | None
    """Of each `Bucket` in Ray's object store; None while it is not there."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where one actor is placed, and which resources it takes."""

    group: Any
    """The run's placement group."""
    bundle: int | None
    """Of the group; None for wherever the cluster has room."""
    num_cpus: float
    num_gpus: float
    environment: Mapping[str, str]
    labels: Mapping[str, str]
    """That its node must have, as Ray's label selectors; a bundle has its own."""
    node: str | None = None
    """Id of the node that it lies on if it can; outside of bundles."""
    spread: bool = False
    """Over the nodes; outside of bundles."""

    def options(self) -> dict[str, Any]:
        """Ray's options for the actor. GPUs are requested by the actor as well as by its bundle; otherwise
        CUDA_VISIBLE_DEVICES is empty in its process."""
        options: dict[str, Any] = {
            "num_cpus": self.num_cpus,
            "num_gpus": self.num_gpus,
            "runtime_env": {"env_vars": dict(self.environment)},
        }
        if self.bundle is not None:
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                placement_group=self.group, placement_group_bundle_index=self.bundle
            )
            return options
        if self.labels:
            options["label_selector"] = dict(self.labels)
        if self.node is not None:
            # Without the second, "soft" lets it wait at a node that is full for as long as that is there.
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(
                self.node, soft=True, _spill_on_unavailable=True
            )
        elif self.spread:
            options["scheduling_strategy"] = "SPREAD"
        return options


class RolloutPool(Pool):
    """The rollout actors."""

    def __init__(self, starter: Starter, calls: Calls, deadlines: DeadlineConfig, *, sequences: int) -> None:
        """sequences: completions that an engine samples at the same time."""
        super().__init__("rollout", starter, bound=1)
        self._calls, self._deadlines, self._sequences = calls, deadlines, sequences
        self.weights: Weights | None = None
        """Those that its members are to work with; None for the model folder's."""

    def sampling(self, groups: Mapping[str, GroupRefs], sampling: SamplingParams) -> Post:
        """Sampling as a stage of work: an engine has as many groups as it samples at once. groups: by id."""

        def make(member: Member, entry: Entry) -> tuple[Ref, Ref]:
            receipt, samples = member.handle.sampled.options(num_returns=2).remote(groups[entry.id].group, sampling)
            return receipt, samples

        return Post(
            pool=self,
            make=make,
            doing="sampling",
            seconds=self._deadlines.step,
            bound=max(1, self._sequences // sampling.n),
            fit=self.renewed,
        )

    def renewed(self, member: Member) -> bool:
        """Whether it works with the current weights; one that does not ends what it has, and gets nothing more before
        it does."""
        return member.holds is self.weights

    def renew(self, received: Callable[[str, Weights, UpdateReceipt], None]) -> None:
        """Send the current weights to members that hold others, each once it has ended what it has, and admit those
        that hold them. received: is given what each says of them, by its name."""
        for member in self.waiting:
            if self.weights and self.weights.buckets is not None:
                self._give(member, self.weights, self.weights.buckets, received)
        for member in self.loaded:
            if self.renewed(member):
                self.admit(member.name)

    @property
    def waiting(self) -> list[Member]:
        """Those that wait for the current weights, with nothing to do."""
        idle = [member for member in (*self.loaded, *self.ready) if not member.flying and member.taking is None]
        return [member for member in idle if not self.renewed(member)]

    def _give(
        self,
        member: Member,
        weights: Weights,
        buckets: Sequence[Ref],
        received: Callable[[str, Weights, UpdateReceipt], None],
    ) -> None:
        """The references travel in a list, which Ray does not resolve: the actor fetches one bucket at a time."""
        sent = replace(weights)  # what is exported anew meanwhile has another checksum

        def taken(ended: Ended) -> None:
            member.taking = None
            if member.name not in self.members:
                return  # it was given up meanwhile
            if ended.fault == "error":
                raise ActorFailed(ended.cause) from ended.error
            if ended.fault == "lost":
                # They are exported anew, or whoever asks for that learns that the learner is dead. The engine holds
                # what it held: one that has begun to replace its weights ends as Broken.
                if weights.buckets is buckets:
                    weights.buckets = None
                member.lost += 1
            if ended.fault and (ended.fault != "lost" or member.lost >= ERRORS):
                self.died(member.name, ended.cause)
            if not ended.fault:
                received(member.name, sent, ended.result)
                member.holds, member.lost = weights, 0

        member.taking = weights
        call = Call(actor=member.name, doing="taking new weights", seconds=self._deadlines.step, then=taken)
        self._calls.add(member.handle.update_weights.remote(weights.version, list(buckets)), call)

    def canary(self, group: Ref, sampling: SamplingParams) -> list[GroupSamples]:
        """The completions of one group by each engine that works with the current weights."""
        refs = {
            member.name: member.handle.sample.remote(group, sampling) for member in self.ready if self.renewed(member)
        }
        found = self._calls.settle(refs, seconds=self._deadlines.step, doing="answering the canary")
        for name, ended in found.items():
            if ended.fault == "error":
                raise ActorFailed(ended.cause) from ended.error
            if ended.fault:
                self.died(name, ended.cause)
        return [ended.result for ended in found.values() if not ended.fault]


class SegmenterPool(Pool):
    """The segmenter actors. A group goes to one that was given its image before, as long as that has room: it has
    most likely kept the image's embedding. ahead: whether those with nothing to do are given images before their groups
    are scored."""

    def __init__(self, starter: Starter, calls: Calls, deadlines: DeadlineConfig, *, ahead: bool = True) -> None:
        super().__init__("segmenter", starter, bound=GROUPS_AT_ONCE)
        self._calls, self._deadlines, self._ahead = calls, deadlines, ahead

    def digests(self) -> list[str]:
        """Of the experts' weights."""
        refs = {member.name: member.handle.digest.remote() for member in self.ready}
        return self._calls.gather(refs, seconds=self._deadlines.step, doing="hashing its expert")

    def cache_use(self) -> CacheUse:
        """Of all members together, since each was asked last. Who has which image is put right by it."""
        refs = {member.name: member.handle.cache_use.remote() for member in self.ready}
        found = self._calls.settle(refs, seconds=self._deadlines.step, doing="counting its embeddings")
        for name, ended in found.items():
            if ended.fault in ("died", "late"):
                self.died(name, ended.cause)
                self._calls.gone(name, ended.cause)
            elif name in self.members and not ended.fault:
                self.members[name].forget(ended.result.kept)
        return sum((ended.result for ended in found.values() if not ended.fault), CacheUse())

    def scoring(self, groups: Mapping[str, GroupRefs], depth: ScoringDepth) -> Post:
        """Scoring as a stage of work; the driver is given the `ScoredGroup`. groups: by id."""

        def make(member: Member, entry: Entry) -> tuple[Ref, Ref]:
            refs, (_, samples) = groups[entry.id], entry.samples
            member.remember(refs.image)
            scored = member.handle.score.remote(refs.group, refs.masks, samples, depth)
            return scored, scored

        def ahead(member: Member, entry: Entry) -> Ref:
            refs = groups[entry.id]
            member.remember(refs.image)
            return member.handle.embed.remote(refs.group, depth)

        return Post(
            pool=self,
            make=make,
            doing="scoring",
            seconds=self._deadlines.step,
            best=lambda entry, member: groups[entry.id].image in member.images,
            ahead=ahead if self._ahead else None,
            fault=_mixed_up,
        )


def _mixed_up(entry: Entry, scored: ScoredGroup) -> str | None:
    """What is wrong with a scored group, which a broken segmenter could have mixed up."""
    if scored.group.id != entry.id:
        return f"it scored {scored.group.id} in place of {entry.id}"
    asked = len(scored.samples.completions)
    return None if len(scored.answers) == asked else f"{len(scored.answers)} answers scored of {asked}"


class RankPool:
    """The ranks of a learner. Every method is called on all of them."""

    def __init__(self, actors: Mapping[str, Any], deadlines: DeadlineConfig, calls: Calls | None = None) -> None:
        self._actors, self._deadlines, self._calls = dict(actors), deadlines, Calls() if calls is None else calls
        self.meanwhile: Callable[[], None] = lambda: None
        """Called at least once a second while the ranks are waited for."""
        self.busy = False
        """Whether they are waited for."""
        self._saved: dict[str, FileRecord] = {}
        self._saving: list[str] = []

    def starting(
        self, names: Container[str] | None = None, lodging: Callable[[str], Lodging] = lambda name: ALONE
    ) -> dict[str, Ref]:
        """Begin to start the ranks, which wait for one another: all of them, or none if they are not among `names`.
        lodging: what a rank is told of its place."""
        if not self._actors or (names is not None and not any(name in names for name in self._actors)):
            return {}
        first = next(iter(self._actors))
        host, port = self._gather({first: self._actors[first].address.remote()}, self._deadlines.start, "starting")[0]
        return {
            name: actor.start.remote(host, port, self._deadlines.step, lodging(name))
            for name, actor in self._actors.items()
        }

    def become(self, actors: Mapping[str, Any]) -> None:
        """Other actors, in the place of those that are gone; what they were writing is not awaited any more."""
        self._actors, self._saved, self._saving = dict(actors), {}, []

    def save(self, folder: Path) -> None:
        """Begin to write state and model; `saved` says when they are written."""
        self._all("save", "copying its state", folder)
        self._saved, self._saving = {}, list(self._actors)

    def saved(self, *, wait: bool) -> dict[str, FileRecord] | None:
        """The files that all ranks wrote, by their paths in the folder, returned once; None while a rank is still
        writing. wait: until all are written. Raises ActorFailed if one could not write, DeadlinePassed if one takes too
        long."""
        seconds = float(self._deadlines.step) if wait else 0.0
        calls = {name: self._actors[name].saved.remote(seconds) for name in self._saving}
        written = self._gather(calls, seconds + self._deadlines.step, "writing a checkpoint")
        for name, files in zip(calls, written, strict=True):
            if files is not None:
                self._saved.update(files)
                self._saving.remove(name)
        if wait and self._saving:
            raise DeadlinePassed(f"{', '.join(self._saving)} did not write a checkpoint within {seconds:.0f} s")
        return None if self._saving else self._saved

    def load(self, folder: Path) -> None:
        """Restore what was saved."""
        self._all("load", "reading a checkpoint", folder)

    def _all(self, method: str, doing: str, *args: Any, seconds: float | None = None) -> list[Any]:
        calls = {name: getattr(actor, method).remote(*args) for name, actor in self._actors.items()}
        return self._gather(calls, self._deadlines.step if seconds is None else seconds, doing)

    def _gather(self, calls: Mapping[str, Ref], seconds: float, doing: str) -> list[Any]:
        self.busy = True
        try:
            return self._calls.gather(calls, seconds=seconds, doing=doing, meanwhile=self.meanwhile)
        except (ActorDied, DeadlinePassed, Lost) as error:
            raise LearnerDied(str(error)) from error
        finally:
            self.busy = False


class LearnerPool(RankPool):
    """The ranks that learn by GRPO."""

    def update(self, groups: Sequence[tuple[Ref, Ref]], work: Sequence[int]) -> UpdateReport:
        """The updates of one step. groups: references of each `Group` and its `ScoredGroup`; every rank fetches its own
        share, by the groups' `work` (`LearnerConfig.work`). The report is the same on every rank."""
        report: UpdateReport = self._all("update", "updating", list(groups), list(work))[0]
        return report

    def weights(self, version: int, *, everything: bool) -> Weights:
        """The weights, which are of this version. everything: those of modules of which nothing learns too."""
        checksum, buckets = self._all("weights", "exporting weights", everything)[0]
        return Weights(version=version, checksum=checksum, buckets=tuple(buckets))

    def logprobs(self, group: Ref, token_ids: Sequence[int]) -> list[float]:
        """Log-probs of a completion's tokens. group: reference of its `Group`."""
        values: list[float] = self._all("logprobs", "scoring the canary", group, token_ids)[0]
        return values

    def park(self, *, state: bool) -> None:
        """Give the GPUs to engines. state: the optimizer's goes to host memory too."""
        self._all("park", "giving its GPU away", state)

    def unpark(self) -> None:
        """Take the GPUs back from engines that sleep."""
        self._all("unpark", "taking its GPU back")

    def connect(self, direct: str, receivers: Sequence[Receiver]) -> None:
        """Form a group of the learner's first rank and engines, in the place of the one before. direct: name of a
        sender in vLLM's `WeightTransferTrainerFactory`. Raises TransferFailed if the engines do not meet the learner,
        which vLLM waits for 300 s at most, and LearnerDied if the group hangs after that, which only the end of the
        process frees."""
        first = next(iter(self._actors))
        host, port = self._gather({first: self._actors[first].address.remote()}, self._deadlines.step, "connecting")[0]
        seconds = min(FORMING_S, float(self._deadlines.step))
        self._transfer("connect", "connecting with engines", direct, list(receivers), host, port, seconds=seconds)

    def send(self, version: int, *, everything: bool) -> Sent:
        """Send weights of a version to the engines of the group. everything: as in `weights`. Raises TransferFailed if
        they did not arrive; another group must then be formed."""
        sent: Sent = self._transfer("send", "sending weights to engines", version, everything)[0]
        return sent

    def _transfer(self, method: str, doing: str, *args: Any, seconds: float | None = None) -> list[Any]:
        """As `_all`. The ranks give up, and end the group, before they are given up themselves; and before the others'
        gathers time out, which DeepSpeed does after half an hour."""
        given = self._deadlines.step if seconds is None else seconds
        try:
            return self._all(method, doing, *args, min(0.8 * given, 1500.0), seconds=given)
        except ActorFailed as error:
            if isinstance(failed := getattr(error.__cause__, "cause", None), TransferFailed):
                raise TransferFailed(str(failed)) from error
            raise


class SupervisedPool(RankPool):
    """The ranks that learn from reference answers. An image is given as the list of the samples that ask about it."""

    def update(self, images: Sequence[Sequence[Sample]]) -> SftReport:
        """One update; the report is the same on every rank."""
        report: SftReport = self._all("update", "updating", ray.put(images))[0]
        return report

    def loss(self, images: Sequence[Sequence[Sample]]) -> tuple[float, int]:
        """Summed negative log-likelihood of the reference answers, in nats, and how many tokens they have."""
        summed, tokens = self._all("loss", "validating", ray.put(images))[0]
        return summed, tokens
