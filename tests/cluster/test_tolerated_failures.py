"""How many groups of a step may be put aside: a share of the step, in however many rounds its groups are begun."""

from types import SimpleNamespace
from typing import Any

import pytest

from actors.calls import Calls
from actors.config import DeadlineConfig
from actors.pools import GroupRefs, RolloutPool, SegmenterPool
from cluster.evaluation import TooManyFailures
from cluster.train import Training
from umrg.group import SamplingParams

BATCH, SHARE = 40, 0.05


@pytest.fixture
def begin(monkeypatch):
    """Begins so many groups of a step, of which so many were put aside already."""
    refs: Any = GroupRefs(group=None, masks=None, image="")
    monkeypatch.setattr(GroupRefs, "put", lambda group: refs)
    calls = Calls()
    starter: Any = None  # nobody is started
    workers = SimpleNamespace(
        rollouts=RolloutPool(starter, calls, DeadlineConfig(), sequences=8),
        segmenters=SegmenterPool(starter, calls, DeadlineConfig()),
        calls=calls,
        put_aside=[],
    )
    training: Any = SimpleNamespace(
        config=SimpleNamespace(name="trial", batch=BATCH, tolerated_failures=SHARE),
        workers=workers,
        rows=SimpleNamespace(samples=lambda rows: rows),
        sampling=SamplingParams(n=2, temperature=1.0, max_tokens=8),
    )
    return lambda groups, aside=0: Training.begin(training, 3, 0, list(range(groups)), aside)


def fail(collecting, groups):
    """So many groups end in errors until they are put aside."""
    ledger = collecting._ledger
    for id in list(ledger.entries)[:groups]:
        for _ in range(2):
            ledger.failed(id, ledger.begin(id), "no such organ")
    collecting.dispatch()


def test_a_step_goes_on_without_its_share(begin):
    fail(begin(BATCH), 2)
    with pytest.raises(TooManyFailures, match="3 of 40 groups could not be sampled or scored"):
        fail(begin(BATCH), 3)


def test_a_round_that_replaces_a_few_groups_may_lose_as_many_as_are_left_to_its_step(begin):
    fail(begin(3), 2)
    fail(begin(3, aside=1), 1)
    with pytest.raises(TooManyFailures):
        fail(begin(3, aside=2), 1)
