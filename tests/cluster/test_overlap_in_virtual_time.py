"""What overlapping steps gain, by a clock that nobody waits for: the driver's own wait, pools, collector, open steps
and weight sync, between engines and a learner whose calls end when a simulated clock says so."""

import heapq
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from actors.calls import Calls, Ended
from actors.collector import Collector
from actors.config import DeadlineConfig
from actors.engine_report import UpdateReceipt
from actors.ledger import Ledger
from actors.pools import GroupRefs, LearnerPool, RolloutPool, SegmenterPool
from bench.overlap import LEARNER_BOUND, ROLLOUT_BOUND
from bench.simulated import Decoding, lengths
from cluster.steps_ahead import StepsAhead
from cluster.weight_sync import publish, settle, sync_weights, tend
from cluster.workers import Workers
from umrg.group import SamplingParams

ENGINES, BATCH, N, STEPS = 2, 16, 8, 8
SAMPLING = SamplingParams(n=N, temperature=1.0, max_tokens=2048, seed=0)


class Later:
    """What a call will return."""

    def __init__(self):
        self.done, self.died, self.value = False, False, None

    def end(self, value=None):
        self.done, self.value = True, value


class World:
    """The clock, and what happens when."""

    def __init__(self):
        self.now, self.engines, self._due, self._made = 0.0, [], [], 0

    def after(self, seconds, then):
        self._made += 1
        heapq.heappush(self._due, (self.now + seconds, self._made, then))

    def returning(self, seconds, value):
        later = Later()
        self.after(seconds, lambda: later.end(value))
        return later

    def go_on(self, until):
        """To the next thing that happens."""
        ends = [due for engine in self.engines if (due := engine.decoding.due()) is not None]
        self.now = max(self.now, min([until, *ends, *(due for due, _, _ in self._due[:1])]))
        while self._due and self._due[0][0] <= self.now:
            heapq.heappop(self._due)[2]()
        for engine in self.engines:
            engine.decode()


class VirtualCalls(Calls):
    def __init__(self, world):
        super().__init__(now=lambda: world.now)
        self.world = world

    def _ended(self, seconds):
        until = self.world.now + seconds
        while not any(ref.done for ref in self._flying) and self.world.now < until:
            self.world.go_on(until)
        ended = [(ref, self._flying.pop(ref)[0]) for ref in list(self._flying) if ref.done]
        return [
            Ended(call=call, result=ref.value, fault="died" if ref.died else None, cause="it died")
            for ref, call in ended
        ]


class Method:
    def __init__(self, function):
        self.remote = function

    def options(self, num_returns):
        return self


class Engine:
    def __init__(self, world, speeds):
        self.world, self.speeds, self.version = world, speeds, 0
        self.decoding, self.sampling, self.made = Decoding(speeds.slower), {}, 0
        self.sampled, self.update_weights = Method(self._sampled), Method(self._update_weights)
        world.engines.append(self)

    def _sampled(self, group, sampling):
        self.decode()
        self.made += 1
        self.sampling[str(self.made)] = receipt, samples = Later(), Later()
        samples.end(SimpleNamespace(version=self.version, completions=[None] * sampling.n))
        self.decoding.add(str(self.made), lengths(group, sampling), self.world.now)
        return receipt, samples

    def _update_weights(self, version, buckets):
        assert not self.sampling
        self.version = version
        return self.world.returning(self.speeds.load_s, UpdateReceipt(checksum=buckets[0], compared=1, unlike=()))

    def decode(self):
        for name in self.decoding.advance(self.world.now):
            self.sampling.pop(name)[0].end()

    def die(self):
        self.world.engines.remove(self)
        for receipt, _ in self.sampling.values():
            receipt.died = True
            receipt.end()


class Groups:
    """As `cluster.evaluation.Collecting`, without Ray's object store."""

    def __init__(self, workers, step, first, rows):
        groups = [SimpleNamespace(id=f"{step}/{first + i}", step=step, index=first + i) for i in range(len(rows))]
        refs: Any = {group.id: GroupRefs(group=group, masks=(), image=group.id) for group in groups}
        self.ledger, self.aside = Ledger(refs), 0
        stages = workers.rollouts.sampling(refs, SAMPLING), workers.segmenters.scoring(refs, "reward")
        self.dispatch = Collector(self.ledger, *stages, workers.calls).dispatch

    @property
    def sampled(self):
        return self.ledger.sampled

    @property
    def closed(self):
        return self.ledger.closed

    def collected(self):
        return [SimpleNamespace(scored=entry.scored[0], refs=None) for entry in self.ledger.entries.values()]


