"""The `base` preset on answers worked out by hand: text, box and points against thresholds, one point each."""

import json

import pytest

from rewards.score import score_lines

TRUTH = '{"bbox_2d": [100, 100, 300, 300], "point_2d": [[150, 150], [250, 250]]}'
BOX, FIRST, SECOND = [100, 100, 300, 300], [150, 150], [250, 250]


def answer(bbox: object = BOX, points_1: object = FIRST, points_2: object = SECOND) -> str:
    return f"<answer>{json.dumps({'bbox': bbox, 'points_1': points_1, 'points_2': points_2})}</answer>"


def thought(bbox: object = BOX, points_1: object = FIRST, points_2: object = SECOND) -> str:
    return f"<think>It filters blood.</think>\n{answer(bbox, points_1, points_2)}"


CASES = {
    "perfect": (thought(), (1, 1, 1, 1, 1)),
    "the points swapped": (thought(points_1=SECOND, points_2=FIRST), (1, 1, 1, 1, 1)),
    "single quotes": (thought().replace('"', "'"), (1, 1, 1, 1, 1)),
    "an empty think block": (f"<think></think>{answer()}", (1, 1, 1, 1, 1)),
    "text after the blocks": (f"{thought()} Done.", (0, 1, 1, 1, 1)),
    "no think block": (answer(), (0, 1, 1, 1, 1)),
    "two answer blocks": (thought() + answer([0, 0, 1, 1]), (0, 1, 1, 1, 1)),
    "answer before thought": (f"{answer()}<think>It filters blood.</think>", (0, 1, 1, 1, 1)),
    # Shifted by 20 px, two edges are off by 20: their mean over four is 10, which is not below 10. IoU 36/44.
    "20 px to the right": (thought([120, 100, 320, 300]), (1, 1, 1, 0, 1)),
    "19 px to the right": (thought([119, 100, 319, 300]), (1, 1, 1, 1, 1)),
    # The left half: IoU is 1/2, which is not above 1/2; the second point is outside.
    "the left half": (thought([100, 100, 200, 300]), (1, 1, 0, 0, 0)),
    "a little more than half": (thought([100, 100, 201, 300]), (1, 1, 1, 0, 0)),
    # Both points in the left half, 0 and 100 px from the reference points.
    "the left half with its points": (thought([100, 100, 200, 300], points_2=[150, 250]), (1, 1, 0, 0, 1)),
    # Either order has both points 100 px away, and 100 is not below 100.
    "points at the other corners": (thought(points_1=[150, 250], points_2=[250, 150]), (1, 1, 1, 1, 0)),
    "points a pixel nearer": (thought(points_1=[150, 249], points_2=[250, 151]), (1, 1, 1, 1, 1)),
    "a point on the edge": (thought(points_1=[100, 150]), (1, 1, 1, 1, 1)),
    "a point outside the box": (thought(points_1=[99, 150]), (1, 1, 1, 1, 0)),
    "a key missing": ('<think>a</think><answer>{"bbox": [100, 100, 300, 300]}</answer>', (1, 0, 1, 1, 0)),
    "malformed points": (thought(points_1=[150]), (1, 0, 1, 1, 0)),
    "a coordinate that is no number": (thought([100, 100, float("nan"), 300]), (1, 0, 0, 0, 0)),
    "an inverted box": (thought([300, 100, 100, 300]), (1, 0, 0, 0, 0)),
    "no JSON": ("<think>a</think><answer>the left kidney</answer>", (1, 0, 0, 0, 0)),
    "nothing": ("", (0, 0, 0, 0, 0)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_point_each(name: str) -> None:
    completion, (thinking, segment, iou, bbox_l1, points_l1) = CASES[name]
    (scored,) = score_lines([json.dumps({"completion": completion, "ground_truth": TRUTH}).encode()], "base")
    assert scored == {
        "score": thinking + segment + iou + bbox_l1 + points_l1,
        "thinking": thinking,
        "segment": segment,
        "iou": iou,
        "bbox_l1": bbox_l1,
        "points_l1": points_l1,
    }
