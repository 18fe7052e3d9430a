"""Figures of an evaluation, and what may be said of a difference."""

import numpy as np
import pytest

from cluster.comparison import paired_interval
from cluster.report.charts import curves, running_mean, stacked


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
