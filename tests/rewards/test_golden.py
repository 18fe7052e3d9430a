"""The published reward's own scores, part by part, on 300 completions."""

import json
from pathlib import Path

import pytest

from rewards.score import score_lines

GOLDEN = Path(__file__).parents[2].parent / "shared" / "golden" / "rewards.jsonl"


@pytest.mark.skipif(not GOLDEN.exists(), reason="the golden outputs are not here")
@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_every_part_equals_the_published_one(mode: str) -> None:
    lines = [line for line in GOLDEN.read_bytes().splitlines() if json.loads(line)["mode"] == mode]
    assert len(lines) == 150
    for line, scored in zip(lines, score_lines(lines, mode), strict=True):
        assert scored == pytest.approx(json.loads(line)["expected"], abs=1e-4), line
