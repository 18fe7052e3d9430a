"""Metrics as Ray's gauges. That a node exports them is seen in `test_train.py`."""

import pytest

from cluster.gauges import gauge_name


@pytest.mark.parametrize(
    ("metric", "name", "tags"),
    [
        ("step", "medreasoner_step", {}),
        ("reward/mask_dice", "medreasoner_reward_mask_dice", {}),
        ("reward/my-term", "medreasoner_reward_my_term", {}),
        ("evaluation/greedy_dice", "medreasoner_evaluation_greedy_dice", {}),
        ("seconds/learn", "medreasoner_seconds", {"phase": "learn"}),
        ("actors/segmenter", "medreasoner_actors", {"role": "segmenter"}),
        ("busy/rollout", "medreasoner_busy", {"role": "rollout"}),
        ("busy/rollout_awaited", "medreasoner_busy_awaited", {"role": "rollout"}),
    ],
)
def test_what_is_of_a_role_or_a_phase_has_it_as_a_tag(metric, name, tags):
    assert gauge_name(metric) == (name, tags)
