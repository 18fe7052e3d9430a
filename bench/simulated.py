"""Rollouts, segmenters and a learner's rank that take the time of a 7B on eight GPUs, and compute nothing.

Times are in seconds of those GPUs (simulated seconds); `Speeds.scale` says how long one of them lasts here. What passes
between the actors has the size that it has in training, but for weights. Each actor is a process, so that one that dies
does so as Ray's actors do.
"""

import asyncio
import heapq
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import ray

from actors.calls import Call, Calls, Ended, Ref
from actors.engine_report import UpdateReceipt
from actors.experts.desk import CacheUse
from actors.pool import Pool
from learner.update_report import UpdateReport
from rewards.scored import ScoredAnswer, ScoredGroup
from umrg.group import Completion, Group, GroupSamples, SamplingParams

MEDIAN, SIGMA = 180, 0.8
"""Of the lengths of answers, which are log-normal, in tokens; one of about 800 reaches a limit of 2,048."""
PASS_S, SEQUENCE_S, PREFILL_S = 4.6e-3, 30e-6, 20e-3
"""Seconds of a decoding pass (a 7B's weights are read once), of each sequence in it, and of a prompt's prefill."""


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """How long everything takes, in simulated seconds."""

    learn_s: float
    """An update."""
    slower: float = 1.0
    """By which engines take longer than `PASS_S` and its like say."""
    export_s: float = 0.5
    """Of the learner's weights."""
    load_s: float = 1.0
    """Until an engine has taken weights over."""
    score_s: float = 0.05
    """A group's."""
    start_s: float = 40.0
    """Until an engine is there."""
    dies_s: float = 6.5
    """From the beginning of the step in which an engine dies."""
    scale: float = 1.0
    """Seconds that one simulated second lasts."""


def lengths(group: Group, sampling: SamplingParams) -> list[int]:
    """Tokens of a group's answers, which depend on its step and index alone."""
    drawn = np.random.default_rng([group.step, group.index]).lognormal(np.log(MEDIAN), SIGMA, sampling.n)
    return [int(each) for each in np.clip(drawn, 1, sampling.max_tokens)]


class Decoding:
    """The sequences that one engine decodes at the same time. A pass gives a token to each, and takes longer the more
    there are."""

    def __init__(self, slower: float = 1.0) -> None:
        self._slower = slower
        self._clock, self._passes = 0.0, 0.0
        self._ends: list[tuple[float, str]] = []
        """Of each sequence the pass after which it ends, and its group; a heap."""
        self._left: Counter[str] = Counter()
        """Sequences of each group that have not ended."""

    def __len__(self) -> int:
        return len(self._ends)

    def add(self, group: str, tokens: Sequence[int], now: float) -> None:
        """Sequences of a group begin, once its prompt is prefilled; the others wait meanwhile. `advance` must have come
        as far as now."""
        self._clock = max(self._clock, now) + PREFILL_S * self._slower
        self._left[group] = len(tokens)
        for each in tokens:
            heapq.heappush(self._ends, (self._passes + each, group))

    def advance(self, now: float) -> list[str]:
        """Decode until now. Returns the groups all of whose sequences have ended since the last time."""
        ended = []
        while self._ends and (at := self._next(self._ends)) <= now:
            self._clock, (self._passes, group) = at, heapq.heappop(self._ends)
            self._left[group] -= 1
            if not self._left[group]:
                del self._left[group]
                ended.append(group)
        if now > self._clock:
            self._passes += (now - self._clock) / self._pass_s(len(self._ends))
            self._clock = now
        return ended

    def due(self) -> float | None:
        """When the next group ends, if none begins before; None without any."""
        if not self._ends:
            return None
        ahead = Decoding(self._slower)
        ahead._clock, ahead._passes = self._clock, self._passes
        ahead._ends, ahead._left = list(self._ends), Counter(self._left)
        while not ahead.advance(at := ahead._next(ahead._ends)):
            pass
        return at

    def _next(self, ends: Sequence[tuple[float, str]]) -> float:
        """When the next sequence ends."""
        return self._clock + (ends[0][0] - self._passes) * self._pass_s(len(ends))

    def _pass_s(self, sequences: int) -> float:
        return self._slower * (PASS_S + SEQUENCE_S * sequences)


