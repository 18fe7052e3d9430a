"""What a user sees while a job goes on."""

import io

import pytest
from rich.console import Console

from cluster.display import Display, progress

METRICS = {
    "reward/total": 2.5,
    "reward/mask_dice": 0.6,
    "reward/std": 0.4,
    "reward/zero_variance_groups": 0.0,
    "reward/resampled_groups": 0.0,
    "answers/dice": 0.61,
    "answers/iou": 0.41,
    "answers/pdice": 0.2,
    "answers/well_formed": 0.98,
    "seconds/rollout": 1.5,
    "seconds/learn": 3.25,
    "seconds/step": 5.0,
    "answers/tokens": 120.4,
    "learner/kl": 0.0125,
    "policy/lag": 0.0,
}


def shown(demo_config, *, terminal: bool, metrics=METRICS) -> str:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=120, no_color=True)
    with Display(demo_config(), console) as display:
        with display.waiting("starting actors"):
            pass
        display.evaluation("before", {"greedy": {"dice": 0.5, "iou": 0.4, "pdice": 0.1, "well_formed": 1.0, "n": 8}})
        display.step(3, metrics)
    return text.getvalue()


def test_without_a_terminal_there_is_a_plain_line_a_step(demo_config):
    lines = shown(demo_config, terminal=False).splitlines()
    assert lines[0] == "starting actors"
    assert lines[1].startswith("before greedy  dice 0.500  iou 0.400")
    assert "step 3/50  reward 2.500  dice 0.610  iou 0.410  well-formed 98%  tokens 120  kl 0.0125  |" in lines[2]
    assert "rollout 1.5  learn 3.2" in lines[2] and lines[2].endswith("left 0:03:55"), "47 steps of 5 s"


def test_on_a_terminal_there_is_a_live_table(demo_config):
    text = shown(demo_config, terminal=True)
    for part in ("demo", "left 0:03:55", "mask_dice", "0.600", "kl", "0.0125", "policy/lag", "held out", "before"):
        assert part in text
    assert not any(name in text for name in ("std", "zero_variance_groups", "resampled_groups"))


@pytest.mark.parametrize("terminal", [False, True])
def test_without_masks_their_metrics_are_left_out(demo_config, terminal):
    without = {name: value for name, value in METRICS.items() if name not in ("answers/dice", "reward/mask_dice")}
    text = shown(demo_config, terminal=terminal, metrics=without)
    step = text[text.rindex("seconds") if terminal else text.index("step 3/") :]
    step = step.partition("held out")[0]
    assert "dice" not in step.replace("pdice", "") and "iou" in step


ROLES = {
    "seconds/score": 0.25,
    "actors/rollout": 1.0,
    "actors/segmenter": 2.0,
    "actors/learner": 1.0,
    "busy/rollout": 0.3,
    "busy/rollout_awaited": 1.0,
    "busy/segmenter": 0.12,
    "busy/segmenter_awaited": 1.0,
    "busy/learner": 0.65,
}


def test_a_plain_line_says_how_busy_each_role_is(demo_config):
    line = shown(demo_config, terminal=False, metrics={**METRICS, **ROLES}).splitlines()[2]
    assert "  | busy: rollout 30%  segmenter 12%  learner 65%  | left" in line


def test_the_live_table_has_a_bar_of_how_long_each_role_was_busy_and_waited(demo_config):
    text = shown(demo_config, terminal=True, metrics={**METRICS, **ROLES})
    row = next(line for line in text[text.rindex("time by role") :].splitlines() if "rollout" in line)
    assert row.split() == ["rollout", "1", "█" * 6 + "░" * 14, "1.5", "s,", "30%", "3.5", "s", "30%"]


def test_advice_is_printed_after_three_steps_and_where_it_is_of_another_role(demo_config):
    text = io.StringIO()
    learner = {**METRICS, **ROLES}
    rollout = {**learner, "seconds/rollout": 30.0, "busy/rollout": 0.9}
    with Display(demo_config(), Console(file=text, width=300)) as display:
        for step, metrics in enumerate([learner] * 4 + [rollout] * 4):
            display.step(step, metrics)
        display.advice()
    said = [(i, line.partition(";")[0]) for i, line in enumerate(text.getvalue().splitlines()) if "advice" in line]
    assert said[0] == (3, "advice: everything else waited for the learner 65% of the time")
    assert len(said) == 3 and "rollout.actors=2" in text.getvalue().splitlines()[said[1][0]]
    assert said[2][0] == len(text.getvalue().splitlines()) - 1, "and in the end"


def test_the_improvement_is_printed_with_its_intervals(demo_config):
    text = io.StringIO()
    pair = {"before": 0.5, "after": 0.7, "gain": 0.2, "low": 0.1, "high": 0.3}
    Display(demo_config(), Console(file=text)).improvement({"greedy": {"dice": pair}})
    assert text.getvalue() == "gain greedy  dice +0.200 (+0.100 … +0.300)\n"


def test_progress_without_a_terminal_is_a_line_now_and_then(monkeypatch):
    text = io.StringIO()
    with progress("sft", 20, done=3, unit="steps", console=Console(file=text)) as show:
        show(4, "loss 0.5000")
        assert text.getvalue() == "", "the first line comes after some seconds"
        show(4, "validation_loss 0.6000", at_once=True)
        assert text.getvalue() == "sft: 4 of 20 steps  validation_loss 0.6000\n"
        monkeypatch.setattr("cluster.display.LINE_EVERY_S", -1.0)
        show(5, "loss 0.2500")
        show(6)
    assert text.getvalue().splitlines()[1:] == ["sft: 5 of 20 steps  loss 0.2500", "sft: 6 of 20 steps"]


def test_progress_on_a_terminal_is_a_bar():
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=120, no_color=True)
    with progress("evaluating", 20, done=3, console=console) as show:
        show(20, "almost there")
    for part in ("evaluating", "20/20", "almost there"):
        assert part in text.getvalue()
