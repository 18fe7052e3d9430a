"""What overlapping steps gain (`bench.pipeline` prints it): the driver of training, with actors that take the time of a
7B on eight GPUs and compute nothing (`bench.simulated`).

Steps are `Training.take_step`, with all that the driver does in one, records included. Four engines sample 128 groups
of 16 answers; the longest have eleven times the tokens of the median, so that the last third decodes few of them.
Two segmenters score meanwhile. The learner takes an update and exports its weights, which each engine loads. In the
fourth step of each row one engine dies with all that it has, and another is there 40 s later. The first case has a
rollout of 13 s and an update of 25 s, the second the reverse. A simulated second lasts a fifth of one by default: the
driver's own work is not scaled, and so weighs five times as much here as in a run.

overlap_ratio: a step at staleness 1, over the longer of its two sides alone, where the learner's is the longer. The
    rollouts' side: groups are collected, weights exported and loaded, and nobody learns; an engine dies here too. The
    learner's: updates and exports, and nobody samples.
overlap_ratio_rollout_bound: the same where the rollouts' side is the longer.
overlap_gain, overlap_gain_rollout_bound: a step at staleness 0 over one at staleness 1.
rollouts_alone_s, learner_alone_s, step_0_s, step_1_s: means over the steps, the first one left out, in simulated
    seconds.
"""

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import ray
from rich.console import Console

from actors.calls import Calls
from actors.config import DeadlineConfig
from actors.pools import LearnerPool, RolloutPool, SegmenterPool
from bench.pipeline import DEMO, MODEL, work_of
from bench.simulated import SimulatedRank, SimulatedStarter, Speeds
from cluster.config import TrainConfig, load_config
from cluster.display import Display
from cluster.evaluation import collect
from cluster.journal import Journal
from cluster.run_folder import RunFolder
from cluster.trackers import Trackers
from cluster.train import Training
from cluster.weight_sync import sync_weights, tend
from cluster.workers import Workers
from phantoms import rows as phantoms
from rewards.scored import ScoredAnswer
from umrg.dataset import Dataset
from umrg.dataset_writer import write_rows
from umrg.group import Group, GroupSamples

LEARNER_BOUND = Speeds(learn_s=25.0)
ROLLOUT_BOUND = Speeds(learn_s=13.0, slower=25 / 13)
DIES_AT = 3
"""The step in which an engine dies, from 0."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How much there is of everything."""

    engines: int = 4
    segmenters: int = 2
    batch: int = 128
    """Groups of a step."""
    n: int = 16
    max_tokens: int = 2048
    steps: int = 10
    """That are measured; one more comes before them. In the middle of the fourth an engine dies."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Some steps in a row."""

    seconds: list[float]
    """Simulated, of each step but the first."""
    learnt: list[list[tuple[str, int]]]
    """Of each step, the first included, its groups with the version that sampled each."""

    @property
    def mean(self) -> float:
        return fmean(self.seconds)