class Run:
    def __init__(self, speeds, staleness, *, learns=True):
        world, self.speeds, self.staleness, self.learns = World(), speeds, staleness, learns
        calls: Any = VirtualCalls(world)
        deadlines, starter = DeadlineConfig(), self
        self.world, self.seconds, self.learnt = world, [], []
        self.workers = Workers(
            rollouts=RolloutPool(starter, calls, deadlines, sequences=BATCH * N // ENGINES),
            segmenters=SegmenterPool(starter, calls, deadlines),
            learner=LearnerPool({"learner 0": self.rank()}, deadlines, calls),
            calls=calls,
            wanted={"rollout": ENGINES, "segmenter": 1},
            expert_digest="",
        )
        self.workers.rollouts.adopt({f"rollout {i}": Engine(world, speeds) for i in range(ENGINES)})
        segmenter = SimpleNamespace(score=Method(self.score), embed=Method(self.embed))
        self.workers.segmenters.adopt({"segmenter 0": segmenter})
        self.ahead = StepsAhead(
            draw=lambda count: list(range(count)),
            begin=lambda step, first, rows, aside: Groups(self.workers, step, first, rows),
            tend=lambda: tend(self.workers),
            turn=calls.turn,
            batch=BATCH,
            retries=0,
            staleness=staleness,
            last=STEPS,
        )
        self.workers.learner.meanwhile = self.ahead.attend

    def start(self, pool, name):
        self.world.after(self.speeds.start_s, lambda: pool.has_loaded(name))
        return Engine(self.world, self.speeds)

    def end(self, name, handle, *, cause):
        pass

    def embed(self, group, depth):
        return self.world.returning(0.0, 1 << 30)

    def score(self, group, masks, samples, depth):
        answers = [None] * len(samples.value.completions)
        scored = SimpleNamespace(group=group, samples=samples.value, answers=answers, zero_variance=False)
        return self.world.returning(self.speeds.score_s, scored)

    def rank(self):
        learn_s = self.speeds.learn_s if self.learns else 0.0
        update = Method(lambda groups, work: self.world.returning(learn_s, None))
        return SimpleNamespace(
            update=update,
            weights=Method(lambda everything: self.world.returning(self.speeds.export_s, ("sum", ["sum"]))),
        )

    def take_step(self, number):
        """The calls of `Training.take_step`, in its order; the canary is left out."""
        phase: Any = lambda name: nullcontext()  # noqa: E731
        groups, _ = self.ahead.collect(number, phase=phase, meanwhile=lambda: None)
        self.workers.learner.update([each.refs for each in groups], [])
        scored: Any = [each.scored for each in groups]
        self.learnt.append([(each.group.id, each.samples.version) for each in scored])
        publish(self.workers, version=number + 1)
        if not self.staleness:
            settle(self.workers)

    def go(self, *, dies=None):
        sync_weights(self.workers, version=0)
        for number in range(STEPS + 1):
            if number == dies:
                self.world.after(self.speeds.dies_s, self.workers.rollouts.ready[0].handle.die)
            began = self.world.now
            self.take_step(number)
            self.seconds.append(self.world.now - began)
        return sum(self.seconds[1:]) / STEPS


@pytest.mark.parametrize("speeds", [LEARNER_BOUND, ROLLOUT_BOUND])
def test_a_step_that_overlaps_takes_as_long_as_its_longer_side(speeds):
    """And one that does not, as long as both. An engine that dies while the learner learns is noticed then, and its
    groups are sampled by others."""
    learner = speeds.learn_s + speeds.export_s
    rollouts = Run(speeds, 0, learns=False).go(dies=3)
    assert Run(speeds, 1).go(dies=3) <= 1.1 * max(learner, rollouts)
    assert Run(speeds, 0).go(dies=3) == pytest.approx(rollouts + speeds.learn_s, rel=0.1)


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_every_group_is_learnt_from_once_and_lags_as_far_as_it_may(staleness):
    run = Run(ROLLOUT_BOUND, staleness)
    run.go(dies=3)
    ids = [id for groups in run.learnt for id, _ in groups]
    assert len(ids) == len(set(ids)) == BATCH * (STEPS + 1)
    lags = {step - version for step, groups in enumerate(run.learnt) for _, version in groups}
    assert min(lags) == 0 and max(lags) == staleness
