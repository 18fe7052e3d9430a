"""Figures of an evaluation, and what may be said of a difference."""

import warnings

import numpy as np
import pytest

from cluster.comparison import paired_interval
from cluster.figures import interval
from cluster.report.charts import curves, running_mean, stacked
from cluster.report.training import all_charts, phase_seconds


def test_a_paired_difference_is_seen_through_what_the_rows_have_in_common():
    rng = np.random.default_rng(0)
    before = rng.uniform(0, 1, 128)
    after = before + rng.normal(0.05, 0.02, 128)
    found = paired_interval(before, after)
    assert found["gain"] == pytest.approx(0.05, abs=0.01)
    assert 0.04 < found["low"] < found["gain"] < found["high"] < 0.06


def test_noise_gives_an_interval_around_zero():
    rng = np.random.default_rng(1)
    found = paired_interval(rng.uniform(0, 1, 64), rng.uniform(0, 1, 64))
    assert found["low"] < 0 < found["high"]


def test_a_running_mean_begins_with_what_there_is():
    assert running_mean([1, 2, 3, 4], 2) == [1, 1.5, 2.5, 3.5]
    assert running_mean([1, 2, 3], 1) == [1, 2, 3]


def test_charts_are_svg():
    for chart in (curves("a", [1, 2, 3], {"x": [1, 2, 3], "y": [3, 2, 1]}), stacked("b", [1, 2], {"x": [1, 2]}, "s")):
        assert chart.startswith("<svg") and chart.rstrip().endswith("</svg>")


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_of_one_row_or_of_equal_rows_the_interval_is_the_mean(rows):
    values = np.stack([np.full(rows, 0.1), np.zeros(rows)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        low, high = interval(values)
    assert low.tolist() == high.tolist() == values.mean(axis=-1).tolist()


def test_figures_share_the_resampled_rows():
    values = np.random.default_rng(2).uniform(0, 1, 50)
    low, high = interval(np.stack([values, values, 2 * values]))
    assert low[0] == low[1] and high[0] == high[1]
    assert low[2] == pytest.approx(2 * low[0]) and high[2] == pytest.approx(2 * high[0])
    assert low[0] < values.mean() < high[0]


def test_an_interval_has_the_width_of_the_normal_approximation():
    values = np.random.default_rng(3).normal(0, 1, 400)
    (low,), (high,) = interval(values[None])
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)


STEP = {
    "reward/total": 1.0,
    "reward/mask_dice": 0.5,
    "answers/dice": 0.5,
    "answers/iou": 0.5,
    "answers/nll": 0.2,
    "reward/std": 0.1,
    "learner/grad_norm": 0.3,
    "learner/engine_gap": 0.0,
    "seconds/rollout": 2.0,
}


def test_a_run_without_masks_has_no_curves_of_them():
    lines = [{"step": i, **STEP} for i in (1, 2)]
    assert ">dice<" in "".join(all_charts(lines)) and ">mask_dice<" in "".join(all_charts(lines))
    bare = [{name: value for name, value in line.items() if "dice" not in name} for line in lines]
    text = "".join(all_charts(bare))
    assert "dice<" not in text and "Sampled answers" in text


def test_metrics_that_some_steps_lack_are_left_out():
    old = {"step": 1, "reward/total": 1.0, "reward/spread": 0.1, "answers/surprise": 0.2, "seconds/rollout": 1.0}
    assert "nats/token" not in "".join(all_charts([old, {**old, "step": 2}]))
    text = "".join(all_charts([old, {**STEP, "step": 2}]))
    assert "Reward and its parts" in text and "mask_dice" not in text and "nats/token" not in text


def test_a_phase_that_a_step_lacks_took_no_time():
    lines = [{"seconds/learn": 1.0, "seconds/step": 1.5}, {"seconds/learn": 2.0, "seconds/checkpoint": 0.5}]
    assert phase_seconds(lines) == {"learn": [1.0, 2.0], "checkpoint": [0.0, 0.5]}
