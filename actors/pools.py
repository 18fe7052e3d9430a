"""The pools of a run's actors, as typed facades: nothing else calls `.remote`.

Every wait has a deadline and a name. An actor that died, raised or took too long ends the run with `ActorFailed` or
`DeadlinePassed`, which name the actor and what it was doing.
"""

import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.config import DeadlineConfig
from actors.engine_report import UpdateReceipt
from learner.update_report import SftReport, UpdateReport
from rewards.scored import ScoredGroup, ScoringDepth
from umrg.durable import FileRecord
from umrg.group import Group, GroupSamples, SamplingParams
from umrg.sample import Sample

Ref = Any
"""A Ray object reference; Ray's own type says nothing of what it refers to."""


class ActorFailed(RuntimeError):
    """An actor died, or raised an error that is no mistake of the user's."""


class DeadlinePassed(TimeoutError):
    """A wait took longer than its deadline."""


@dataclass(frozen=True, kw_only=True)
class GroupRefs:
    """A group in Ray's object store, where its image is stored once for all actors."""

    group: Ref
    """Of the `Group` without its row's masks."""
    masks: Ref
    """Of the masks' files (`Sample.mask_bytes`), which only segmenters read."""

    @classmethod
    def put(cls, group: Group) -> Self:
        return cls(group=ray.put(group.without_masks()), masks=ray.put(group.sample.mask_bytes))


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where one actor is placed, and which resources of its placement-group bundle it takes."""

    name: str
    group: Any
    bundle: int
    num_cpus: float
    num_gpus: float
    environment: Mapping[str, str]

    def options(self) -> dict[str, Any]:
        """Ray's options for the actor. GPUs are requested by the actor as well as by its bundle; otherwise
        CUDA_VISIBLE_DEVICES is empty in its process."""
        return {
            "num_cpus": self.num_cpus,
            "num_gpus": self.num_gpus,
            "runtime_env": {"env_vars": dict(self.environment)},
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                placement_group=self.group, placement_group_bundle_index=self.bundle
            ),
        }


def gather(calls: Mapping[str, Ref], *, seconds: float, doing: str) -> list[Any]:
    """The results of calls, in order. calls: by the name of the actor that each was made to."""
    found = dict(as_completed(calls, {name: name for name in calls}, seconds=seconds, doing=doing))
    return [found[name] for name in calls]


def as_completed(
    calls: Mapping[str, Ref],
    owners: Mapping[str, str],
    *,
    seconds: float,
    doing: str,
    meanwhile: Callable[[], None] = lambda: None,
) -> Iterator[tuple[str, Any]]:
    """(key, result) of each call as it ends; the first failure is raised. owners: name of the actor that each call was
    made to, by key. meanwhile: called at least once a second while waiting."""
    deadline = time.monotonic() + seconds
    keys = {ref: key for key, ref in calls.items()}
    pending = list(keys)
    while pending:
        meanwhile()
        ready, pending = ray.wait(pending, num_returns=1, timeout=min(1.0, max(0.0, deadline - time.monotonic())))
        if not ready:
            if time.monotonic() < deadline:
                continue
            late = ", ".join(sorted({owners[keys[ref]] for ref in pending}))
            raise DeadlinePassed(f"{late} did not finish {doing} within {seconds:.0f} s")
        key = keys[ready[0]]
        yield key, _result(ready[0], owners[key], doing)


def _result(ref: Ref, name: str, doing: str) -> Any:
    try:
        return ray.get(ref, timeout=60)
    except RayTaskError as error:
        if isinstance(error.cause, ValueError):
            raise ValueError(f"{name}, {doing}: {error.cause}") from error
        raise ActorFailed(f"{name} failed while {doing}: {type(error.cause).__name__}: {error.cause}") from error
    except (RayActorError, GetTimeoutError) as error:
        raise ActorFailed(f"{name} died while {doing}: {str(error).strip().splitlines()[0]}") from error


class RolloutPool:
    """The rollout actors, by name."""

    def __init__(self, actors: Mapping[str, Any], deadlines: DeadlineConfig) -> None:
        self._actors, self._deadlines = dict(actors), deadlines

    def starting(self, names: Container[str] | None = None) -> dict[str, Ref]:
        """Begin to start these actors; None for all."""
        return {name: actor.start.remote() for name, actor in self._actors.items() if names is None or name in names}

    def sample(
        self,
        groups: Mapping[str, GroupRefs],
        sampling: SamplingParams,
        *,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> Iterator[tuple[str, Ref]]:
        """(group id, reference of its `GroupSamples`) of each group as soon as it is sampled. groups: by id; they are
        assigned round-robin, and each engine batches its own. meanwhile: as in `as_completed`."""
        actors = list(self._actors.items())
        calls, owners = {}, {}
        for i, (id, refs) in enumerate(groups.items()):
            owners[id], actor = actors[i % len(actors)]
            calls[id] = actor.sample.remote(refs.group, sampling)
        doing = "sampling"
        # Each result is fetched for the errors in it, so that they name the rollout; the reference goes on.
        for id, _ in as_completed(calls, owners, seconds=self._deadlines.step, doing=doing, meanwhile=meanwhile):
            yield id, calls[id]

    def update_weights(self, version: int, buckets: Sequence[Ref]) -> dict[str, UpdateReceipt]:
        """Send every engine the weights of a version. Returns what each says of them, by actor. The references travel
        in a list, which Ray does not resolve: the actors fetch one bucket at a time."""
        calls = {name: actor.update_weights.remote(version, list(buckets)) for name, actor in self._actors.items()}
        return dict(zip(calls, gather(calls, seconds=self._deadlines.step, doing="taking new weights"), strict=True))

    def canary(self, group: Ref, sampling: SamplingParams) -> list[GroupSamples]:
        """Each engine's own completions of one group."""
        calls = {name: actor.sample.remote(group, sampling) for name, actor in self._actors.items()}
        return gather(calls, seconds=self._deadlines.step, doing="answering the canary")

    def stop(self) -> None:
        """End the engines' processes. An actor that is gone already has none."""
        refs = [actor.stop.remote() for actor in self._actors.values()]
        ray.wait(refs, num_returns=len(refs), timeout=20)


