"""`python -m rewards.score`: lines in, scores out; a bad line is named."""

import json
import subprocess
import sys

import pytest

from rewards.score import score_lines
from tests.conftest import ROOT

TRUTH = '{"bbox_2d": [100, 100, 300, 300], "point_2d": [[150, 150], [250, 250]]}'
PERFECT = (
    '<think>It filters blood.</think><answer>{"bbox": [100, 100, 300, 300], "points_1": [150, 150], '
    '"points_2": [250, 250]}</answer>'
)


def line(completion: object = PERFECT, ground_truth: object = TRUTH) -> bytes:
    return json.dumps({"completion": completion, "ground_truth": ground_truth, "mode": "soft"}).encode()


def score(*arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "rewards.score", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_line_of_json_for_each_line(tmp_path) -> None:
    (tmp_path / "lines.jsonl").write_bytes(line() + b"\n" + line("nothing") + b"\n\n")
    done = score(tmp_path / "lines.jsonl", "--preset", "hard")
    first, second = map(json.loads, done.stdout.splitlines())
    assert (done.returncode, done.stderr, first["score"], second["score"]) == (0, "", 8, 0)
    assert set(first.values()) == {8, 1}


def test_soft_reports_0_for_the_parts_of_hard_and_its_validities() -> None:
    (scored,) = score_lines([line()], "soft")
    left_out = {"bbox_align", "bbox_scale", "points_align", "points_angle"}
    assert {name for name, value in scored.items() if value == 0} == left_out
    assert scored["score"] == 4 and scored["bbox_area_valid"] == 1


@pytest.mark.parametrize("opening", ["<think>", "<think>\n"])
def test_what_the_template_wrote_is_put_back(tmp_path, opening: str) -> None:
    (tmp_path / "lines.jsonl").write_bytes(line(PERFECT.removeprefix("<think>")))
    for arguments, expected in (((), 7), (("--prefilled", opening), 8)):
        done = score(tmp_path / "lines.jsonl", "--preset", "hard", *arguments)
        assert json.loads(done.stdout)["score"] == expected, done.stderr


def test_a_draft_within_the_thoughts_counts_as_published() -> None:
    draft = PERFECT.replace("It filters", f"{PERFECT.partition('</think>')[2].replace('100', '0')} It filters")
    (scored,) = score_lines([line(draft)], "hard")
    assert scored["format_think"] == 1 and scored["bbox_align"] < 0.9


@pytest.mark.parametrize(
    "truth",
    [
        json.loads(TRUTH),
        {**json.loads(TRUTH), "label": "kidney"},
        {"bbox_2d": [100.0, 100.0, 300.0, 300.0], "point_2d": [[150, 150.0], [250, 250]]},
    ],
)
def test_a_reference_may_be_the_object_itself(truth: object) -> None:
    (scored,) = score_lines([line(ground_truth=truth)], "hard")
    assert scored["score"] == 8


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (b"{", "line 2 is not JSON"),
        (b"\xff", "line 2 is not JSON"),
        (b"[" * 100_000, "line 2 is not JSON"),
        (b"[]", "line 2 must be an object with the text `completion`"),
        (b'{"ground_truth": "{}"}', "line 2 must be an object with the text `completion`"),
        (line(completion=3), "line 2 must be an object with the text `completion`"),
        (line(ground_truth="{}"), "line 2 has a ground_truth without a usable bbox_2d"),
        (line(ground_truth={"bbox_2d": [1, 2, 3, 4]}), "line 2 has a ground_truth without a usable bbox_2d"),
        (line(ground_truth=None), "line 2 has no ground_truth"),
        (line(ground_truth="no"), "line 2 has a ground_truth that is not JSON"),
        (line(ground_truth=TRUTH.replace("300, 300", "300, 30")), "line 2 has an inverted bbox_2d"),
    ],
)
def test_a_bad_line_is_named(bad: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        list(score_lines([line(), bad], "soft"))


@pytest.mark.parametrize(
    ("content", "preset", "said"),
    [
        (b"{", "soft", "error: line 1 is not JSON"),
        (line(), "sofd", "error: there is no reward preset 'sofd'; did you mean 'soft'"),
        (line(), "mask", "error: preset 'mask' looks at masks"),
        (None, "soft", "cannot be read (No such file or directory)"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, content: bytes | None, preset: str, said: str) -> None:
    if content is not None:
        (tmp_path / "lines.jsonl").write_bytes(content)
    done = score(tmp_path / "lines.jsonl", "--preset", preset)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert said in done.stderr


def test_neither_torch_nor_ray_is_imported() -> None:
    code = "import sys, rewards.score, rewards.config; sys.exit(any(m in sys.modules for m in ('torch', 'ray')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
