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

from actors.config import EndpointConfig, RolloutConfig, SegmenterConfig
from actors.connection import connect
from actors.endpoint import Endpoint
from actors.engine_report import EngineReport
from actors.experts.registry import check_expert
from actors.learner_rank import ZeroActor
from actors.pools import DeadlinePassed, LearnerPool, Placement, RolloutPool, SegmenterPool, SupervisedPool, gather
from actors.rollout import Rollout
from actors.segmenter import Segmenter
from cluster.config import RunConfig
from cluster.memory import GpuNeed, learner_need, overfull, rollout_need, segmenter_need, summary, tenant
from cluster.placement import Bundle, Node, bundles, largest_first, shortage, turns
from learner.config import LearnerTask, ZeroConfig
from rewards.scoring import Scorer
from umrg.config import located
from umrg.prompts import PromptSpec
from umrg.reasoner_folder import check_reasoner_folder


@dataclass(frozen=True, kw_only=True)
class ActorSpec:
    """One actor of a job."""

    bundle: Bundle
    """Its role and index, and the CPUs and GPUs that it takes."""
    actor_class: type
    arguments: Mapping[str, Any]
    """Of its constructor, by name."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that its process has from the start."""
    need: GpuNeed | None = None
    """What it needs of its GPU; None if that is not known."""


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


@dataclass(frozen=True, kw_only=True)
class Workers:
    """The pools of a run that trains or evaluates."""

    rollouts: RolloutPool
    segmenters: SegmenterPool
    learner: LearnerPool
    """Without ranks if a model is only evaluated."""
    expert_digest: str
    """Of the frozen expert's weights."""
    engines: tuple[EngineReport, ...] = ()
    """What the engines said of themselves; empty with an endpoint."""

    def check_expert(self) -> None:
        """Assert that the expert's weights are those of the start."""
        for digest in self.segmenters.digests():
            assert digest == self.expert_digest, "the frozen expert's weights changed"


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
    with _placed(actors, config) as handles:
        rollouts = RolloutPool(_by_role("rollout", handles), config.deadlines)
        segmenters = SegmenterPool(_by_role("segmenter", handles), config.deadlines)
        learner = LearnerPool(_by_role("learner", handles), config.deadlines)
        results: dict[str, Any] = {}
        try:
            for names in turns([actor.bundle for actor in actors]):
                calls = {
                    name: call
                    for pool in (rollouts, segmenters, learner)
                    for name, call in pool.starting(names).items()
                }
                found = gather(calls, seconds=config.deadlines.start, doing="starting")
                results.update(zip(calls, found, strict=True))
            digests = {result for name, result in results.items() if name.startswith("segmenter")}
            assert len(digests) == 1, "the segmenters hold different experts"
            engines = tuple(result for result in results.values() if isinstance(result, EngineReport))
            for line in dict.fromkeys(f"rollout: {engine}" for engine in engines):
                print(line, flush=True)
            yield Workers(
                rollouts=rollouts,
                segmenters=segmenters,
                learner=learner,
                expert_digest=digests.pop(),
                engines=engines,
            )
        finally:
            rollouts.stop()


@contextmanager
def started_supervised(actors: Sequence[ActorSpec], config: RunConfig) -> Iterator[SupervisedPool]:
    """Start the ranks of a supervised run, as `started` does."""
    with _placed(actors, config) as handles:
        pool = SupervisedPool(handles, config.deadlines)
        gather(pool.starting(), seconds=config.deadlines.start, doing="starting")
        yield pool


@contextmanager
def _placed(actors: Sequence[ActorSpec], config: RunConfig) -> Iterator[dict[str, Any]]:
    """The actors by name, created and not yet started; killed at the end of the context."""
    wanted = largest_first([actor.bundle for actor in actors])
    if missing := shortage(wanted, cluster_nodes()):
        raise ValueError(f"{missing}; ask for fewer actors or less of each, or add nodes")
    group = placement_group([bundle.resources for bundle in wanted], strategy=config.placement.upper())
    handles: dict[str, Any] = {}
    try:
        _await_resources(group, config.deadlines.resources, wanted)
        for actor in actors:
            options = _placement(group, wanted.index(actor.bundle), actor).options()
            handles[actor.bundle.name] = ray.remote(actor.actor_class).options(**options).remote(**actor.arguments)
        _check_memory(actors, handles, config)
        yield handles
    finally:
        for handle in handles.values():
            ray.kill(handle)
        remove_placement_group(group)


def _check_memory(actors: Sequence[ActorSpec], handles: Mapping[str, Any], config: RunConfig) -> None:
    """Print what each role needs of its GPU, and raise ValueError where that cannot fit, before anything is loaded."""
    known = {actor.bundle.name: actor.need for actor in actors if actor.need and actor.bundle.gpus > 0}
    calls = {name: handles[name].place.remote() for name in known}
    places = gather(calls, seconds=config.deadlines.start, doing="looking at its GPU")
    tenants = [tenant(name, known[name], place) for name, place in zip(known, places, strict=True) if place.gpus]
    for line in summary(tenants):
        print(line, flush=True)
    if fault := overfull(tenants):
        raise ValueError(fault)


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


def _placement(group: Any, index: int, actor: ActorSpec) -> Placement:
    return Placement(
        name=actor.bundle.name,
        group=group,
        bundle=index,
        num_cpus=actor.bundle.cpus,
        num_gpus=actor.bundle.gpus,
        environment=actor.environment,
    )


def _by_role(role: str, handles: Mapping[str, Any]) -> dict[str, Any]:
    return {name: handle for name, handle in handles.items() if name.startswith(role)}
