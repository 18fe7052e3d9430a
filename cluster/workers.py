"""The actors of a run: listed by its job, started together, and ended with the run, however it ends.

A job lists its actors with `rollouts`, `segmenters` and `ranks`:

    [*ranks(LearnerRank, config.learner, task), *rollouts(…), *segmenters(…)] ──started──► Workers
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from actors.calls import Calls
from actors.config import EndpointConfig, RolloutConfig, SegmenterConfig
from actors.connection import connect, is_local
from actors.endpoint import Endpoint
from actors.engine_report import EngineReport
from actors.experts.registry import check_expert
from actors.failures import ActorDied, DeadlinePassed
from actors.learner_rank import ZeroActor
from actors.pools import GROUPS_AT_ONCE, LearnerDied, LearnerPool, RolloutPool, SegmenterPool, SupervisedPool
from actors.rollout import Rollout
from actors.segmenter import Segmenter
from cluster.colocation import fall_asleep, refuse_apart
from cluster.config import EvaluateConfig, RunConfig, TrainConfig
from cluster.direct_transfer import DirectTransfer
from cluster.hiring import ActorSpec, Hiring, cluster_nodes
from cluster.memory import learner_need, resting_need, rollout_need, segmenter_need, sleeping_need
from cluster.placement import Slot, bundles, core, joined, shortage, turns
from learner.config import LearnerTask, ZeroConfig
from rewards.scoring import Scorer
from umrg.config import located
from umrg.mistake import Mistake
from umrg.prompts import PromptSpec
from umrg.reasoner_folder import check_reasoner_folder


def rollouts(model: Path, config: RolloutConfig, spec: PromptSpec, weights: int = 0) -> list[ActorSpec]:
    """The rollout actors of a model folder. weights: bytes of each version that they are sent. Raises ValueError if the
    folder cannot be loaded."""
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
            idle=sleeping_need(config) if config.sleeps else None,
            weights=weights,
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
            calls=GROUPS_AT_ONCE + 1,  # it answers questions beside them
        )
        for bundle in bundles("segmenter", config.actors, config)
    ]


def ranks(
    actor_class: type[ZeroActor], config: ZeroConfig, task: LearnerTask, *, image_tokens: int, colocated: bool = False
) -> list[ActorSpec]:
    """The learner's ranks. image_tokens: of a packed sequence. colocated: each shares a GPU with an engine, in turn.
    Raises ValueError if the task's model cannot be loaded."""
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
            idle=resting_need(task.model, config, image_tokens) if colocated else None,
            nodes=config.nodes,
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
    direct: DirectTransfer | None = None
    """Sends weights from GPU to GPU; None where they go through host memory."""
    hiring: Hiring | None = None
    """Makes the actors; None where others do."""
    parks: bool = False
    """Whether the learner's optimizer state waits in host memory while engines sample."""
    put_aside: list[str] = field(default_factory=list)
    """The groups that could not be sampled or scored, each with its cause."""

    def check_expert(self) -> None:
        """Assert that the expert's weights are those of the start."""
        for digest in self.segmenters.digests():
            assert digest == self.expert_digest, "the frozen expert's weights changed"

    def restart_learner(self, seconds: float) -> None:
        """Kill all ranks, and start others in their place, with the model that the run began with. Raises LearnerDied
        if they die as well."""
        assert self.hiring is not None
        try:
            self.learner.become(self.hiring.again("learner"))
            starting = self.learner.starting(lodging=self.hiring.lodging)
            self.calls.gather(starting, seconds=seconds, doing="starting again")
        except (ActorDied, DeadlinePassed) as error:
            raise LearnerDied(str(error)) from error


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
def started(actors: Sequence[ActorSpec], config: TrainConfig | EvaluateConfig) -> Iterator[Workers]:
    """Start the actors that a job lists: what a run cannot begin without, and of the others those that have room by
    then; the rest may come later. Raises ValueError if a local cluster is too small for them, or if one cannot load its
    model, expert or run folder, and DeadlinePassed if there is no room."""
    calls = Calls()
    with _hired(actors, config, calls) as hiring:
        placed = hiring.begin()
        if config.colocated:
            refuse_apart(hiring.places)
        learner = LearnerPool(_by_role("learner", hiring.handles), config.deadlines, calls)
        results: dict[str, Any] = {}
        there = [actor.bundle for actor in actors if actor.bundle.name in placed]
        for names in turns(there, colocated=config.colocated):
            refs = {
                name: hiring.handles[name].start.remote(hiring.lodging(name))
                for name in names
                if not name.startswith("learner")
            }
            refs |= learner.starting(names, hiring.lodging)
            found = calls.gather(refs, seconds=config.deadlines.start, doing="starting")
            results.update(zip(refs, found, strict=True))
            if config.colocated:  # before ranks load on the same GPUs
                fall_asleep(
                    _by_role("rollout", {name: hiring.handles[name] for name in names}), calls, config.deadlines
                )
        digests = {result for name, result in results.items() if name.startswith("segmenter")}
        assert len(digests) == 1, "the segmenters hold different experts"
        engines = tuple(result for result in results.values() if isinstance(result, EngineReport))
        for line in dict.fromkeys(f"rollout: {engine}" for engine in engines):
            print(line, flush=True)
        # An endpoint has a bound of its own.
        sequences = engines[0].max_num_seqs if engines else 1024
        rollouts = RolloutPool(hiring, calls, config.deadlines, sequences=sequences)
        segmenters = SegmenterPool(hiring, calls, config.deadlines, ahead=config.segmenter.embeds_ahead)
        for pool in (rollouts, segmenters):
            pool.adopt(_by_role(pool.role, {name: hiring.handles[name] for name in placed}))
            hiring.expect(pool, begun=placed)
        yield Workers(
            rollouts=rollouts,
            segmenters=segmenters,
            learner=learner,
            calls=calls,
            wanted={pool.role: len(pool.members) for pool in (rollouts, segmenters)},
            expert_digest=digests.pop(),
            engines=engines,
            hiring=hiring,
            parks=config.colocated and hiring.parks(),
        )


