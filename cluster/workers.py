"""The actors of a run: started together, and gone when the run ends, however it ends."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.util.placement_group import placement_group, remove_placement_group

from actors.connection import connect
from actors.endpoint import Endpoint
from actors.engine_environment import engine_environment
from actors.experts.registry import find_expert
from actors.learner_rank import LearnerRank
from actors.pools import DeadlinePassed, LearnerPool, RolloutPool, Seat, SegmenterPool, SupervisedPool, gather
from actors.rollout import Rollout
from actors.segmenter import Segmenter
from actors.sft_rank import SupervisedRank
from cluster.config import EvaluateConfig, SftConfig, TrainConfig
from cluster.placement import Bundle, Node, bundles, shortage
from rewards.scoring import Scorer
from umrg.config import located
from umrg.reasoner_folder import check_reasoner_folder

Job = TrainConfig | EvaluateConfig


@dataclass(frozen=True, kw_only=True)
class Workers:
    """rollouts sample, segmenters score, the learner learns; it has no ranks where a model is only evaluated.
    expert_digest: of the frozen expert's weights."""

    rollouts: RolloutPool
    segmenters: SegmenterPool
    learner: LearnerPool
    expert_digest: str

    def check_expert(self) -> None:
        """The expert is what it was at the start."""
        for digest in self.segmenters.digests():
            assert digest == self.expert_digest, "the frozen expert's weights changed"


@contextmanager
def cluster() -> Iterator[None]:
    """A connection to the cluster that RAY_ADDRESS or a Ray job names, or a local one of our own, ended afterwards."""
    ours = connect()
    try:
        yield
    finally:
        if ours:
            ray.shutdown()


@contextmanager
def started(config: Job, run: Path | None = None) -> Iterator[Workers]:
    """Start all actors of a job, in one placement group. run: the folder that the learner's ranks write checkpoints to.
    Raises ValueError where the cluster is too small for them, and where they cannot load what they are to."""
    with _seated(config, run) as actors:
        rollouts = RolloutPool(_of("rollout", actors), config.deadlines)
        segmenters = SegmenterPool(_of("segmenter", actors), config.deadlines)
        learner = LearnerPool(_of("learner", actors), config.deadlines)
        try:
            calls = {**rollouts.starting(), **segmenters.starting(), **learner.starting()}
            results = dict(zip(calls, gather(calls, seconds=config.deadlines.start, doing="starting"), strict=True))
            digests = {result for name, result in results.items() if name.startswith("segmenter")}
            assert len(digests) == 1, "the segmenters hold different experts"
            yield Workers(rollouts=rollouts, segmenters=segmenters, learner=learner, expert_digest=digests.pop())
        finally:
            rollouts.stop()


@contextmanager
def started_supervised(config: SftConfig, run: Path) -> Iterator[SupervisedPool]:
    """Start the ranks of a supervised run, as `started` does."""
    with _seated(config, run) as actors:
        pool = SupervisedPool(actors, config.deadlines)
        gather(pool.starting(), seconds=config.deadlines.start, doing="starting")
        yield pool


@contextmanager
def _seated(config: Job | SftConfig, run: Path | None) -> Iterator[dict[str, Any]]:
    """A job's actors by name, not yet started; gone at the end. Raises ValueError where they would find no model or no
    expert."""
    if config.model is not None:
        check_reasoner_folder(config.model)
    if not isinstance(config, SftConfig):
        find_expert(config.expert, config.segmenter.checkpoint, config.segmenter.preprocess)
    wanted = bundles(config)
    if missing := shortage(wanted, cluster_nodes()):
        raise ValueError(f"{missing}; ask for fewer actors or less of each, or add nodes")
    group = placement_group([bundle.resources for bundle in wanted], strategy=config.placement.upper())
    actors: dict[str, Any] = {}
    try:
        _await_room(group, config, wanted)
        seats = [_seat(group, i, bundle, config) for i, bundle in enumerate(wanted)]
        for bundle, seat in zip(wanted, seats, strict=True):
            actors[bundle.name] = _make(bundle, seat, config, run)
        yield actors
    finally:
        for actor in actors.values():
            ray.kill(actor)
        remove_placement_group(group)


