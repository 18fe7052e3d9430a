import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from cluster.commands.data import data_app
from umrg.dataset import Dataset, write_rows

ROOT = Path(__file__).parents[3]
REAL = ROOT.parent / "shared" / "data" / "umrg_real_sample.parquet"


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(data_app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "phantoms.parquet"
    result = run("phantoms", path, "--count", "20", "--size", "112", "--modality", "ct", "--modality", "X-Ray")
    assert result.exit_code == 0, result.output
    assert "20 rows" in result.output
    return path


def test_phantoms_are_a_dataset(file: Path) -> None:
    dataset = Dataset.open(file)
    assert len(dataset) == 20
    assert {info.modality for info in dataset.infos} == {"CT", "X-ray"}
    assert dataset[0].size.width == 112


def test_phantoms_come_with_held_out_phrasings_and_coarse_annotation(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.parquet"
    run("phantoms", other, "--count", "20", "--size", "112", "--modality", "CT", "--modality", "X-ray",
        "--phrasings", "held_out", "--annotation", "coarse")  # fmt: skip
    exact, coarse = Dataset.open(file), Dataset.open(other)
    assert {info.phrasing for info in coarse.infos} == {"held_out"}
    assert exact[3].mask_bytes == coarse[3].mask_bytes
    assert exact[3].box != coarse[3].box


def test_stats_print_tables_and_write_figures_and_pictures(file: Path, tmp_path: Path) -> None:
    result = run("stats", file, "--out", tmp_path / "stats")
    assert result.exit_code == 0, result.output
    assert "20 rows; images of 112x112 px (20)" in result.output
    assert "By supercategory" in result.output and "X-ray" in result.output
    assert "…" not in result.output and "│" not in result.output
    figures = json.loads((tmp_path / "stats" / "stats.json").read_text())
    assert figures["rows"] == sum(group["rows"] for group in figures["category"].values()) == 20
    for name in ("contact_sheet.png", "positions.png"):
        with Image.open(tmp_path / "stats" / name) as picture:
            assert picture.width > 500


def test_stats_of_some_rows_only(file: Path) -> None:
    result = run("stats", file, "--modality", "xray")
    assert "X-ray" in result.output and " CT " not in result.output


@pytest.mark.skipif(not REAL.exists(), reason="the released rows are not here")
def test_stats_of_the_released_rows() -> None:
    result = run("stats", REAL)
    assert "42 rows; images of 840x840 px (42)" in result.output
    assert "pubic symphysis" in result.output and "MRI-T1-Gd" in result.output


def test_split_writes_both_sides_and_says_what_was_held_out(file: Path, tmp_path: Path) -> None:
    result = run("split", file, "--by", "modality", "--hold-out", "x-ray", "--out", tmp_path / "split")
    assert result.exit_code == 0, result.output
    assert "held out by modality: X-ray" in result.output
    assert {info.modality for info in Dataset.open(tmp_path / "split" / "train.parquet").infos} == {"CT"}
    assert json.loads((tmp_path / "split" / "split.json").read_text())["held_out"] == ["X-ray"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stats", "gone.parquet", "--out", "out"], "gone.parquet does not exist"),
        (["check", "gone.parquet", "--out", "out"], "gone.parquet does not exist"),
        (["check", "FILE", "--clean", "FILE"], "is one of the files to check; give the cleaned rows another name"),
        (["check", "FILE", "--out", "out", "--model", "."], "is not a model folder"),
        (["check", "FILE", "--out", "out", "--expert", "tinny"], "the nearest expert is 'tiny'"),
        (["split", "FILE", "--by", "category", "--hold-out", "livr", "--out", "out"], "did you mean 'liver'"),
        (["check", "EMPTY", "--out", "out"], "empty.parquet has no rows; give a file with some"),
        (["stats", "EMPTY", "--out", "out"], "empty.parquet has no rows"),
        (["split", "EMPTY", "--by", "category", "--out", "out"], "empty.parquet has no rows"),
        (["phantoms", "out", "--count", "3", "--modality", "sonar"], "sonar"),
    ],
)
def test_bad_input_is_one_line_exit_code_2_and_nothing_written(
    file: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    empty = file.with_name("empty.parquet")
    write_rows(empty, [])
    command = [sys.executable, "-m", "cluster.cli", "data", *arguments]
    done = subprocess.run(
        [str({"FILE": file, "EMPTY": empty}.get(word, word)) for word in command],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
