"""The table of metrics, and the metrics of one answer."""

import numpy as np
import pytest

from rewards.answer_metrics import METRICS, TRAINING_METRICS, answer_metrics
from rewards.case import Drawn, Reference
from umrg.answers import parse_answer
from umrg.frames import Size

MASK = np.zeros((8, 8), dtype=np.bool_)
MASK[2:6, 2:6] = True
GOOD = parse_answer('<answer>{"bbox": [2, 2, 5, 5], "points_1": [3, 3], "points_2": [4, 4]}</answer>')
BAD = parse_answer("It is in the middle.")


def reference(mask=MASK):
    return Reference(box=(2, 2, 5, 5), points=((3, 3), (4, 4)), size=Size(width=8, height=8), mask=mask)


def test_every_metric_has_a_title():
    assert answer_metrics(GOOD, Drawn.of(MASK, reference()), reference(), think=False).keys() <= METRICS.keys()
    assert TRAINING_METRICS.keys() <= METRICS.keys()


def test_a_perfect_answer_has_every_metric_at_its_highest():
    found = answer_metrics(GOOD, Drawn.of(MASK, reference()), reference(), think=False)
    assert found == {
        "well_formed": 1, "iou": 1, "pdice": 1, "pdice_published": pytest.approx(2), "dice": 1, "mask_iou": 1
    }  # fmt: skip


def test_a_malformed_answer_has_the_same_metrics_and_all_are_0():
    for mask in (MASK, None):
        drawn = None if mask is None else Drawn.of(mask, reference(mask))
        good = answer_metrics(GOOD, drawn, reference(mask), think=False)
        assert answer_metrics(BAD, None, reference(mask), think=False) == dict.fromkeys(good, 0.0)


def test_without_a_reference_mask_there_are_no_metrics_of_masks():
    assert list(answer_metrics(GOOD, None, reference(None), think=False)) == [
        "well_formed", "iou", "pdice", "pdice_published"
    ]  # fmt: skip
