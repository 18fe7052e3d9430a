"""Score completions in a file: `python -m rewards.score FILE.jsonl --preset base|soft|hard`.

Each line is a JSON object with `completion`, a text, and `ground_truth` as in a released row,
`{"bbox_2d": [x1, y1, x2, y2], "point_2d": [[x, y], [x, y]]}`, as JSON text or as an object; both are in the same
coordinate frame, and other fields are ignored. For each line one JSON object is printed: `score`, and the parts under
the names of the published code, 0 for parts that the preset does not have. Completions are scored as they are; if the
chat template opened the thoughts and the file lacks that text, `--prefilled '<think>'` restores it.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from rewards.case import Reference
from rewards.presets import find_preset
from rewards.scoring import Scorer
from umrg.dataset import parse_ground_truth
from umrg.frames import Size
from umrg.mistake import Mistake

_VALIDITIES = ("bbox_position_valid", "bbox_area_valid", "points_position_valid", "points_spread_valid")
_GEOMETRY = (
    *("format_think", "format_seg", "bbox_iou", "points_dice"),
    *("bbox_align", "bbox_scale", "points_align", "points_angle"),
    *_VALIDITIES,
)
_PUBLISHED: Mapping[str, Mapping[str, str]] = {
    "base": {
        "thinking": "format_strict",
        "segment": "format_json",
        "iou": "bbox_iou_above",
        "bbox_l1": "bbox_l1_below",
        "points_l1": "points_near",
    },
    "soft": {name: name for name in _GEOMETRY},
    "hard": {name: name for name in _GEOMETRY},
}
"""This project's term for each name under which the published code reports a part."""

_RELEASED = Size(840, 840)
"""The image size of the released dataset. Published presets do not scale thresholds, so any size would do."""


def score_lines(lines: Iterable[bytes], preset: str, *, prefilled: str = "") -> Iterator[dict[str, float]]:
    """The score and the published parts of each line that is not blank. prefilled: the beginning of every completion
    that the chat template wrote and the file lacks, such as "<think>".

    Raises ValueError for a line that cannot be read, naming it, and for a preset that needs masks.
    """
    scorer, names = _published_scorer(preset), _PUBLISHED[preset]
    for number, line in enumerate(lines, start=1):
        if line.strip():
            completion, reference = _read(line, f"line {number}")
            reward = scorer.score(scorer.read(prefilled + completion), reference)
            parts = {published: reward.parts.get(term, 0.0) for published, term in names.items()}
            yield {"score": reward.total, **parts}


def _published_scorer(preset: str) -> Scorer:
    weights = dict(find_preset(preset).weights)
    if preset not in _PUBLISHED:
        raise Mistake(f"preset {preset!r} looks at masks, which such a file does not hold; give base, soft or hard")
    # The validities damp other parts and are not in the sum; with weight 0 they are reported all the same.
    reported = {name: 0.0 for name in _VALIDITIES if name in _PUBLISHED[preset]}
    return Scorer(weights | reported, published=True)


def _read(line: bytes, where: str) -> tuple[str, Reference]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Mistake(f"{where} is not JSON ({error})") from error
    if not isinstance(row, dict) or not isinstance(row.get("completion"), str):
        raise Mistake(f"{where} must be an object with the text `completion` and a `ground_truth`")
    box, points = parse_ground_truth(row.get("ground_truth"), where)
    if box[0] > box[2] or box[1] > box[3]:
        raise Mistake(f"{where} has an inverted bbox_2d; it must be x1, y1, x2, y2 with x1 <= x2 and y1 <= y2")
    return row["completion"], Reference(box=box, points=points, size=_RELEASED, name=where)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m rewards.score", description="Score completions in a file.")
    parser.add_argument("file", type=Path, metavar="FILE.jsonl", help="a line each: completion and ground_truth")
    parser.add_argument("--preset", required=True, help="base, soft or hard")
    parser.add_argument(
        "--prefilled",
        default="",
        metavar="TEXT",
        help="what the chat template already wrote of every completion, for example '<think>'",
    )
    options = parser.parse_args(arguments)
    try:
        for scored in score_lines(_lines(options.file), options.preset, prefilled=options.prefilled):
            print(json.dumps(scored))
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")


def _lines(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().splitlines()
    except OSError as error:
        raise Mistake(f"{path} cannot be read ({error.strerror})") from error


if __name__ == "__main__":
    main(sys.argv[1:])
