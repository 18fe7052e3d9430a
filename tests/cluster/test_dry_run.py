"""`--dry-run`: what would be done is told, what would be refused is refused, and nothing is done."""

import shlex
from pathlib import Path

import pytest
import ray
from rich.console import Console

from cluster.commands.answering import serve
from cluster.config import EvaluateConfig, SftConfig, load_config
from cluster.dry_run import dry_run
from cluster.lease import leased
from cluster.run_folder import RunFolder
from tests.cluster.commands.test_help import examples
from tests.cluster.test_checkpoints import save
from tests.cluster.test_cli import outcome
from tests.conftest import ROOT, TINY_REASONER
from tests.run_folders import drawn_rows, evaluated, trained

GPUS = ("rollout.num_gpus=1", "rollout.actors=3", "learner.num_gpus=1", "learner.ranks=2", "segmenter.num_gpus=0.25")


@pytest.fixture
def data(tmp_path):
    drawn_rows(tmp_path / "rows.parquet", 6)
    return tmp_path / "rows.parquet"


@pytest.fixture
def training(data, tmp_path, demo_config):
    def configured(*overrides):
        files = (f"data.train={data}", f"data.eval={data}", f"runs={tmp_path / 'runs'}")
        return demo_config(*files, "name=trial", "steps=9", "evaluation.limit=4", *overrides)

    return configured


def evaluation(data, *overrides):
    options = {"model": TINY_REASONER, "data.eval": [data], "expert": "tiny", "name": "trial"}
    return load_config(EvaluateConfig, None, [f"runs={data.parent / 'runs'}", *overrides], options)


def told(config, capsys, **how) -> str:
    """What is printed; checks that nothing is written."""
    before, connected = sorted(config.runs.parent.rglob("*")), ray.is_initialized()
    dry_run(config, Console(width=200), **how)
    assert sorted(config.runs.parent.rglob("*")) == before and ray.is_initialized() is connected
    text: str = capsys.readouterr().out
    return text


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    """Whatever runs on this machine."""
    monkeypatch.setenv("RAY_ADDRESS", "local")


def test_a_training_run_is_told_and_nothing_is_written(training, data, capsys):
    text = told(training(), capsys)
    assert "name: trial" in text and "steps: 9" in text
    assert "trial, made anew; from the first step" in text
    assert "data       train: 6 rows of " in text and "           held out: 4 rows of " in text and str(data) in text
    assert "on a cluster that is started on this machine" in text and "packed: " in text
    assert "GiB" not in text, "no role has a GPU"


def test_gpus_are_placed_and_estimated_for_a_cluster_that_is_not_asked(training, capsys, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
    text = told(training(*GPUS, "rollout.node_labels={zone: a}"), capsys)
    assert "on a running cluster, which was not asked" in text and "zone=a" in text
    assert "before it begins, packed: learner 0 + learner 1; rollout 0" in text
    assert "as soon as there is room: rollout 1, rollout 2, segmenter 0" in text
    assert "estimated GiB of each actor" in text and "fits, as far as can be estimated" in text


def test_a_cluster_elsewhere_has_folders_of_its_own(training, capsys):
    config = training(*GPUS).model_copy(update={"model": Path("/nowhere/model")})
    text = told(config, capsys, elsewhere=True)
    assert "run folder" not in text and "rows" not in text.split("actors  ")[1] and "learner 0 + learner 1" in text


def test_a_run_goes_on_where_it_stopped(training, tmp_path, capsys):
    run = trained(training(), [], steps=2)
    save(run.checkpoints, 2)
    assert "trial, taken over; goes on after step 2" in told(training("resume=auto"), capsys)
    with pytest.raises(ValueError, match="exists; give another name"):
        dry_run(training(), Console())
    with pytest.raises(ValueError, match="was made with another batch"):
        dry_run(training("resume=auto", "batch=3"), Console())
    with leased(run.path), pytest.raises(ValueError, match="the run is held by process"):
        dry_run(training("resume=auto"), Console())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model=docs", "docs is not a model folder"),
        ("expert=tinny", "the nearest expert is 'tiny'"),
        ("data.train=missing.parquet", "missing.parquet"),
        ("rollout.max_prompt_tokens=20", "has .* tokens"),
        ("segmenter.actors=1000", "there is no room for"),
        ("trackers=[wandb] tracking.python=nowhere", "nowhere cannot be run"),
    ],
)
def test_what_the_run_would_refuse_is_refused(training, override, message):
    with pytest.raises(ValueError, match=message):
        dry_run(training(*override.split()), Console())


