"""Wishes to scale a run, and what becomes of them."""

import json

import pytest

from cluster.scaling import Wishes, ask


@pytest.fixture
def run(tmp_path):
    (tmp_path / "summary.json").write_text('{"status": "running"}')
    return tmp_path


def test_a_wish_reaches_the_run_within_a_second(run):
    seconds = [0.0]
    wishes = Wishes(run, lambda: seconds[0])
    wanted = {"rollout": 1, "segmenter": 3}
    assert wishes.changed(wanted) == {}
    ask(run, ["rollout=2"])
    ask(run, ["segmenter=3"])
    assert wishes.changed(wanted) == {}, "it was looked for just now"
    seconds[0] = 1.0
    assert wishes.changed(wanted) == {"rollout": 2}


def test_what_an_earlier_driver_was_asked_for_is_forgotten(run):
    ask(run, ["rollout=2"])
    assert Wishes(run, lambda: 0.0).changed({"rollout": 1, "segmenter": 1}) == {}


@pytest.mark.parametrize("wish", ["learner=2", "rollout", "rollout=0", "rollout=-1", "rollout=two", "=3"])
def test_a_wish_that_is_none_is_refused(run, wish):
    with pytest.raises(ValueError, match=r"is not understood; give rollout=N or segmenter=N, N from 1 on"):
        ask(run, [wish])


def test_only_a_run_under_way_is_scaled(tmp_path):
    with pytest.raises(ValueError, match="is no run's folder"):
        ask(tmp_path, ["rollout=2"])
    (tmp_path / "summary.json").write_text(json.dumps({"status": "ended"}))
    with pytest.raises(ValueError, match="is ended; only one that is running can be scaled"):
        ask(tmp_path, ["rollout=2"])
