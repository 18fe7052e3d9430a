"""What the pipeline adds to its engines, and what a sample costs the driver: `python -m bench.pipeline`.

Three comparisons. The first trains with the demo's configuration and tiny models on a local Ray cluster. A step is
taken as in training: groups are put into the object store, sampled, scored, and learnt from, through the pools, the
collector and the driver's one wait. Then each engine does the same work once more, alone: vLLM answers the very
requests that the rollout made of it, all at once; the expert embeds the same images and decodes the same prompts; the
learner updates from the same groups, which lie in its process already. Both are repeated in turn, with the same groups;
vLLM's caches are emptied before either, and its weights stay, so that it samples the same tokens each time. What is
neither vLLM, expert nor learner, such as rewards and metrics, the decoding of images, and all transport, is overhead.
The pipeline scores while it samples, which the sum of the bare times does not: a ratio below one is possible.

overhead_ratio: seconds of a step, from its groups to its update, over the sum of the bare seconds of vLLM, expert and
    learner. Without the weight sync, which has no bare counterpart here (`bench.weights`).
overhead_with_sync_ratio: the same, with weight sync and canary counted as a part of the step.
collect_s, learn_s: seconds of a step's two parts, each the best of several; step_s is their sum.
vllm_s, expert_s, learner_s: the bare seconds, each the best of several; bare_s is their sum.
sync_s: seconds of weight sync and canary, the best of several that follow the steps.

The second lets the driver collect groups from 256 simulated rollouts and 64 simulated segmenters, by the same
functions as in training. Each is a coroutine that sleeps as long as its work would take and returns samples and scores
of the usual size: 16 completions of 200 tokens, with masks. They live in four processes; a handle of each passes the
driver's calls on. All groups are in flight at once, eight at a rollout, and end evenly spread over time, so that the
driver has the most calls to wait for and the fewest that end together.

driver_ms_per_sample: CPU milliseconds of the driver's main thread for each sample, which is one completion, from
    putting the first group into the object store to having read the last score; the best of some rounds.
driver_ms_per_group: the same for each group of 16.
process_ms_per_sample: CPU milliseconds of all threads of the driver's process, those of Ray's core among them.
simulated_wall_ratio: seconds that collecting took, over those of the slowest sampling and its score.

The third is `bench.overlap`: what overlapping steps gain, with actors that take the time of a 7B on eight GPUs.
"""

from __future__ import annotations  # the actors are sent to their processes by value, without the names in annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import ray

from actors.calls import Calls
from actors.config import DeadlineConfig
from actors.experts.protocol import Expert
from actors.gpus import ALONE, Lodging
from actors.learner_rank import LearnerRank, fetched
from actors.pools import LearnerPool, RolloutPool, SegmenterPool
from actors.rollout import Rollout
from actors.segmenter import Segmenter
from bench.machine import processor
from bench.rewards import THINK, table
from rewards.answer_metrics import answer_metrics
from rewards.case import Drawn, Reference
from rewards.scored import ScoredAnswer, ScoredGroup
from rewards.scoring import Scorer
from umrg.answers import format_answer
from umrg.frames import Frames
from umrg.group import Completion, Group, GroupSamples, SamplingParams
from umrg.masks import encode_rle

if TYPE_CHECKING:
    from actors.engine_report import EngineReport
    from cluster.config import TrainConfig
    from cluster.workers import Workers
    from umrg.sample import Sample

MODEL = Path(__file__).parents[1] / "models" / "tiny-reasoner"
DEMO = MODEL.parents[1] / "configs" / "demo.yaml"
ROLLOUTS, SEGMENTERS, HOSTS = 256, 64, 4
SEQUENCES, N, TOKENS = 128, 16, 200
"""Completions that a simulated engine samples at once, completions of a group, and tokens of one."""
SAMPLING_S, SCORING_S = (2.0, 18.0), 0.05
"""Seconds of the fastest and the slowest sampling, and of scoring a group."""


