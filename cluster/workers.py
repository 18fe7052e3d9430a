"""The actors of a run: listed by its job, started together, and ended with the run, however it ends.

A job lists its actors with `rollouts`, `segmenters` and `ranks`:

    [*ranks(LearnerRank, config.learner, task), *rollouts(…), *segmenters(…)] ──started──► Workers
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.util.placement_group import placement_group, remove_placement_group

from actors.calls import Calls
from actors.config import EndpointConfig, RolloutConfig, SegmenterConfig
from actors.connection import connect
from actors.endpoint import Endpoint
from actors.engine_report import EngineReport
from actors.experts.registry import check_expert
from actors.failures import DeadlinePassed
from actors.learner_rank import ZeroActor
from actors.pools import LearnerPool, RolloutPool, SegmenterPool, SupervisedPool
from actors.rollout import Rollout
from actors.segmenter import Segmenter
from cluster.config import RunConfig
from cluster.hiring import ActorSpec, Hiring
from cluster.memory import learner_need, rollout_need, segmenter_need
from cluster.placement import Bundle, Node, bundles, largest_first, shortage, turns
from learner.config import LearnerTask, ZeroConfig
from rewards.scoring import Scorer
from umrg.config import located
from umrg.mistake import Mistake
from umrg.prompts import PromptSpec
from umrg.reasoner_folder import check_reasoner_folder


def rollouts(model: Path, config: RolloutConfig, spec: PromptSpec) -> list[ActorSpec]:
    """The rollout actors of a model folder. Raises ValueError if it cannot be loaded."""
    check_reasoner_folder(model)
    arguments = {"model": located(model), "config": config, "spec": spec}
    need = rollout_need(model, config)
    return [
        ActorSpec(
            bundle=bundle,
            actor_class=Rollout,
            arguments=arguments,
            environment=config.process_environment,
            need=need,
        )
        for bundle in bundles("rollout", config.actors, config)
    ]


def endpoints(endpoint: EndpointConfig, config: RolloutConfig, spec: PromptSpec) -> list[ActorSpec]:
    """The actors that sample from an endpoint, in place of rollouts."""
    arguments = {"config": endpoint, "spec": spec, "key": endpoint.key()}
    return [
        ActorSpec(bundle=bundle, actor_class=Endpoint, arguments=arguments, environment=config.process_environment)
        for bundle in bundles("rollout", config.actors, config)
    ]


def segmenters(
    expert: str, config: SegmenterConfig, scorer: Scorer, spec: PromptSpec, *, lenient: bool = False
) -> list[ActorSpec]:
    """The segmenter actors. lenient: accept foreign forms of answers too. Raises ValueError if there is no such
    expert."""
    check_expert(expert, config.checkpoint, config.preprocess)
    arguments = {
        "expert": located(expert),
        "config": config.located(),
        "scorer": scorer,
        "frame": spec.frame,
        "think": spec.think,
        "lenient": lenient,
    }
    need = segmenter_need(expert, config)
    return [
        ActorSpec(
            bundle=bundle,
            actor_class=Segmenter,
            arguments=arguments,
            environment=config.process_environment,
            need=need,
        )
        for bundle in bundles("segmenter", config.actors, config)
    ]


def ranks(actor_class: type[ZeroActor], config: ZeroConfig, task: LearnerTask, *, image_tokens: int) -> list[ActorSpec]:
    """The learner's ranks. image_tokens: of a packed sequence. Raises ValueError if the task's model cannot be
    loaded."""
    check_reasoner_folder(task.model)
    here = task.located()
    need = learner_need(task.model, config, image_tokens)
    return [
        ActorSpec(
            bundle=bundle,
            actor_class=actor_class,
            arguments={"config": config, "task": here, "rank": bundle.index},
            environment=config.process_environment,
            need=need,
        )
        for bundle in bundles("learner", config.ranks, config)
    ]


@dataclass(kw_only=True)
class Workers:
    """The pools of a run that trains or evaluates, and the one wait for all of them."""

    rollouts: RolloutPool
    segmenters: SegmenterPool
    learner: LearnerPool
    """Without ranks if a model is only evaluated."""
    calls: Calls
    wanted: dict[str, int]
    """How many rollouts and segmenters there should be now, by role."""
    expert_digest: str
    """Of the frozen expert's weights."""
    engines: tuple[EngineReport, ...] = ()
    """What the engines of the start said of themselves; empty with an endpoint."""
    version: int = 0
    """Of the weights that rollouts work with; those of the model's folder are 0."""
    hiring: Hiring | None = None
    """Makes the actors; None where others do."""
    put_aside: list[str] = field(default_factory=list)
    """The groups that could not be sampled or scored, each with its cause."""

    def check_expert(self) -> None:
        """Assert that the expert's weights are those of the start."""
        for digest in self.segmenters.digests():
            assert digest == self.expert_digest, "the frozen expert's weights changed"

    def restart_learner(self, seconds: float) -> None:
        """Kill all ranks, and start others in their place, with the model that the run began with."""
        assert self.hiring is not None
        self.learner.become(self.hiring.again("learner"))
        self.calls.gather(self.learner.starting(), seconds=seconds, doing="starting again")


