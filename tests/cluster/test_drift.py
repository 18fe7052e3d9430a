"""The alarm where engine and learner drift apart."""

import pytest

from cluster.drift import alarm, beyond, drifted


@pytest.mark.parametrize(
    ("engine_kl", "raised"),
    [
        ([0.002] * 40, False),
        ([0.002] * 30 + [0.5], False),  # a single step decides nothing
        ([0.002] * 30 + [0.05] * 5, True),
        ([1e-9] * 30 + [1e-6] * 5, False),  # a thousand times nothing is nothing
        ([0.05] * 14, False),  # too early to tell
        ([0.02 * 1.1**step for step in range(40)], True),
    ],
)
def test_a_lasting_rise_raises_it(engine_kl, raised):
    assert drifted(engine_kl) is raised


def test_it_says_what_to_change():
    assert "is 0.05 nats and was 0.002" in alarm([0.002] * 30 + [0.05] * 5)
    assert "learner.objective.correction" in alarm([0.002] * 30 + [0.05] * 5)


def test_a_limit_is_passed_when_several_steps_are_above_it():
    assert beyond([0.002] * 3 + [0.3] * 3, 0.2) and not beyond([0.002] * 4 + [0.3], 0.2)
    assert not beyond([0.3] * 4, 0.2), "too early to tell"
    assert not beyond([0.3] * 9, None)