class Recorder:
    """Stands before an engine and keeps the calls of some of its methods, to make them again."""

    def __init__(self, engine: Any, *methods: str) -> None:
        self._engine, self._methods = engine, methods
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._engine, name)
        if name not in self._methods:
            return found

        def kept(*args: Any, **named: Any) -> Any:
            self.calls.append((name, args, named))
            return found(*args, **named)

        return kept

    def again(self) -> list[Any]:
        """Make the calls again that were made since the last time. Returns what they return."""
        calls, self.calls = self.calls, []
        return [getattr(self._engine, name)(*args, **named) for name, args, named in calls]


class RecordedRollout(Rollout):
    """A rollout whose requests to vLLM can be made again."""

    async def start(self, lodging: Lodging = ALONE) -> EngineReport:
        report = await super().start(lodging)
        engine: Any = self._running()
        engine._llm = self._llm = Recorder(engine._llm, "generate")
        return report

    async def clear(self) -> None:
        """Empty all caches, as an update of weights does."""
        await self._llm.pause_generation(mode="keep", clear_cache=True)
        await self._llm.resume_generation()

    async def again(self) -> tuple[float, int]:
        """Seconds that vLLM takes for the requests of the last step, and the tokens that it samples."""

        async def tokens(outputs: Any) -> int:
            final: Any = None
            async for output in outputs:
                final = output
            return sum(len(completion.token_ids) for completion in final.outputs)

        began = time.perf_counter()
        counts = await asyncio.gather(*map(tokens, self._llm.again()))
        return time.perf_counter() - began, sum(counts)


class RecordedSegmenter(Segmenter):
    """A segmenter whose calls of its expert can be made again."""

    def _load(self, lodging: Lodging) -> Expert:
        recorder: Any = Recorder(super()._load(lodging), "embed_all", "decode_all")
        return cast(Expert, recorder)

    def again(self) -> float:
        """Seconds that the expert takes for the images and prompts of the last step."""
        recorder: Any = self._expert
        began = time.perf_counter()
        self._desk.do(recorder.again).result()
        return time.perf_counter() - began


class RecordedRank(LearnerRank):
    """A rank that can learn from groups in its own process."""

    def again(self, groups: Sequence[tuple[Any, Any]], work: Sequence[int]) -> float:
        """Seconds of an update, without fetching the groups."""
        assert self._grpo is not None
        held = [fetched(*each) for each in groups]
        began = time.perf_counter()
        self._grpo.update(work, held.__getitem__)
        return time.perf_counter() - began


def samples(count: int) -> list[Sample]:
    """Rows of the demo's kind."""
    from phantoms import rows
    from umrg.dataset import Dataset
    from umrg.dataset_writer import write_rows

    with tempfile.TemporaryDirectory() as folder:
        write_rows(
            Path(folder) / "rows.parquet",
            rows(count, seed=11, modalities=["CT", "X-ray"], phrasings="held_out", queries_per_image=1),
        )
        return list(Dataset.open(Path(folder) / "rows.parquet"))


def compare(steps: int) -> dict[str, float]:
    """The figures of the first comparison."""
    from cluster.config import TrainConfig, load_config
    from cluster.train import actors
    from cluster.weight_sync import Canary, sync_weights
    from cluster.workers import started

    kinds = {"rollout": RecordedRollout, "segmenter": RecordedSegmenter, "learner": RecordedRank}
    config = load_config(TrainConfig, DEMO, [f"model={MODEL}"])
    listed = [replace(actor, actor_class=kinds[actor.bundle.role]) for actor in actors(config)]
    groups = [Group(run="bench", step=0, index=i, sample=row) for i, row in enumerate(samples(config.batch))]
    with started(listed, config) as workers:
        found = [one_step(workers, groups, config) for _ in range(steps + 1)][1:]  # the first one warms everything up
        canary, syncs = Canary(groups[0].sample, config), []
        for version in range(1, steps + 2):
            began = time.perf_counter()
            sync_weights(workers, version=version)
            canary.check(workers)
            syncs.append(time.perf_counter() - began)
    best = {name: min(each[name] for each in found) for name in found[0]}
    step_s, sync_s = best["collect_s"] + best["learn_s"], min(syncs[1:])
    bare_s = best["vllm_s"] + best["expert_s"] + best["learner_s"]
    return {
        "overhead_ratio": step_s / bare_s,
        "overhead_with_sync_ratio": (step_s + sync_s) / bare_s,
        "step_s": step_s,
        "bare_s": bare_s,
        **best,
        "sync_s": sync_s,
    }