@contextmanager
def ray_connection() -> Iterator[None]:
    """A connection to the cluster named by RAY_ADDRESS or by a Ray job, or to a local one, ended with the context."""
    ours = connect()
    try:
        yield
    finally:
        if ours:
            ray.shutdown()


@contextmanager
def started(actors: Sequence[ActorSpec], config: RunConfig) -> Iterator[Workers]:
    """Start the actors that a job lists, in one placement group. Raises ValueError if the cluster is too small for
    them, or if one cannot load its model, expert or run folder."""
    calls = Calls()
    with _hired(actors, config, calls) as hiring:
        handles = hiring.begin()
        learner = LearnerPool(_by_role("learner", handles), config.deadlines, calls)
        results: dict[str, Any] = {}
        for names in turns([actor.bundle for actor in actors]):
            refs = {name: handles[name].start.remote() for name in names if not name.startswith("learner")}
            refs |= learner.starting(names)
            found = calls.gather(refs, seconds=config.deadlines.start, doing="starting")
            results.update(zip(refs, found, strict=True))
        digests = {result for name, result in results.items() if name.startswith("segmenter")}
        assert len(digests) == 1, "the segmenters hold different experts"
        engines = tuple(result for result in results.values() if isinstance(result, EngineReport))
        for line in dict.fromkeys(f"rollout: {engine}" for engine in engines):
            print(line, flush=True)
        # An endpoint has a bound of its own.
        sequences = engines[0].max_num_seqs if engines else 1024
        rollouts = RolloutPool(hiring, calls, config.deadlines, sequences=sequences)
        segmenters = SegmenterPool(hiring, calls, config.deadlines)
        for pool in (rollouts, segmenters):
            pool.adopt(_by_role(pool.role, handles))
        yield Workers(
            rollouts=rollouts,
            segmenters=segmenters,
            learner=learner,
            calls=calls,
            wanted={pool.role: len(pool.ready) for pool in (rollouts, segmenters)},
            expert_digest=digests.pop(),
            engines=engines,
            hiring=hiring,
        )


@contextmanager
def started_supervised(actors: Sequence[ActorSpec], config: RunConfig) -> Iterator[SupervisedPool]:
    """Start the ranks of a supervised run, as `started` does."""
    calls = Calls()
    with _hired(actors, config, calls) as hiring:
        pool = SupervisedPool(hiring.begin(), config.deadlines, calls)
        calls.gather(pool.starting(), seconds=config.deadlines.start, doing="starting")
        yield pool


@contextmanager
def _hired(actors: Sequence[ActorSpec], config: RunConfig, calls: Calls) -> Iterator[Hiring]:
    """What makes the actors, with their placement group; both end with the context."""
    wanted = largest_first([actor.bundle for actor in actors])
    if missing := shortage(wanted, cluster_nodes()):
        raise Mistake(f"{missing}; ask for fewer actors or less of each, or add nodes")
    group = placement_group([bundle.resources for bundle in wanted], strategy=config.placement.upper())
    hiring = Hiring(actors, group, wanted, calls, config.deadlines.start)
    try:
        _await_resources(group, config.deadlines.resources, wanted)
        yield hiring
    finally:
        hiring.close()
        remove_placement_group(group)


def cluster_nodes() -> list[Node]:
    """The resources of each living node."""
    return [
        Node(cpus=node["Resources"].get("CPU", 0.0), gpus=node["Resources"].get("GPU", 0.0))
        for node in ray.nodes()
        if node["Alive"]
    ]


def _await_resources(group: Any, seconds: float, wanted: Sequence[Bundle]) -> None:
    """Wait until other jobs leave enough resources. Raises DeadlinePassed that says what is missing."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            ray.get(group.ready(), timeout=min(10.0, max(0.1, deadline - time.monotonic())))
            return
        except GetTimeoutError:
            free = ray.available_resources()
            need = f"{sum(b.cpus for b in wanted):g} CPUs and {sum(b.gpus for b in wanted):g} GPUs"
            have = f"{free.get('CPU', 0):g} and {free.get('GPU', 0):g} are free"
            if time.monotonic() >= deadline:
                raise DeadlinePassed(f"waited {seconds:g} s for {need}; {have}") from None
            print(f"waiting for {need}; {have}", flush=True)


def _by_role(role: str, handles: Mapping[str, Any]) -> dict[str, Any]:
    return {name: handle for name, handle in handles.items() if name.partition(" ")[0] == role}
