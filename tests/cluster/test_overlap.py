"""The simulated engines of `bench.overlap`, and the order of what it measures."""

import pytest

from bench.overlap import LEARNER_BOUND, ROLLOUT_BOUND, Bench, Shape
from bench.simulated import PASS_S, PREFILL_S, SEQUENCE_S, Decoding, Speeds, lengths
from umrg.group import Group, SamplingParams

SAMPLING = SamplingParams(n=16, temperature=1.0, max_tokens=2048, seed=0)


def ends(decoding):
    """When each group ends, if none begins any more."""
    found = {}
    while (due := decoding.due()) is not None:
        found.update(dict.fromkeys(decoding.advance(due), due))
    return found


def test_a_sequence_alone_takes_a_pass_for_each_token():
    decoding = Decoding()
    decoding.add("a", [100], 5.0)
    assert decoding.due() == pytest.approx(5.0 + PREFILL_S + 100 * (PASS_S + SEQUENCE_S))
    assert decoding.advance(5.0) == [] and decoding.advance(6.0) == ["a"] and decoding.due() is None


def test_passes_are_longer_the_more_sequences_there_are_and_a_group_ends_with_its_longest():
    decoding = Decoding(slower=2.0)
    decoding.add("a", [100, 300], 0.0)
    expected = PREFILL_S + 100 * (PASS_S + 2 * SEQUENCE_S) + 200 * (PASS_S + SEQUENCE_S)
    assert ends(decoding) == {"a": pytest.approx(2.0 * expected)}


def test_a_group_that_comes_later_lets_the_others_wait_for_its_prefill():
    decoding = Decoding()
    decoding.add("a", [100], 0.0)
    decoding.advance(0.2)
    decoding.add("b", [10], 0.2)
    found = ends(decoding)
    assert found["b"] == pytest.approx(0.2 + PREFILL_S + 10 * (PASS_S + 2 * SEQUENCE_S))
    assert found["a"] == pytest.approx(2 * PREFILL_S + 90 * (PASS_S + SEQUENCE_S) + 10 * (PASS_S + 2 * SEQUENCE_S))


@pytest.mark.parametrize(("speeds", "seconds"), [(LEARNER_BOUND, 13.0), (ROLLOUT_BOUND, 25.0)])
def test_a_rollout_has_a_tail(samples, speeds, seconds):
    """An engine's share of a step takes about as long as is said; half of the groups have ended well before."""
    for step in range(5):
        decoding = Decoding(speeds.slower)
        for index in range(32):
            group = Group(run="t", step=step, index=index, sample=samples[0])
            decoding.add(group.id, lengths(group, SAMPLING), 0.0)
        found = sorted(ends(decoding).values())
        assert len(found) == 32 and found[-1] == pytest.approx(seconds, rel=0.15) and found[15] < 0.65 * found[-1]


@pytest.fixture(scope="module")
def samples():
    from bench.pipeline import samples

    return samples(1)


@pytest.mark.slow
def test_every_group_is_learnt_from_once_and_lags_as_far_as_it_may(ray_cluster, tmp_path):
    """Also where an engine dies and another one joins."""
    shape = Shape(engines=2, segmenters=1, batch=8, n=4, max_tokens=512, steps=6)
    bench = Bench(Speeds(learn_s=4.0, dies_s=1.5, start_s=5.0, scale=0.1), shape, tmp_path)
    try:
        alone = bench.rollouts_alone()
        assert len(alone.seconds) == shape.steps and alone.learnt == []
        for staleness in (0, 1):
            learnt = bench.steps(staleness).learnt
            assert len(learnt) == shape.steps + 1 and all(len(groups) == shape.batch for groups in learnt)
            ids = [id for groups in learnt for id, _ in groups]
            assert len(set(ids)) == len(ids)
            lags = {step - version for step, groups in enumerate(learnt) for _, version in groups}
            assert lags == ({0} if staleness == 0 else {0, 1})
    finally:
        bench.end()
