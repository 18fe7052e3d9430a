"""`medreasoner data check`, from the command line."""

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

import phantoms
from cluster.commands.data import data_app
from cluster.commands.data_check import check_files
from cluster.commands.data_model_checks import load_oracle, prompt_limits
from reasoner.prompter import load_prompter
from umrg.checks import POINT_OFF_MASK
from umrg.dataset import Dataset, open_files, write_rows
from umrg.images import encode_png

ROOT = Path(__file__).parents[3]
TINY_REASONER = ROOT / "models" / "tiny-reasoner"
REAL = ROOT.parent / "shared" / "data" / "umrg_real_sample.parquet"
Row = dict[str, Any]


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(data_app, ["check", *(str(argument) for argument in arguments)])


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def lines(out: Path) -> list[dict[str, str]]:
    with (out / "check.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def rows() -> list[Row]:
    # Nothing of a chest in an X-ray is in several parts.
    return list(phantoms.rows(40, seed=7, size=112, modalities=["X-ray"]))


def test_a_clean_file_is_clean(rows: list[Row], tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.parquet", rows)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "check.png").write_bytes(b"of an earlier check")
    result = run(tmp_path / "rows.parquet", "--out", tmp_path / "out", "--clean", tmp_path / "clean.parquet")
    assert result.exit_code == 0, result.output
    assert "40 rows: 0 cannot be used, 0 to look at, 40 without a finding" in result.output
    assert lines(tmp_path / "out") == [] and not (tmp_path / "out" / "check.png").exists()
    assert len(Dataset.open(tmp_path / "clean.parquet")) == 40


def test_faults_are_told_drawn_and_left_out_and_the_file_stays_as_it_was(rows: list[Row], tmp_path: Path) -> None:
    file, out, clean = (tmp_path / name for name in ("rows.parquet", "out", "clean.parquet"))
    rows[3]["images"] = [{"bytes": b"oops", "path": "oops.png"}]
    rows[5]["reward_model"]["ground_truth"] = json.dumps({"bbox_2d": [0, 0, 1e8, 9], "point_2d": [[1, 1], [2, 2]]})
    rows[8]["prompt"][0]["content"] = f"Where is the {rows[8]['extra_info']['category']}?"
    write_rows(file, rows)
    before = digest(file)
    result = run(file, "--out", out, "--clean", clean)
    assert result.exit_code == 1
    assert "40 rows: 2 cannot be used, 1 to look at, 37 without a finding" in result.output
    assert "38 rows; 2 left out: box_outside (1), unreadable_image (1)" in " ".join(result.output.split())
    found = {(line["row"], line["check"]): line for line in lines(out)}
    assert {("3", "unreadable_image"), ("5", "box_outside"), ("8", "names_category")} <= found.keys()
    line = found["8", "names_category"]
    assert (line["file"], line["id"], line["severity"]) == (str(file), rows[8]["extra_info"]["id"], "warning")
    with Image.open(out / "check.png") as sheet:
        assert sheet.width > 500
    assert digest(file) == before


def test_a_cleaned_file_reads_keeps_every_column_and_passes(rows: list[Row], tmp_path: Path) -> None:
    file, clean = tmp_path / "rows.parquet", tmp_path / "clean.parquet"
    rows[0]["masks"] = []
    rows[9]["extra_info"]["id"] = rows[8]["extra_info"]["id"]
    write_rows(file, rows)
    assert run(file, "--clean", clean).exit_code == 1
    assert run(clean).exit_code == 0
    dataset = Dataset.open(clean)
    missing = dict.fromkeys(("split", "index", "no_target"))
    assert pq.read_table(clean).to_pylist()[0] == {**rows[1], "extra_info": {**missing, **rows[1]["extra_info"]}}
    assert [info.id for info in dataset.infos] == [rows[i]["extra_info"]["id"] for i in range(40) if i not in (0, 9)]
    for sample in dataset:
        assert sample.image().shape == (112, 112, 3) and sample.mask().any()


def test_one_corrupt_row_among_ten_thousand_is_named_and_all_others_are_checked(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    write_rows(file, (tiny_row(i) for i in range(10_000)))
    result = run(file, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "10000 rows: 1 cannot be used, 0 to look at, 9999 without a finding" in result.output
    (line,) = lines(tmp_path / "out")
    assert (line["row"], line["file"], line["id"]) == ("4711", str(file), "tiny-4711")
    assert line["check"] == "unreadable_image" and "cut short" in line["message"]


def tiny_row(number: int) -> Row:
    """A bright square in an image of its own; the image of row 4711 is cut short."""
    pixels = np.full((16, 16, 3), 90, dtype=np.uint8)
    mask = np.zeros((16, 16), dtype=np.bool_)
    mask[4:12, 4:12] = True
    pixels[mask], pixels[0, 0] = 200, (number % 256, number // 256, 0)
    image = encode_png(pixels)
    return {
        "prompt": [{"role": "user", "content": "Which part is bright?"}],
        "images": [{"bytes": image[:-25] if number == 4711 else image, "path": f"{number}.png"}],
        "masks": [{"bytes": encode_png(mask), "path": None}],
        "reward_model": {"ground_truth": json.dumps({"bbox_2d": [4, 4, 11, 11], "point_2d": [[7, 7], [9, 9]]})},
        "extra_info": {"id": f"tiny-{number}", "supercategory": "shape", "category": "square"},
    }


def test_a_damaged_row_group_is_named_row_by_row(rows: list[Row], tmp_path: Path) -> None:
    file, clean = tmp_path / "rows.parquet", tmp_path / "clean.parquet"
    write_rows(file, rows, rows_per_group=10)
    (source,) = open_files([file])
    images = source.metadata.row_group(2).column(source.metadata.schema.names.index("bytes"))
    content = bytearray(file.read_bytes())
    content[images.data_page_offset : images.data_page_offset + 60] = bytes(60)
    file.write_bytes(content)
    result = run(file, "--out", tmp_path / "out", "--clean", clean)
    assert result.exit_code == 1
    assert [(line["row"], line["check"]) for line in lines(tmp_path / "out")] == [
        (str(number), "damaged_row") for number in range(20, 30)
    ]
    assert len(Dataset.open(clean)) == 30


def test_rows_of_several_files_are_checked_together(rows: list[Row], tmp_path: Path) -> None:
    write_rows(tmp_path / "train.parquet", rows[:20])
    write_rows(tmp_path / "held_out.parquet", [rows[0], *rows[20:]])
    result = run(tmp_path / "train.parquet", tmp_path / "held_out.parquet", "--out", tmp_path / "out")
    assert result.exit_code == 1
    repeated = [line for line in lines(tmp_path / "out") if line["check"] == "repeated_id"]
    assert [(line["row"], Path(line["file"]).name) for line in repeated] == [("0", "held_out.parquet")]
    assert "that of row 0 of " in repeated[0]["message"]


def test_a_report_keeps_the_worst_finding_of_a_row_and_counts_the_row_once(rows: list[Row], tmp_path: Path) -> None:
    corners = {"bbox_2d": [0, 0, 111, 111], "point_2d": [[0, 0], [0, 111]]}
    rows[4]["reward_model"]["ground_truth"] = json.dumps(corners)
    write_rows(tmp_path / "rows.parquet", rows)
    report = check_files(open_files([tmp_path / "rows.parquet"]))
    (example,) = report.worst[POINT_OFF_MASK]
    assert (example.row, report.counts[POINT_OFF_MASK]) == (4, 1)
    assert (report.rows, report.unusable, report.flagged) == (40, 0, 1)


def test_progress_is_told_row_by_row(rows: list[Row], tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.parquet", rows)
    told: list[int] = []
    check_files(open_files([tmp_path / "rows.parquet"]), progress=told.append)
    assert told == list(range(1, 41))


def test_without_a_terminal_progress_is_told_in_lines(
    rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "rows.parquet", rows)
    assert run(tmp_path / "rows.parquet").stderr == ""
    monkeypatch.setattr("cluster.display.LINE_EVERY_S", -1.0)
    told = run(tmp_path / "rows.parquet").stderr.splitlines()
    assert told[0] == "checking: 1 of 40 rows" and told[-1] == "checking: 40 of 40 rows"


def found_by(check: Any, row: Row, folder: Path) -> list[tuple[str, str]]:
    write_rows(folder / "one.parquet", [row])
    report = check_files(open_files([folder / "one.parquet"]), extra_checks=[check])
    return [(found.name, examples[0].finding.message) for found, examples in report.worst.items()]


def test_prompts_are_counted_as_the_model_will_see_them(rows: list[Row], tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.parquet", rows)
    prompter = load_prompter(TINY_REASONER)
    sample = Dataset.open(tmp_path / "rows.parquet")[0]
    tokens = len(prompter.encode(sample.query, prompter.encode_image(sample.image())).token_ids)
    assert prompter.prompt_tokens(sample.query, sample.size) == tokens
    assert found_by(prompt_limits(TINY_REASONER, tokens), rows[0], tmp_path) == []
    ((name, message),) = found_by(prompt_limits(TINY_REASONER, tokens - 1), rows[0], tmp_path)
    assert name == "over_limit"
    assert f"{tokens} tokens, 16 of them for the image, and rollout.max_prompt_tokens allows {tokens - 1}" in message
    assert (
        found_by(prompt_limits(TINY_REASONER, tokens - 12, max_pixels=3136), rows[0], tmp_path)[0][0] == "image_shrunk"
    )


def with_image(row: Row, width: int, height: int) -> Row:
    """The row with an image of this size that is all target."""
    truth = {"bbox_2d": [0, 0, width - 1, height - 1], "point_2d": [[width // 2, height // 2]] * 2}
    return {
        **row,
        "images": [{"bytes": encode_png(np.zeros((height, width, 3), dtype=np.uint8)), "path": "a.png"}],
        "masks": [{"bytes": encode_png(np.ones((height, width), dtype=np.bool_)), "path": "b.png"}],
        "reward_model": {"ground_truth": json.dumps(truth)},
    }


def test_images_that_the_model_cannot_take_as_they_are_are_found(rows: list[Row], tmp_path: Path) -> None:
    check = prompt_limits(TINY_REASONER, 2048)
    assert found_by(check, with_image(rows[0], 840, 840), tmp_path) == []
    ((name, message),) = found_by(check, with_image(rows[0], 2000, 1000), tmp_path)
    assert name == "image_shrunk" and "of 2000x1000 px becomes 1400x700 for the model, its target 1400x700" in message
    # Its box ends on the far edge, as some annotators write it.
    wide = with_image(rows[0], 2000, 1000)
    wide["reward_model"]["ground_truth"] = json.dumps({"bbox_2d": [0, 0, 2000, 1000], "point_2d": [[9, 9], [99, 99]]})
    ((name, message),) = found_by(check, wide, tmp_path)
    assert "its target 1400x700;" in message
    ((name, message),) = found_by(check, with_image(rows[0], 1020, 5), tmp_path)
    assert name == "over_limit" and "aspect ratio over 200" in message


def test_a_reference_that_leads_the_expert_astray_is_found(rows: list[Row], tmp_path: Path) -> None:
    oracle = load_oracle("tiny")
    lung = next(row for row in rows if row["extra_info"]["category"] == "left lung")
    assert found_by(oracle, lung, tmp_path) == []
    astray = {"bbox_2d": [0, 0, 9, 9], "point_2d": [[2, 2], [7, 7]]}
    names = dict(found_by(oracle, {**lung, "reward_model": {"ground_truth": json.dumps(astray)}}, tmp_path))
    assert names.keys() == {"loose_box", "point_off_mask", "low_ceiling"}
    assert "the expert tiny reaches Dice 0." in names["low_ceiling"]


def test_model_and_expert_from_the_command_line(rows: list[Row], tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    write_rows(file, rows[:8])
    given = (file, "--model", TINY_REASONER, "--expert", "tiny")
    assert run(*given).exit_code == 0
    result = run(*given, "--max-prompt-tokens", "20", "--out", tmp_path / "out")
    assert result.exit_code == 1 and "over_limit" in result.output
    assert (tmp_path / "out" / "check.png").exists()


@pytest.mark.skipif(not REAL.exists(), reason="the released rows are not here")
def test_the_released_rows_can_all_be_used(tmp_path: Path) -> None:
    result = run(REAL, "--out", tmp_path)
    assert result.exit_code == 0
    assert "42 rows: 0 cannot be used, 11 to look at, 31 without a finding" in result.output
    found = [(int(line["row"]), line["check"]) for line in lines(tmp_path)]
    # Vessels, pairs of organs and specks beside tumours; and lungs that are also marked as the infection.
    assert [row for row, check in found if check == "several_parts"] == [4, 5, 9, 13, 23, 24, 25, 29, 31, 33, 34]
    assert [row for row, check in found if check != "several_parts"] == [31]