@contextmanager
def started_supervised(actors: Sequence[ActorSpec], config: RunConfig) -> Iterator[SupervisedPool]:
    """Start the ranks of a supervised run, as `started` does."""
    calls = Calls()
    with _hired(actors, config, calls) as hiring:
        hiring.begin()
        pool = SupervisedPool(hiring.handles, config.deadlines, calls)
        calls.gather(pool.starting(lodging=hiring.lodging), seconds=config.deadlines.start, doing="starting")
        yield pool


@contextmanager
def _hired(actors: Sequence[ActorSpec], config: RunConfig, calls: Calls) -> Iterator[Hiring]:
    """What makes the actors, with their placement group; both end with the context."""
    listed, nodes = [actor.bundle for actor in actors], cluster_nodes()
    # Other clusters may start nodes for what is asked of them.
    if is_local() and (missing := shortage(joined(listed, colocated=config.colocated), nodes)):
        raise Mistake(f"{missing}; ask for fewer actors or less of each")
    spread = config.spread
    asked = next((actor.nodes for actor in actors if actor.nodes), None)
    slots = core(listed, nodes, asked=asked, spread=spread, colocated=config.colocated)
    group = _placement_group(slots, spread=spread)
    hiring = Hiring(actors, group, slots, calls, config.deadlines, spread=spread, cache=config.cache)
    try:
        yield hiring
    finally:
        hiring.close()
        remove_placement_group(group)


def _placement_group(slots: Sequence[Slot], *, spread: bool) -> Any:
    labels = [dict(slot.whole.labels) for slot in slots]
    try:
        return placement_group(
            [slot.resources for slot in slots],
            strategy="SPREAD" if spread else "PACK",
            bundle_label_selector=labels if any(labels) else None,
        )
    except ValueError as error:
        raise Mistake(f"node_labels: {' '.join(str(error).split())}") from error


def _by_role(role: str, handles: Mapping[str, Any]) -> dict[str, Any]:
    return {name: handle for name, handle in handles.items() if name.partition(" ")[0] == role}
