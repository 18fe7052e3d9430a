"""The metrics of one answer against its reference: their names, their titles and how they are computed.

A new metric needs a title in `METRICS` and, unless it takes masks of its own (`actors.segmenter.ablation_metrics`), a
function in `_OF_BOX_AND_POINTS` or `_OF_MASKS`. Records, tables and pages then show it. Higher is better for every
metric, and a malformed answer has 0, so a metric that measures an error is reported as one minus the error.
"""

from collections.abc import Callable, Mapping

from rewards.case import Drawn, Reference
from umrg.answers import Answer
from umrg.frames import Box, PointPair
from umrg.metrics import Overlap, box_iou, pdice, pdice_published

METRICS = {
    "iou": "IoU",
    "pdice": "pDice",
    "pdice_published": "pDice (published)",
    "dice_points": "Dice, points",
    "dice_box": "Dice, box",
    "dice": "Dice, both",
    "mask_iou": "mask IoU",
    "oracle_dice": "ceiling",
    "well_formed": "well-formed",
}
"""Titles by name, in the order of an evaluation's columns."""

TRAINING_METRICS = {"dice": "Dice", "iou": "box IoU", "pdice": "pDice", "well_formed": "well-formed"}
"""The few that a training run shows, with the titles they have there."""

_OF_BOX_AND_POINTS: Mapping[str, Callable[[Box, PointPair, Reference], float]] = {
    "iou": lambda box, points, reference: box_iou(box, reference.box),
    "pdice": lambda box, points, reference: pdice(points, reference.points),
    "pdice_published": lambda box, points, reference: pdice_published(points, reference.points),
}
_OF_MASKS: Mapping[str, Callable[[Overlap], float]] = {
    "dice": lambda overlap: overlap.dice,
    "mask_iou": lambda overlap: overlap.iou,
}


def answer_metrics(answer: Answer, drawn: Drawn | None, reference: Reference, *, think: bool) -> dict[str, float]:
    """Metrics of one answer and its mask, in original pixels like the reference; 0 where it is not well formed.

    Metrics of the mask are there only where the reference has one. Each metric lies in [0, 1] except
    `pdice_published`, which reaches 2.
    """
    if answer.box is None or answer.points is None or not answer.well_formed(think=think):
        names = ("well_formed", *_OF_BOX_AND_POINTS, *(_OF_MASKS if reference.mask is not None else ()))
        return dict.fromkeys(names, 0.0)
    metrics = {"well_formed": 1.0}
    metrics |= {name: measure(answer.box, answer.points, reference) for name, measure in _OF_BOX_AND_POINTS.items()}
    if reference.mask is not None:
        assert drawn is not None, "a well-formed answer has the expert's mask"
        metrics |= {name: measure(drawn.overlap) for name, measure in _OF_MASKS.items()}
    return metrics
