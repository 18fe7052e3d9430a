"""Which pool a run should have more of, in words."""

import pytest

from cluster.advice import advice, advice_after, loads


def step(rollout, score, learn, *, rollouts=1, segmenters=1, sampling=1.0, scoring=1.0):
    """Metrics of a step by its phases' seconds. sampling, scoring: share of rollouts and segmenters that have work in
    the phase in which everything else waits for them."""
    total = rollout + score + learn
    return {
        "seconds/rollout": rollout,
        "seconds/score": score,
        "seconds/learn": learn,
        "actors/rollout": rollouts,
        "actors/segmenter": segmenters,
        "actors/learner": 1.0,
        "busy/rollout": sampling * rollout / total,
        "busy/rollout_awaited": sampling,
        "busy/segmenter": scoring * score / total,
        "busy/segmenter_awaited": scoring,
        "busy/learner": learn / total,
    }


@pytest.mark.parametrize(
    ("line", "role", "said"),
    [
        (
            step(6, 1, 3, rollouts=2),
            "rollout",
            "rollouts were busy 60% of the time, and everything else waited for them 60%; one more would shorten a "
            "step the most, by 20% at most (rollout.actors=3, or medreasoner scale RUN rollout=3 while it runs)",
        ),
        (
            step(4, 4, 2, rollouts=4),
            "segmenter",
            "segmenters were busy 40% of the time, and everything else waited for them 40%; one more would shorten a "
            "step the most, by 20% at most (segmenter.actors=2, or medreasoner scale RUN segmenter=2 while it runs)",
        ),
        (
            step(2, 1, 7),
            "learner",
            "everything else waited for the learner 70% of the time; one more rank would shorten a step the most, by "
            "35% at most (learner.ranks=2 when the run starts or resumes)",
        ),
        (
            step(9, 0.3, 0.7, rollouts=4, sampling=0.25),
            None,
            "everything else waited for rollouts 90% of the time, but only 25% of them had work meanwhile; more of "
            "them would not help, more groups a step (batch) would",
        ),
        (
            step(9, 0.5, 0.5, rollouts=30),
            None,
            "no pool stands out: one more actor would save less than 5% of a step",
        ),
    ],
    ids=["rollouts", "segmenters", "learner", "rollouts without work", "balanced"],
)
def test_advice_is_for_whoever_all_else_waits_for_and_would_be_helped(line, role, said):
    found = advice(loads([line]))
    assert (found.role, found.text) == (role, said)


def test_where_rollouts_lack_work_another_role_may_be_what_helps():
    assert advice(loads([step(5, 1, 4, rollouts=4, sampling=0.25)])).role == "learner"


def test_times_of_several_steps_are_weighted_by_their_length():
    found = loads([step(1, 0, 1), step(8, 2, 8, sampling=0.5)])
    rollout = found["rollout"]
    assert (rollout.seconds, rollout.actors) == (20, 1)
    assert (rollout.busy, rollout.awaited, rollout.at_work) == pytest.approx((5 / 20, 9 / 20, 5 / 9))
    assert found["segmenter"].busy == pytest.approx(2 / 20) and found["learner"].busy == pytest.approx(9 / 20)


def test_there_is_no_advice_before_three_steps_or_soon_after_a_change():
    alone, two = step(6, 1, 3), step(6, 1, 3, rollouts=2)
    assert advice_after([alone] * 2) is None
    assert advice_after([alone] * 3 + [two] * 2) is None
    found = advice_after([alone] * 3 + [two] * 3)
    assert found and "rollout.actors=3" in found.text


def test_runs_of_earlier_versions_have_no_time_by_role():
    assert loads([{"seconds/rollout": 1.0}]) == {} and advice_after([{"seconds/rollout": 1.0}] * 3) is None
    assert advice_after([]) is None
