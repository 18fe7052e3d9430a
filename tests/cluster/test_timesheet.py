"""Time by role, from phases and pools by one clock of the test's own."""

import pytest

from actors.experts.desk import CacheUse
from actors.pool import Pool
from cluster.timesheet import Clock, Timesheet, cache_metrics
from tests.actors.test_pool_worked import Nobody


class Run:
    """Two rollouts, a segmenter and a learner."""

    def __init__(self):
        self.now = 0.0
        self.clock = Clock(lambda: self.now)
        self.rollouts, self.segmenters = (
            Pool(role, Nobody(), bound=9, now=lambda: self.now) for role in ("rollout", "segmenter")
        )
        self.rollouts.adopt({"rollout 0": None, "rollout 1": None})
        self.segmenters.adopt({"segmenter 0": None})
        self.timesheet = Timesheet(self.clock, (self.rollouts, self.segmenters), ranks=4)

    def work(self, pool, *names):
        """Give work to some members."""
        for name in names:
            pool.took(pool.members[name], name, 1)

    def end(self, pool, name, after):
        """A member's work ends after some seconds."""
        self.now += after
        pool.gave(name, name, 1)

    def collect(self):
        """One rollout samples for 3 s, the other for 6; the segmenter scores for 2 s meanwhile and 4 s afterwards."""
        with self.timesheet.phase("rollout"):
            self.work(self.rollouts, "rollout 0", "rollout 1")
            self.end(self.rollouts, "rollout 0", after=3)
            self.now += 1
            self.work(self.segmenters, "segmenter 0")
            self.end(self.rollouts, "rollout 1", after=2)
        with self.timesheet.phase("score"):
            self.end(self.segmenters, "segmenter 0", after=4)

    def step(self):
        self.collect()
        for name, seconds in (("learn", 8), ("sync", 2)):
            with self.timesheet.phase(name):
                self.now += seconds
        return self.timesheet.lap()


EXPECTED = {
    "actors/rollout": 2.0,
    "busy/rollout": 4.5 / 20,
    "busy/rollout_awaited": 4.5 / 6,
    "actors/segmenter": 1.0,
    "busy/segmenter": 6 / 20,
    "busy/segmenter_awaited": 1.0,
    "actors/learner": 4.0,
    "busy/learner": 8 / 20,
}


def test_each_role_is_busy_for_its_share_of_the_step():
    assert Run().step() == pytest.approx(EXPECTED)


def test_an_evaluation_between_two_steps_counts_for_neither():
    run = Run()
    run.step()
    run.work(run.rollouts, "rollout 0")
    run.end(run.rollouts, "rollout 0", after=100)
    assert run.step() == pytest.approx(EXPECTED)


def test_groups_that_are_sampled_again_count_for_the_same_step():
    run = Run()
    run.collect()
    found = run.step()
    assert found["busy/rollout"] == pytest.approx(9 / 30) and found["busy/learner"] == pytest.approx(8 / 30)


def test_a_rollout_that_joins_counts_from_then_on():
    run = Run()
    with run.timesheet.phase("rollout"):
        run.rollouts.reconcile(3)
        run.now += 5
        run.rollouts.has_loaded("rollout 2")
        run.rollouts.admit("rollout 2")
        run.now += 5
    assert run.timesheet.lap()["actors/rollout"] == pytest.approx(2.5)


def test_the_phases_are_those_of_the_runs_clock():
    run = Run()
    run.step()
    assert run.clock.lap() == {"rollout": 6.0, "score": 4.0, "learn": 8.0, "sync": 2.0, "step": 20.0}


def test_the_caches_figures():
    found = cache_metrics(CacheUse(hits=6, misses=2, read=1, embedded=2, kept=9, bytes=3 << 20))
    assert found == {
        "segmenter/embedded": 2, "segmenter/cache_hits": 6, "segmenter/cache_misses": 2, "segmenter/cache_read": 1,
        "segmenter/cache_hit_rate": 0.75, "segmenter/cache_mib": 3,
    }  # fmt: skip
    assert cache_metrics(CacheUse())["segmenter/cache_hit_rate"] == 0, "where no mask is looked at"
