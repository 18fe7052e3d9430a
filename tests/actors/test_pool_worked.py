"""How busy the members of a pool are, by a clock of the test's own."""

import pytest

from actors.pool import Pool, Worked


class Nobody:
    """Makes actors that are no more than their names."""

    def start(self, pool, name):
        return name

    def end(self, name, handle, *, cause):
        pass


@pytest.fixture
def at():
    """The time, which a test moves."""
    return [100.0]


@pytest.fixture
def pool(at):
    return Pool("rollout", Nobody(), bound=3, now=lambda: at[0])


def test_a_member_is_busy_while_it_has_any_work(pool, at):
    pool.adopt({"rollout 0": None})
    (member,) = pool
    pool.took(member, "a", 1)
    at[0] += 2
    pool.took(member, "b", 1)
    at[0] += 3
    pool.gave("rollout 0", "a", 1)
    at[0] += 1
    pool.gave("rollout 0", "b", 1)
    at[0] += 4
    assert pool.worked() == Worked(there=10.0, busy=6.0)


def test_the_seconds_of_members_that_come_and_go_add_up(pool, at):
    pool.adopt({"rollout 0": None})
    pool.took(next(iter(pool)), "a", 1)
    pool.reconcile(2)
    at[0] += 5  # another one starts
    pool.has_loaded("rollout 1")
    pool.admit("rollout 1")
    at[0] += 10
    pool.died("rollout 0", "killed")
    at[0] += 7
    assert pool.worked() == Worked(there=15.0 + 17.0, busy=15.0)


def test_a_member_that_is_drained_counts_until_its_work_ends(pool, at):
    pool.adopt({"rollout 0": None, "rollout 1": None})
    for member in pool:
        pool.took(member, member.name, 1)
    pool.reconcile(1)
    at[0] += 3
    for name in ("rollout 0", "rollout 1"):
        pool.gave(name, name, 1)
    pool.reconcile(1)
    at[0] += 4
    assert pool.worked() == Worked(there=6.0 + 4.0, busy=6.0)