def one_step(workers: Workers, groups: Sequence[Group], config: TrainConfig) -> dict[str, float]:
    """Seconds of a step's parts, and of the same work by each engine alone."""
    from cluster.evaluation import collect

    assert workers.hiring is not None
    rollout, segmenter, rank = (workers.hiring.handles[f"{role} 0"] for role in ("rollout", "segmenter", "learner"))
    ray.get(rollout.clear.remote())
    began = time.perf_counter()
    collected = collect(workers, groups, config.rollout.sampling(seed=config.seed), "reward")
    between = time.perf_counter()
    refs, work = [each.refs for each in collected], [config.learner.work(each.scored) for each in collected]
    workers.learner.update(refs, work)
    ended = time.perf_counter()
    ray.get(rollout.clear.remote())
    vllm_s, tokens = ray.get(rollout.again.remote())
    assert tokens == sum(each.scored.tokens for each in collected), "vLLM alone sampled other completions"
    return {
        "collect_s": between - began,
        "learn_s": ended - between,
        "vllm_s": vllm_s,
        "expert_s": ray.get(segmenter.again.remote()),
        "learner_s": ray.get(rank.again.remote(refs, work)),
    }


class Host:
    """A process of simulated rollouts and segmenters."""

    def __init__(self, samples: GroupSamples, answers: tuple[ScoredAnswer, ...]) -> None:
        self._samples, self._answers = samples, answers
        self._busy: dict[int, asyncio.Lock] = {}

    async def sampled(self, number: int, group: Group, sampling: SamplingParams) -> tuple[float, GroupSamples]:
        """As `Rollout.sampled`; each group has a duration of its own."""
        low, high = SAMPLING_S
        seconds = low + (high - low) * (group.index * 0.618034 % 1)
        await asyncio.sleep(seconds)
        return seconds, self._samples

    async def embed(self, number: int, group: Group, depth: str) -> int:
        """As `Segmenter.embed`, of an image that is kept."""
        return 1 << 30

    async def score(
        self, number: int, group: Group, masks: tuple[bytes, ...], samples: GroupSamples, depth: str
    ) -> ScoredGroup:
        """As `Segmenter.score`; a segmenter scores one group after another."""
        async with self._busy.setdefault(number, asyncio.Lock()):
            await asyncio.sleep(SCORING_S)
        return ScoredGroup(group=group.without_files(), samples=samples, answers=self._answers)


class Method:
    """A method of a simulated actor, called as Ray's are."""

    def __init__(self, method: Any, number: int) -> None:
        self._method, self._number = method, number

    def options(self, **options: Any) -> Method:
        return Method(self._method.options(**options), self._number)

    def remote(self, *args: Any) -> Any:
        return self._method.remote(self._number, *args)


class Simulated:
    """The handle of a simulated actor."""

    def __init__(self, host: Any, number: int) -> None:
        self.sampled, self.score = Method(host.sampled, number), Method(host.score, number)
        self.embed = Method(host.embed, number)


