"""The run folder: made, taken up again, and gone where nothing came of it."""

import json

import pytest

from cluster.config import load_config
from cluster.run_folder import RunFolder
from umrg.config import Config
from umrg.prompts import ReasonerConfig


class Small(Config):
    lr: float = 0.1
    steps: int = 3


def test_a_mistake_before_anything_was_done_leaves_the_name_free(tmp_path):
    with (
        pytest.raises(ValueError, match="there is no expert"),
        RunFolder.begun(tmp_path / "run", Small(), resume=False) as run,
    ):
        (run.path / "data").mkdir()
        raise ValueError("there is no expert")
    with RunFolder.begun(tmp_path / "run", Small(lr=0.2), resume=False) as run:
        assert run.path.is_dir()


def test_what_was_done_stays_whatever_ends_it(tmp_path):
    with pytest.raises(ValueError, match="row 3"), RunFolder.begun(tmp_path / "run", Small(), resume=False) as run:
        run.samples.mkdir()
        raise ValueError("row 3")
    with pytest.raises(KeyboardInterrupt), RunFolder.begun(tmp_path / "other", Small(), resume=False) as run:
        raise KeyboardInterrupt
    assert (tmp_path / "run").is_dir() and (tmp_path / "other").is_dir()


def test_what_a_killed_writer_left_aside_goes(tmp_path):
    run = RunFolder.create(tmp_path / "run", Small())
    aside = run.checkpoints / ".step-000001.99.part"
    aside.mkdir(parents=True)
    (aside / "state.json").write_text("{")
    with RunFolder.begun(tmp_path / "run", Small(), resume=True):
        assert not aside.exists()
        aside.mkdir()
    assert not aside.exists() and run.checkpoints.is_dir()


def test_a_folder_that_was_there_is_never_removed(tmp_path):
    RunFolder.create(tmp_path / "run", Small())
    with pytest.raises(ValueError, match="no rows"), RunFolder.begun(tmp_path / "run", Small(), resume=True):
        raise ValueError("no rows")
    assert (tmp_path / "run" / "config.yaml").is_file()


@pytest.mark.parametrize("content", [None, "", "- a"])
def test_a_folder_that_is_no_runs_is_not_taken_up(tmp_path, content):
    (tmp_path / "run").mkdir()
    if content is not None:
        (tmp_path / "run" / "config.yaml").write_text(content)
    with pytest.raises(ValueError, match="is not a run's folder"):
        RunFolder.begin(tmp_path / "run", Small(), resume=True)


def test_another_configuration_is_refused_by_its_keys(tmp_path):
    RunFolder.create(tmp_path / "run", Small())
    RunFolder.begin(tmp_path / "run", Small(steps=9), resume=True)
    with pytest.raises(ValueError, match="was made with another lr"):
        RunFolder.begin(tmp_path / "run", Small(lr=0.2), resume=True)


def test_half_a_line_of_metrics_does_not_keep_a_run_from_going_on(tmp_path):
    run = RunFolder.create(tmp_path / "run", Small())
    for step in (1, 2):
        run.log({"step": step, "note": "line\u2028separator"})
    position = run.metrics_position()
    run.log({"step": 3})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "no')
    run.rewind(2, position)
    assert [json.loads(line)["step"] for line in (run.path / "metrics.jsonl").read_text().splitlines()] == [1, 2]


def test_samples_of_later_steps_go_and_others_stay(tmp_path):
    run = RunFolder.create(tmp_path / "run", Small())
    run.samples.mkdir()
    names = ("before-greedy", "step-000002", "step-000002-greedy", "step-000003", "step-000003-sampled")
    for name in names:
        (run.samples / f"{name}.parquet").touch()
    run.rewind(2, 0)
    assert sorted(path.stem for path in run.samples.iterdir()) == ["before-greedy", "step-000002", "step-000002-greedy"]


TEMPLATE = """Où est-ce ? {query} 例 "x": {a: 1}

\t# kein Kommentar: - [1]
'zuletzt'"""


def test_a_run_goes_on_without_the_file_of_its_prompt(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.txt").write_text(TEMPLATE, encoding="utf-8")
    config = load_config(ReasonerConfig, None, ["model=m", "prompt=own.txt"])
    run = RunFolder.create(tmp_path / "run", config)
    (tmp_path / "own.txt").rename(tmp_path / "moved.txt")
    assert "Où est-ce ?" in (run.path / "config.yaml").read_text(encoding="utf-8")
    again = load_config(ReasonerConfig, run.path / "config.yaml")
    assert again == config and again.prompt == TEMPLATE
    for given in (again, load_config(ReasonerConfig, None, ["model=m", "prompt=moved.txt"])):
        RunFolder.begin(run.path, given, resume=True)
    with pytest.raises(ValueError, match=r"there is no file 'own\.txt'"):
        load_config(ReasonerConfig, None, ["model=m", "prompt=own.txt"])


@pytest.mark.parametrize("prompt", ["full", "compact", None, "other"])
def test_a_run_does_not_go_on_with_another_prompt(tmp_path, prompt):
    (tmp_path / "own.txt").write_text(TEMPLATE, encoding="utf-8")
    (tmp_path / "other.txt").write_text(TEMPLATE + ".", encoding="utf-8")
    asked = {"model": "m", "prompt": str(tmp_path / "other.txt") if prompt == "other" else prompt}
    RunFolder.create(tmp_path / "run", ReasonerConfig(model="m", prompt=str(tmp_path / "own.txt")))
    with pytest.raises(ValueError, match="was made with another prompt"):
        RunFolder.begin(tmp_path / "run", ReasonerConfig(**asked), resume=True)