def cluster_nodes() -> list[Node]:
    """What each living node has."""
    return [
        Node(cpus=node["Resources"].get("CPU", 0.0), gpus=node["Resources"].get("GPU", 0.0))
        for node in ray.nodes()
        if node["Alive"]
    ]


def _await_room(group: Any, config: Job | SftConfig, wanted: list[Bundle]) -> None:
    """Wait until other jobs leave room. Raises DeadlinePassed that says what is missing."""
    deadline = time.monotonic() + config.deadlines.resources
    while True:
        try:
            ray.get(group.ready(), timeout=min(10.0, max(0.1, deadline - time.monotonic())))
            return
        except GetTimeoutError:
            free = ray.available_resources()
            need = f"{sum(b.cpus for b in wanted):g} CPUs and {sum(b.gpus for b in wanted):g} GPUs"
            have = f"{free.get('CPU', 0):g} and {free.get('GPU', 0):g} are free"
            if time.monotonic() >= deadline:
                raise DeadlinePassed(f"waited {config.deadlines.resources} s for {need}; {have}") from None
            print(f"waiting for {need}; {have}", flush=True)


def _seat(group: Any, index: int, bundle: Bundle, config: Job | SftConfig) -> Seat:
    return Seat(
        name=bundle.name,
        group=group,
        bundle=index,
        num_cpus=bundle.cpus,
        num_gpus=bundle.gpus,
        environment=_environment(bundle.role, config),
    )


def _environment(role: str, config: Job | SftConfig) -> Mapping[str, str]:
    if role == "rollout":
        assert not isinstance(config, SftConfig)
        return engine_environment(config.rollout)
    if role == "learner":
        assert not isinstance(config, EvaluateConfig)
        return {"DS_ACCELERATOR": "cuda" if config.learner.num_gpus > 0 else "cpu"}
    return {}


def _make(bundle: Bundle, seat: Seat, config: Job | SftConfig, run: Path | None) -> Any:
    spec = config.spec()
    if isinstance(config, SftConfig):
        return _actor(SupervisedRank, seat).remote(
            located(config.model),
            config.learner,
            rank=bundle.index,
            updates=config.steps,
            seed=config.seed,
            spec=spec,
            run=run and located(run),
        )
    if bundle.role == "segmenter":
        scorer = config.reward.scorer(think=spec.think) if isinstance(config, TrainConfig) else Scorer.of_preset("mask")
        arguments: Any = (located(config.expert), config.segmenter.located(), scorer)
        lenient = isinstance(config, EvaluateConfig) and config.answers == "lenient"
        return _actor(Segmenter, seat).remote(*arguments, frame=spec.frame, think=spec.think, lenient=lenient)
    if isinstance(config, EvaluateConfig) and config.endpoint is not None:
        return _actor(Endpoint, seat).remote(config.endpoint, spec, key=config.endpoint.key())
    assert config.model is not None
    model = located(config.model)
    if bundle.role == "rollout":
        return _actor(Rollout, seat).remote(model, config.rollout, spec)
    assert isinstance(config, TrainConfig)
    return _actor(LearnerRank, seat).remote(
        model,
        config.learner,
        rank=bundle.index,
        updates=config.updates,
        longest=config.rollout.max_tokens,
        temperature=config.rollout.temperature,
        seed=config.seed,
        spec=spec,
        run=run and located(run),
    )


def _actor(kind: type, seat: Seat) -> Any:
    return ray.remote(kind).options(**seat.options())


def _of(role: str, actors: Mapping[str, Any]) -> dict[str, Any]:
    return {name: actor for name, actor in actors.items() if name.startswith(role)}