def work_of(sample: Sample) -> tuple[GroupSamples, tuple[ScoredAnswer, ...]]:
    """What rollouts and segmenters return for a row."""
    rng, scorer = np.random.default_rng(0), Scorer.of_preset("mask")
    reference = Reference.of_sample(sample, with_mask=True)
    drawn = Drawn.of(reference.target, reference)
    text = format_answer(box=reference.box, points=reference.points, think=THINK)
    answer = scorer.read(text)
    completions = tuple(
        Completion(
            text=text,
            token_ids=tuple(rng.integers(1000, 100_000, TOKENS).tolist()),
            logprobs=tuple((-rng.exponential(size=TOKENS)).tolist()),
            policy_version=0,
            finished=True,
        )
        for _ in range(N)
    )
    answers = tuple(
        ScoredAnswer(
            reward=scorer.score(answer, reference, drawn, step=0),
            answer=answer,
            failure=None,
            metrics=answer_metrics(answer, drawn, reference, think=True),
            mask=encode_rle(drawn.mask),
            expert_score=0.9,
        )
        for _ in range(N)
    )
    frames = Frames(original=sample.size, model=sample.size)
    return GroupSamples(prompt_ids=tuple(range(600)), frames=frames, completions=completions), answers


def simulate(count: int, rounds: int) -> dict[str, float]:
    """The figures of the second comparison. count: groups of a round."""
    from cluster.evaluation import collect
    from cluster.workers import Workers

    rows, calls, deadlines = samples(64), Calls(), DeadlineConfig()
    starter: Any = None
    host: Any = ray.remote(Host).options(num_cpus=0, max_concurrency=100_000)
    hosts = [host.remote(*work_of(rows[0])) for _ in range(HOSTS)]
    rollouts = RolloutPool(starter, calls, deadlines, sequences=SEQUENCES)
    segmenters = SegmenterPool(starter, calls, deadlines)
    for pool, size in ((rollouts, ROLLOUTS), (segmenters, SEGMENTERS)):
        pool.adopt({f"{pool.role} {i}": Simulated(hosts[i % HOSTS], i) for i in range(size)})
    workers = Workers(
        rollouts=rollouts,
        segmenters=segmenters,
        learner=LearnerPool({}, deadlines, calls),
        calls=calls,
        wanted={"rollout": ROLLOUTS, "segmenter": SEGMENTERS},
        expert_digest="",
    )
    sampling = SamplingParams(n=N, temperature=1.0, max_tokens=TOKENS, seed=0)
    collect(workers, [Group(run="warm", step=0, index=0, sample=rows[0])], sampling, "reward")
    found: list[tuple[float, float, float]] = []
    for step in range(rounds):
        groups = [Group(run="bench", step=step, index=i, sample=rows[i % len(rows)]) for i in range(count)]
        before = time.thread_time(), time.process_time(), time.perf_counter()
        collected = collect(workers, groups, sampling, "reward")
        after = time.thread_time(), time.process_time(), time.perf_counter()
        assert {each.scored.group.index for each in collected} == set(range(count))
        thread, process, wall = np.subtract(after, before).tolist()
        found.append((thread, process, wall))
    thread, process, wall = min(found)
    return {
        "driver_ms_per_sample": 1000 * thread / (count * N),
        "driver_ms_per_group": 1000 * thread / count,
        "process_ms_per_sample": 1000 * process / (count * N),
        "simulated_wall_ratio": wall / (SAMPLING_S[1] + SCORING_S),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=6, help="steps that are compared with their engines")
    parser.add_argument("--groups", type=int, default=2048, help="groups that simulated actors are given")
    parser.add_argument("--rounds", type=int, default=2, help="how often they are given them")
    parser.add_argument("--scale", type=float, default=0.2, help="of the time of steps that overlap; 0 for none")
    given = parser.parse_args()
    found: dict[str, float] = {}
    if given.rounds:
        ray.init(include_dashboard=False, logging_level="ERROR", log_to_driver=False)
        found |= simulate(given.groups, given.rounds)
        ray.shutdown()
    if given.steps:
        ray.init(include_dashboard=False, logging_level="ERROR", log_to_driver=False)
        found |= compare(given.steps)
        ray.shutdown()
    if given.scale:
        from bench.overlap import overlap

        ray.init(include_dashboard=False, logging_level="ERROR", log_to_driver=False)
        found |= overlap(given.scale)
    print(table([(name, f"{value:.3f}") for name, value in found.items()]))
    figures = {"processor": processor(), **{name: round(value, 4) for name, value in found.items()}}
    print(figures["processor"])
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