def test_a_cluster_that_runs_here_is_joined_and_not_asked(training, capsys, monkeypatch):
    def there(_address):
        return "192.0.2.1:6379"

    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setattr("ray._private.services.canonicalize_bootstrap_address", there)
    assert "on a running cluster, which was not asked" in told(training("segmenter.actors=1000"), capsys)


def test_rows_that_are_others_than_the_checkpoints_are_refused(training):
    run = trained(training(), [], steps=2)
    save(run.checkpoints, 2, rows=7)
    with pytest.raises(ValueError, match="the run has 6 rows and had 7 when step-000002 was written"):
        dry_run(training("resume=auto"), Console())


def test_the_folder_is_looked_at_though_files_are_elsewhere(training, capsys):
    config = training("data.train=s3://bucket/rows.parquet")
    text = told(config, capsys)
    assert "trial, made anew" in text and "data.train: s3://bucket/rows.parquet, which the run copies first" in text
    RunFolder.create(config.runs / "trial", config).log({"step": 1})
    with pytest.raises(ValueError, match="exists; give another name"):
        dry_run(config, Console())


def test_an_evaluation_is_told_and_a_finished_one_refused(data, capsys):
    assert "rows: 6 rows of" in told(evaluation(data), capsys)
    run = evaluated(evaluation(data), drawn_rows(data, 2))
    assert "trial, continued" in told(evaluation(data), capsys)
    run.write_json("metrics.json", {"overall": {}})
    with pytest.raises(ValueError, match="is finished; give another name"):
        dry_run(evaluation(data), Console())


def test_a_supervised_run_is_told(data, tmp_path, capsys):
    overrides = ["validation=0.5", f"data.train={data}", f"model={TINY_REASONER}", f"runs={tmp_path / 'runs'}"]
    text = told(load_config(SftConfig, ROOT / "configs" / "tiny_reasoner_sft.yaml", overrides), capsys)
    assert "3 images, and 3 held out" in text and "learner" in text and "rollout" not in text


def test_the_service_is_told(capsys):
    serve(TINY_REASONER, gpu=True, dry_run=True)
    text = capsys.readouterr().out
    assert "0.8" in text and "segmenter" in text and "http://127.0.0.1:8000/v1/ground" in text
    with pytest.raises(ValueError, match="nearest expert"):
        serve(TINY_REASONER, expert="tinny", dry_run=True)


@pytest.mark.parametrize("example", [*examples("sft"), *examples("submit")])
def test_examples_beneath_help_work_as_typed(example, monkeypatch, tmp_path):
    """In a checkout, beside rows of one's own."""
    drawn_rows(tmp_path / "rows.parquet", 6)
    for name in ("configs", "models"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    assert outcome(*shlex.split(example)[1:], "--dry-run") == 0


def test_the_command_line_has_the_exit_codes_of_the_run(monkeypatch, tmp_path, capfd):
    monkeypatch.chdir(ROOT)
    where = ("train", "configs/demo.yaml", "--dry-run")
    assert outcome(*where, f"runs={tmp_path}") == 0
    assert outcome(*where, f"runs={tmp_path}", "expert=tinny") == 2
    (tmp_path / "file").touch()
    assert outcome(*where, f"runs={tmp_path / 'file'}") == 2
    assert "Not a directory" in capfd.readouterr().err and [*tmp_path.iterdir()] == [tmp_path / "file"]


def test_a_blank_folder_is_made_anew(training, capsys):
    RunFolder.create(training().runs / "trial", training())
    assert "trial, made anew" in told(training(), capsys)
