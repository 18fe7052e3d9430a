"""Which steps are open, what is sampled with which weights, and which rows a checkpoint lists."""

import random
from collections import Counter
from contextlib import nullcontext
from itertools import chain
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.steps_ahead import StepsAhead

BATCH = 4


class Driver:
    """A run whose groups take a random time, and whose learner takes as long; rows are numbers that are counted up."""

    def __init__(self, *, staleness, steps=9, flat=0.0, retries=0, seed=0):
        """flat: share of zero-variance groups."""
        self.chance: Any = random.Random(seed)
        self.flat = flat
        self.steps, self.staleness, self.retries = steps, staleness, retries
        self.drawn, self.step, self.version = 0, 0, 0
        self.learnt: list[list[int]] = []
        self.given_up: list[int] = []
        self.lags: Counter[int] = Counter()
        self.begun: list[tuple[int, int, int]] = []
        """Step, groups, and how many of the step were put aside before, of all that were begun."""
        self.meanwhile: Any = lambda: None
        self.tend: Any = lambda: None
        self.ahead = self.stream()

    def stream(self):
        return StepsAhead(
            draw=self.draw,
            begin=lambda step, first, rows, aside: Groups(self, step, first, rows, aside),
            tend=lambda: self.tend(),
            turn=lambda: None,
            batch=BATCH,
            retries=self.retries,
            staleness=self.staleness,
            last=self.steps - 1,
        )

    def draw(self, count):
        self.drawn += count
        return list(range(self.drawn - count, self.drawn))

    def take_step(self):
        phase: Any = lambda name: nullcontext()  # noqa: E731
        kept, resampled = self.ahead.collect(self.step, phase=phase, meanwhile=lambda: self.meanwhile())
        for _ in range(self.chance.randrange(8)):
            self.ahead.attend()
        self.learnt.append([each.row for each in kept])
        assert len(kept) == BATCH
        self.step += 1
        self.version = self.step
        return resampled

    def run(self, until=None):
        while self.step < (until or self.steps):
            self.take_step()


class Groups:
    """Groups on their way, of which some are sampled at each dispatch, with the weights of then."""

    def __init__(self, driver, step, first, rows, aside):
        self.driver, self.step, self.rows = driver, step, dict(enumerate(rows, start=first))
        self.waiting, self.left = list(self.rows), 3
        self.aside = 0
        driver.begun.append((step, len(rows), aside))

    @property
    def sampled(self):
        return not self.waiting

    @property
    def closed(self):
        return not self.waiting and not self.left

    def dispatch(self):
        for _ in range(min(len(self.waiting), self.driver.chance.randrange(3))):
            self.waiting.pop()
            self.driver.lags[self.step - self.driver.version] += 1
        if not self.waiting and self.left:
            self.left -= 1

    def collected(self):
        assert self.closed
        found = []
        for index, row in self.rows.items():
            flat = self.driver.chance.random() < self.driver.flat
            scored = SimpleNamespace(zero_variance=flat, group=SimpleNamespace(index=index))
            found.append(SimpleNamespace(scored=scored, row=row))
        return found


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_no_group_is_sampled_with_weights_that_are_older_than_the_staleness(staleness):
    driver = Driver(staleness=staleness)
    driver.run()
    assert max(driver.lags) == staleness and min(driver.lags) == 0
    assert driver.learnt == [list(range(BATCH * step, BATCH * (step + 1))) for step in range(driver.steps)]


def test_without_staleness_nothing_is_sampled_while_the_learner_learns():
    driver = Driver(staleness=0)
    driver.take_step()
    before = driver.drawn, sum(driver.lags.values())
    for _ in range(50):
        driver.ahead.attend()
    assert (driver.drawn, sum(driver.lags.values())) == before and driver.ahead.rows() == []


def test_the_next_step_is_sampled_and_its_flat_groups_are_replaced_while_the_learner_learns():
    driver = Driver(staleness=1, flat=0.5, retries=9)
    driver.take_step()
    for _ in range(500):
        driver.ahead.attend()
    assert driver.ahead._steps[0].collecting is None, "nothing is left to be waited for"
    assert driver.take_step() > 0


@pytest.mark.parametrize("staleness", [0, 1])
def test_the_learner_may_be_waited_for_while_a_step_is_collected(staleness):
    """For weights that a rollout needs which joins: what is called meanwhile does not take the step away."""
    driver = Driver(staleness=staleness, flat=0.3, retries=2)
    driver.tend = lambda: driver.ahead.attend() if driver.chance.random() < 0.5 else None
    driver.run()
    assert [len(rows) for rows in driver.learnt] == [BATCH] * driver.steps


def test_actors_and_wishes_are_looked_after_between_two_steps_also_where_nothing_is_waited_for():
    """A wish first, so that what it asks for is there as soon as it can be; and while the learner is free."""
    driver = Driver(staleness=1)
    driver.take_step()
    for _ in range(500):
        driver.ahead.attend()
    seen: list[str] = []
    driver.meanwhile, driver.tend = (lambda: seen.append("wishes")), (lambda: seen.append("actors"))
    driver.chance = SimpleNamespace(randrange=lambda _: 0)  # the learner is not waited for
    driver.take_step()
    assert seen == ["wishes", "actors"]


def test_what_replaces_flat_groups_is_told_how_many_of_the_step_were_put_aside():
    driver = Driver(staleness=0, flat=1.0, retries=2)
    begin = driver.ahead._begin

    def failing(step, first, rows, aside):
        groups = begin(step, first, rows, aside)
        groups.aside = 1
        return groups

    driver.ahead._begin = failing
    phase: Any = lambda name: nullcontext()  # noqa: E731
    driver.ahead.collect(0, phase=phase, meanwhile=lambda: None)
    assert driver.begun == [(0, BATCH, 0), (0, BATCH, 1), (0, BATCH, 2)]


def test_no_step_after_the_last_is_begun():
    driver = Driver(staleness=3, steps=2)
    driver.run()
    assert driver.drawn == 2 * BATCH and driver.ahead.rows() == []


@given(
    staleness=st.integers(0, 3),
    then=st.integers(0, 3),
    flat=st.sampled_from([0.0, 0.4]),
    retries=st.integers(0, 4),
    stop=st.integers(0, 8),
    seed=st.integers(0, 1000),
)
def test_a_run_that_goes_on_from_a_checkpoint_learns_from_each_row_once(staleness, then, flat, retries, stop, seed):
    """Whatever was on its way, also with another staleness. Rows of zero-variance groups that were replaced are used
    up, and no others."""
    driver = Driver(staleness=staleness, flat=flat, retries=retries, seed=seed)
    driver.run(until=stop)
    listed, position = driver.ahead.rows(), driver.drawn
    learnt = list(chain.from_iterable(driver.learnt))
    left = list(chain.from_iterable(listed))
    assert len(listed) <= staleness and all(len(rows) <= BATCH for rows in listed)
    used_up = set(range(position)) - set(learnt) - set(left)
    assert not used_up or (flat and retries), "only a replaced row is neither learnt from nor listed"
    driver.staleness, driver.flat = then, 0.0
    driver.ahead = driver.stream()
    driver.ahead.restore(listed)
    driver.run()
    rows = list(chain.from_iterable(driver.learnt))
    assert len(rows) == len(set(rows)) == BATCH * driver.steps
    assert set(left) <= set(rows), "what was on its way is learnt from"
    assert set(range(driver.drawn)) - set(rows) == used_up