class SimulatedRollout:
    """As `actors.rollout.Rollout`."""

    def __init__(self, speeds: Speeds, samples: GroupSamples) -> None:
        """samples: those of a group, of which one completion is as long as an answer may be."""
        self._speeds, self._samples = speeds, samples
        self._decoding, self._version, self._made = Decoding(speeds.slower), 0, 0
        self._waiting: dict[str, asyncio.Future[None]] = {}
        self._woken = asyncio.Event()
        self._decoder: asyncio.Task[None] | None = None

    async def start(self, seconds: float) -> None:
        """Load the model, for so many seconds."""
        await asyncio.sleep(seconds)

    async def sampled(self, group: Group, sampling: SamplingParams) -> tuple[float, GroupSamples]:
        self._decoder = self._decoder or asyncio.create_task(self._decode())
        began, version, tokens = self._now(), self._version, lengths(group, sampling)
        self._wake(self._decoding.advance(began))
        self._made += 1
        name = f"{group.id} {self._made}"
        self._waiting[name] = asyncio.get_running_loop().create_future()
        self._decoding.add(name, tokens, began)
        self._woken.set()
        await self._waiting[name]
        del self._waiting[name]
        return self._now() - began, self._answers(tokens, version)

    async def sample(self, group: Group, sampling: SamplingParams) -> GroupSamples:
        """The canary's, whose log-probs are the learner's."""
        (canary,) = self._answers([sampling.max_tokens], self._version).completions
        return replace(self._samples, completions=(replace(canary, logprobs=(-1.0,) * sampling.max_tokens),))

    async def update_weights(self, version: int, buckets: Sequence[Ref]) -> UpdateReceipt:
        assert not self._waiting, "weights are taken over by an engine that has nothing to do"
        checksum = await buckets[0]
        await asyncio.sleep(self._speeds.load_s * self._speeds.scale)
        self._version = version
        return UpdateReceipt(checksum=checksum, compared=1, unlike=())

    async def _decode(self) -> None:
        while True:
            self._wake(self._decoding.advance(self._now()))
            self._woken.clear()
            due = self._decoding.due()
            seconds = None if due is None else max(0.0, due - self._now()) * self._speeds.scale
            with suppress(TimeoutError):
                await asyncio.wait_for(self._woken.wait(), seconds)

    def _wake(self, ended: Sequence[str]) -> None:
        for name in ended:
            self._waiting[name].set_result(None)

    def _answers(self, tokens: Sequence[int], version: int) -> GroupSamples:
        (longest,) = self._samples.completions
        return replace(self._samples, completions=tuple(_cut(longest, each, version) for each in tokens))

    def _now(self) -> float:
        return time.monotonic() / self._speeds.scale


def _cut(longest: Completion, tokens: int, version: int) -> Completion:
    return replace(
        longest, token_ids=longest.token_ids[:tokens], logprobs=longest.logprobs[:tokens], policy_version=version
    )


class SimulatedSegmenter:
    """As `actors.segmenter.Segmenter`. answers: of a group, to each of whose completions one is given."""

    def __init__(self, speeds: Speeds, answers: Sequence[ScoredAnswer]) -> None:
        self._speeds, self._answers = speeds, tuple(answers)

    def start(self, seconds: float) -> str:
        """Load the expert, for so many seconds. Returns its digest."""
        time.sleep(seconds)
        return ""

    def embed(self, group: Group, depth: str) -> int:
        """Nothing, for scoring has its time; of nothing any number is kept."""
        return 1 << 30

    def cache_use(self) -> CacheUse:
        """No embeddings are kept."""
        return CacheUse()

    def score(self, group: Group, masks: tuple[bytes, ...], samples: GroupSamples, depth: str) -> ScoredGroup:
        time.sleep(self._speeds.score_s * self._speeds.scale)
        answers = self._answers[: len(samples.completions)]
        return ScoredGroup(group=group.without_files(), samples=samples, answers=answers)


class SimulatedRank:
    """As `actors.learner_rank.LearnerRank`."""

    def __init__(self, speeds: Speeds) -> None:
        self._speeds, self._exported = speeds, 0
        self._learnt: list[list[tuple[str, int]]] = []

    def update(self, groups: Sequence[tuple[Ref, Ref]], work: Sequence[int]) -> UpdateReport:
        began = time.monotonic()
        found: list[ScoredGroup] = ray.get([scored for _, scored in groups])
        self._learnt.append([(each.group.id, each.samples.completions[0].policy_version) for each in found])
        time.sleep(max(0.0, began + self._speeds.learn_s * self._speeds.scale - time.monotonic()))
        tokens = sum(each.tokens for each in found)
        nothing = dict.fromkeys(("loss", "kl", "clip_fraction", "entropy", "engine_gap", "engine_kl"), 0.0)
        return UpdateReport(
            **nothing, truncated_fraction=0.0, correction=1.0, grad_norm=0.0, lr=0.0, tokens=tokens, updates=1
        )

    def weights(self, everything: bool) -> tuple[str, list[Ref]]:
        time.sleep(self._speeds.export_s * self._speeds.scale)
        self._exported += 1
        return str(self._exported), [ray.put(str(self._exported))]

    def logprobs(self, group: Group, token_ids: Sequence[int]) -> list[float]:
        return [-1.0] * len(token_ids)

    def learnt(self) -> list[list[tuple[str, int]]]:
        """Of each update since the last time, the groups with the version that sampled each."""
        learnt, self._learnt = self._learnt, []
        return learnt


class SimulatedStarter:
    """Makes simulated actors (`actors.pool.Starter`)."""

    def __init__(self, calls: Calls, speeds: Speeds, samples: GroupSamples, answers: Sequence[ScoredAnswer]) -> None:
        self._calls, self._speeds = calls, speeds
        rollout = ray.remote(SimulatedRollout).options(num_cpus=0, max_concurrency=1000)
        segmenter = ray.remote(SimulatedSegmenter).options(num_cpus=0)
        self._kinds = {
            "rollout": partial(rollout.remote, speeds, samples),
            "segmenter": partial(segmenter.remote, speeds, answers),
        }

    def make(self, role: str) -> Any:
        """An actor, of which nobody is told."""
        return self._kinds[role]()

    def start(self, pool: Pool, name: str) -> Any:
        handle = self.make(pool.role)

        def loaded(ended: Ended) -> None:
            if ended.fault:
                pool.died(name, ended.cause)
            else:
                pool.has_loaded(name, ended.result)

        call = Call(actor=name, doing="starting", seconds=600.0, then=loaded)
        self._calls.add(handle.start.remote(self._speeds.start_s * self._speeds.scale), call)
        return handle

    def end(self, name: str, handle: Any, *, cause: str | None) -> None:
        ray.kill(handle)
