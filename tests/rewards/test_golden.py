"""The published reward's own scores, part by part, on 300 completions."""

import json
from pathlib import Path

import pytest

from rewards.case import Reference
from rewards.presets import TERMS, find_preset
from rewards.scoring import Scorer
from umrg.answers import parse_answer
from umrg.frames import Size

GOLDEN = Path(__file__).parents[2].parent / "shared" / "golden" / "rewards.jsonl"
VALIDITIES = ("bbox_position_valid", "bbox_area_valid", "points_position_valid", "points_spread_valid")


@pytest.mark.skipif(not GOLDEN.exists(), reason="the golden outputs are not here")
@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_every_part_equals_the_published_one(mode: str) -> None:
    rows = [row for line in GOLDEN.open() if (row := json.loads(line))["mode"] == mode]
    assert len(rows) == 150
    # The validities are no parts of the sum; weight 0 reports them.
    scorer = Scorer({**find_preset(mode).weights, **dict.fromkeys(VALIDITIES, 0.0)}, scale_pixels=False)
    for row in rows:
        reward = scorer.score(parse_answer(row["completion"]), published_reference(row["ground_truth"]))
        expected = row["expected"]
        assert reward.total == pytest.approx(expected.pop("score"), abs=1e-4), row
        # The published code reports 0 for the parts that a preset leaves out.
        assert dict.fromkeys(expected, 0.0) | dict(reward.parts) == pytest.approx(expected, abs=1e-4), row


def test_all_published_parts_are_terms() -> None:
    assert set(find_preset("hard").weights) | set(VALIDITIES) == set(TERMS) - {"mask_dice"}


def published_reference(ground_truth: str) -> Reference:
    fields = json.loads(ground_truth)
    x1, y1, x2, y2 = fields["bbox_2d"]
    (ax, ay), (bx, by) = fields["point_2d"]
    return Reference(box=(x1, y1, x2, y2), points=((ax, ay), (bx, by)), size=Size(840, 840))