class Bench:
    """The same actors for rows of steps of all kinds. folder: for data and runs."""

    def __init__(self, speeds: Speeds, shape: Shape, folder: Path) -> None:
        self.speeds, self.shape, self._folder = speeds, shape, folder
        self._rows = _drawn(folder)
        calls, deadlines = Calls(), DeadlineConfig()
        starter = SimulatedStarter(calls, speeds, *_longest(work_of(self._rows[0]), shape.max_tokens))
        self._rank: Any = ray.remote(SimulatedRank).options(num_cpus=0).remote(speeds)
        sequences = math.ceil(shape.batch / shape.engines) * shape.n
        self.workers = Workers(
            rollouts=RolloutPool(starter, calls, deadlines, sequences=sequences),
            segmenters=SegmenterPool(starter, calls, deadlines),
            learner=LearnerPool({"learner 0": self._rank}, deadlines, calls),
            calls=calls,
            wanted={"rollout": shape.engines, "segmenter": shape.segmenters},
            expert_digest="",
        )
        for pool in (self.workers.rollouts, self.workers.segmenters):
            handles = [starter.make(pool.role) for _ in range(self.workers.wanted[pool.role])]
            ray.get([handle.start.remote(0.0) for handle in handles])
            pool.adopt({f"{pool.role} {i}": handle for i, handle in enumerate(handles)})

    def end(self) -> None:
        for pool in (self.workers.rollouts, self.workers.segmenters):
            pool.end()
        ray.kill(self._rank)

    def learner_alone(self) -> Measured:
        """Updates and exports. Nothing is heavy-tailed here, and so three are enough."""
        learner = self.workers.learner

        def step(number: int) -> None:
            learner.update([], [])
            learner.weights(number, everything=False)

        return self._measured(step, 3)

    def rollouts_alone(self) -> Measured:
        """Groups are collected, and weights exported and loaded."""
        sampling = self._config(0).rollout.sampling(seed=0)

        def step(number: int) -> None:
            samples = self._rows.samples([i % len(self._rows) for i in range(self.shape.batch)])
            groups = [Group(run="alone", step=number, index=i, sample=sample) for i, sample in enumerate(samples)]
            collect(self.workers, groups, sampling, "reward")
            sync_weights(self.workers, version=number + 1)

        self._begin()
        return self._measured(step, self.shape.steps, dies=DIES_AT)

    def steps(self, staleness: int) -> Measured:
        """Whole steps, as a run takes them."""
        self._begin()
        with self._training(staleness) as training:
            return self._measured(lambda _: training.take_step(), self.shape.steps, dies=DIES_AT)

    def _measured(self, step: Callable[[int], None], count: int, *, dies: int | None = None) -> Measured:
        """One step more than so many. dies: the step in which an engine does."""
        seconds = []
        for number in range(count + 1):
            if number == dies:
                victim = self.workers.rollouts.ready[0].handle
                threading.Timer(self.speeds.dies_s * self.speeds.scale, ray.kill, [victim]).start()
            began = time.perf_counter()
            step(number)
            seconds.append((time.perf_counter() - began) / self.speeds.scale)
        return Measured(seconds=seconds[1:], learnt=ray.get(self._rank.learnt.remote()))

    def _begin(self) -> None:
        """All engines are there, with the weights of version 0."""
        workers = self.workers
        while len(workers.rollouts.ready) < self.shape.engines:
            tend(workers)
            workers.calls.turn()
        sync_weights(workers, version=0)

    @contextmanager
    def _training(self, staleness: int) -> Iterator[Training]:
        """As `cluster.train.train` makes it."""
        config = self._config(staleness)
        with ExitStack() as stack:
            run = stack.enter_context(RunFolder.begun(config.runs / config.name, config, resume=False))
            display = stack.enter_context(Display(config, Console(file=StringIO())))
            journal = stack.enter_context(Journal(run, stack.enter_context(Trackers(run, config, display.warning))))
            yield Training(config, run, self.workers, journal, display, self._rows, [])

    def _config(self, staleness: int) -> TrainConfig:
        shape = self.shape
        settings = {
            "model": MODEL,
            "runs": self._folder,
            "name": f"staleness-{staleness}",
            "staleness": staleness,
            "batch": shape.batch,
            "steps": shape.steps + 1,
            "rollout.n": shape.n,
            "rollout.max_tokens": shape.max_tokens,
            "learner.objective.correction": "token",
        }
        return load_config(TrainConfig, DEMO, [f"{key}={value}" for key, value in settings.items()])


def _drawn(folder: Path) -> Dataset:
    """Rows of the demo's kind."""
    file = folder / "rows.parquet"
    write_rows(file, phantoms(256, seed=11, modalities=["CT", "X-ray"], phrasings="held_out", queries_per_image=1))
    return Dataset.open(file)


def _longest(
    work: tuple[GroupSamples, tuple[ScoredAnswer, ...]], tokens: int
) -> tuple[GroupSamples, tuple[ScoredAnswer, ...]]:
    """The same with a single completion of so many tokens."""
    samples, answers = work
    rng = np.random.default_rng(0)
    completion = replace(
        samples.completions[0],
        token_ids=tuple(rng.integers(1000, 100_000, tokens).tolist()),
        logprobs=tuple((-rng.exponential(size=tokens)).tolist()),
    )
    return replace(samples, completions=(completion,)), answers


def compare(speeds: Speeds, shape: Shape = Shape()) -> dict[str, float]:
    """Both sides alone, and steps at staleness 0 and 1."""
    with TemporaryDirectory() as folder:
        bench = Bench(speeds, shape, Path(folder))
        learner, rollouts = bench.learner_alone().mean, bench.rollouts_alone().mean
        synchronous, overlapping = bench.steps(0).mean, bench.steps(1).mean
        bench.end()
    return {
        "overlap_ratio": overlapping / max(rollouts, learner),
        "overlap_gain": synchronous / overlapping,
        "rollouts_alone_s": rollouts,
        "learner_alone_s": learner,
        "step_0_s": synchronous,
        "step_1_s": overlapping,
    }


def overlap(scale: float) -> dict[str, float]:
    """The figures of both cases. scale: as in `Speeds`."""
    found = compare(replace(LEARNER_BOUND, scale=scale))
    mirrored = compare(replace(ROLLOUT_BOUND, scale=scale))
    return {**found, **{f"{name}_rollout_bound": value for name, value in mirrored.items()}}