class SegmenterPool:
    """The segmenter actors, by name."""

    def __init__(self, actors: Mapping[str, Any], deadlines: DeadlineConfig) -> None:
        self._actors, self._deadlines = dict(actors), deadlines
        self._turn = 0

    def starting(self, names: Container[str] | None = None) -> dict[str, Ref]:
        """Calls that load the experts of these actors, None for all, and return their digests."""
        return {name: actor.start.remote() for name, actor in self._actors.items() if names is None or name in names}

    def digests(self) -> list[str]:
        calls = {name: actor.digest.remote() for name, actor in self._actors.items()}
        return gather(calls, seconds=self._deadlines.step, doing="hashing its expert")

    def score(self, group: GroupRefs, samples: Ref, depth: ScoringDepth) -> tuple[str, Ref]:
        """Start to score a group, on the next segmenter in turn. Returns its name and the reference of the coming
        `ScoredGroup`. samples: reference of the group's `GroupSamples`."""
        names = list(self._actors)
        name = names[self._turn % len(names)]
        self._turn += 1
        return name, self._actors[name].score.remote(group.group, group.masks, samples, depth)

    def collect(self, calls: Mapping[str, tuple[str, Ref]]) -> dict[str, ScoredGroup]:
        """The results of calls to `score`, by group id."""
        refs = {group: ref for group, (_, ref) in calls.items()}
        owners = {group: name for group, (name, _) in calls.items()}
        return dict(as_completed(refs, owners, seconds=self._deadlines.step, doing="scoring"))


class RankPool:
    """The ranks of a learner. Every method is called on all of them."""

    def __init__(self, actors: Mapping[str, Any], deadlines: DeadlineConfig) -> None:
        self._actors, self._deadlines = dict(actors), deadlines
        self._saved: dict[str, FileRecord] = {}
        self._saving: list[str] = []

    def starting(self, names: Container[str] | None = None) -> dict[str, Ref]:
        """Begin to start the ranks, which wait for one another: all of them, or none if they are not among `names`."""
        if not self._actors or (names is not None and not any(name in names for name in self._actors)):
            return {}
        first = next(iter(self._actors))
        host, port = gather(
            {first: self._actors[first].address.remote()}, seconds=self._deadlines.start, doing="starting"
        )[0]
        return {name: actor.start.remote(host, port, self._deadlines.step) for name, actor in self._actors.items()}

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
        written = gather(calls, seconds=seconds + self._deadlines.step, doing="writing a checkpoint")
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

    def _all(self, method: str, doing: str, *args: Any) -> list[Any]:
        calls = {name: getattr(actor, method).remote(*args) for name, actor in self._actors.items()}
        return gather(calls, seconds=self._deadlines.step, doing=doing)


class LearnerPool(RankPool):
    """The ranks that learn by GRPO."""

    def update(self, groups: Sequence[tuple[Ref, Ref]], work: Sequence[int]) -> UpdateReport:
        """The updates of one step. groups: references of each `Group` and its `ScoredGroup`; every rank fetches its own
        share, by the groups' `work` (`LearnerConfig.work`). The report is the same on every rank."""
        report: UpdateReport = self._all("update", "updating", list(groups), list(work))[0]
        return report

    def weights(self, *, everything: bool) -> tuple[str, list[Ref]]:
        """The weights' checksum, and references to their buckets. everything: those of modules of which nothing learns
        too."""
        checksum, buckets = self._all("weights", "exporting weights", everything)[0]
        return checksum, buckets

    def logprobs(self, group: Ref, token_ids: Sequence[int]) -> list[float]:
        """Log-probs of a completion's tokens. group: reference of its `Group`."""
        values: list[float] = self._all("logprobs", "scoring the canary", group, token_ids)[0]
        return values


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
