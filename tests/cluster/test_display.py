"""What one sees while a run goes on."""

import io

from rich.console import Console

from cluster.display import Display

METRICS = {
    "reward/total": 2.5,
    "reward/mask_dice": 0.6,
    "reward/std": 0.4,
    "reward/zero_variance_groups": 0.0,
    "answers/dice": 0.61,
    "answers/iou": 0.41,
    "answers/pdice": 0.2,
    "answers/well_formed": 0.98,
    "seconds/rollout": 1.5,
    "seconds/learn": 3.25,
}


def shown(demo_config, *, terminal: bool) -> str:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=120, no_color=True)
    with Display(demo_config(), console) as display:
        with display.waiting("starting actors"):
            pass
        display.evaluation("before", {"greedy": {"dice": 0.5, "iou": 0.4, "pdice": 0.1, "well_formed": 1.0, "n": 8}})
        display.step(3, METRICS)
    return text.getvalue()


def test_without_a_terminal_there_is_a_plain_line_a_step(demo_config):
    lines = shown(demo_config, terminal=False).splitlines()
    assert lines[0] == "starting actors"
    assert lines[1].startswith("before greedy  dice 0.500  iou 0.400")
    assert "reward 2.500  dice 0.610  iou 0.410  well-formed 98%" in lines[2]
    assert "rollout 1.5  learn 3.2" in lines[2]


def test_on_a_terminal_there_is_a_live_table(demo_config):
    text = shown(demo_config, terminal=True)
    for part in ("demo", "mask_dice", "0.600", "learn s", "held out", "before"):
        assert part in text
    assert "spread" not in text
