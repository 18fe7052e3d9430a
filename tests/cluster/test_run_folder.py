"""The run folder: made, taken up again, and gone where nothing came of it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from cluster import lease
from cluster.config import load_config
from cluster.lease import LeaseLost, leased
from cluster.run_folder import RunFolder, kept_config
from tests.conftest import ROOT
from umrg.config import Config, MayChange
from umrg.mistake import Mistake
from umrg.prompts import ReasonerConfig


class Small(Config):
    lr: float = 0.1
    steps: MayChange[int] = 3


def test_a_mistake_before_anything_was_done_leaves_the_name_free(tmp_path):
    with (
        pytest.raises(ValueError, match="there is no expert"),
        RunFolder.begun(tmp_path / "run", Small(), resume=False) as run,
    ):
        (run.path / "data").mkdir()
        raise Mistake("there is no expert")
    with RunFolder.begun(tmp_path / "run", Small(lr=0.2), resume=False) as run:
        assert run.path.is_dir()


def test_what_was_done_stays_whatever_ends_it(tmp_path):
    with pytest.raises(ValueError, match="row 3"), RunFolder.begun(tmp_path / "run", Small(), resume=False) as run:
        run.samples.mkdir()
        raise Mistake("row 3")
    with pytest.raises(KeyboardInterrupt), RunFolder.begun(tmp_path / "other", Small(), resume=False) as run:
        raise KeyboardInterrupt
    assert (tmp_path / "run").is_dir() and (tmp_path / "other").is_dir()


def test_what_a_killed_writer_left_aside_goes(tmp_path):
    run = RunFolder.create(tmp_path / "run", Small())
    run.log({"step": 1})
    aside = run.checkpoints / ".step-000001.99.part"
    aside.mkdir(parents=True)
    (aside / "state.json").write_text("{")
    with RunFolder.begun(tmp_path / "run", Small(), resume=True):
        assert not aside.exists()
        aside.mkdir()
    assert not aside.exists() and run.checkpoints.is_dir()


def test_a_run_folder_of_an_earlier_version_resumes(tmp_path, demo_config):
    """With keys by their names of then, and one that is gone."""
    config = demo_config(f"runs={tmp_path}", "dynamic_sampling_retries=2")
    run = RunFolder.create(tmp_path / "demo", config)
    run.log({"step": 1})
    kept = yaml.safe_load((run.path / "config.yaml").read_text())
    kept["refill"] = kept.pop("dynamic_sampling_retries")
    kept["rollout"]["reset_caches"] = True
    del kept["evaluation"]["before"]
    (run.path / "config.yaml").write_text(yaml.safe_dump(kept))
    with pytest.raises(ValueError, match="was made with another dynamic_sampling_retries, seed;"):
        RunFolder.begin(run.path, demo_config(f"runs={tmp_path}", "seed=5"), resume=True)
    assert kept_config(type(config), run.path) == config
    RunFolder.begin(run.path, config, resume=True)
    assert "reset_caches" not in (run.path / "config.yaml").read_text()


@pytest.mark.parametrize(("older", "spread"), [("pack", False), ("spread", True)])
def test_where_actors_lay_had_another_key(tmp_path, demo_config, older, spread):
    config = demo_config(f"runs={tmp_path}", f"spread={spread}")
    run = RunFolder.create(tmp_path / "demo", config)
    kept = yaml.safe_load((run.path / "config.yaml").read_text())
    del kept["spread"]
    (run.path / "config.yaml").write_text(yaml.safe_dump({**kept, "placement": older}))
    assert kept_config(type(config), run.path) == config


def test_a_folder_that_was_there_is_never_removed(tmp_path):
    RunFolder.create(tmp_path / "run", Small()).log({"step": 1})
    with pytest.raises(ValueError, match="no rows"), RunFolder.begun(tmp_path / "run", Small(), resume=True):
        raise Mistake("no rows")
    assert (tmp_path / "run" / "config.yaml").is_file()


@pytest.mark.parametrize("content", [None, "", "- a"])
def test_a_folder_that_is_no_runs_is_not_taken_up(tmp_path, content):
    (tmp_path / "run").mkdir()
    if content is not None:
        (tmp_path / "run" / "config.yaml").write_text(content)
    with pytest.raises(ValueError, match="is not a run's folder"):
        RunFolder.begin(tmp_path / "run", Small(), resume=True)


def test_another_configuration_is_refused_by_its_keys(tmp_path):
    RunFolder.create(tmp_path / "run", Small()).log({"step": 1})
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


def summary(path):
    return json.loads((path / "summary.json").read_text())


def test_the_summary_says_how_the_run_stands(tmp_path):
    path = tmp_path / "run"
    with RunFolder.begun(path, Small(), resume=False) as run:
        assert summary(path) == {"status": "running"}
        run.log({"step": 1})
        run.tell(steps=1)
        assert summary(path) == {"status": "running", "steps": 1}
    assert summary(path) == {"status": "ended", "steps": 1}
    with pytest.raises(RuntimeError), RunFolder.begun(path, Small(), resume=True) as run:
        assert summary(path) == {"status": "running"}
        run.tell(steps=2)
        raise RuntimeError("rollout 0 died")
    assert summary(path) == {"status": "failed", "steps": 2, "error": "RuntimeError: rollout 0 died"}
    with pytest.raises(KeyboardInterrupt), RunFolder.begun(path, Small(), resume=True):
        raise KeyboardInterrupt
    assert summary(path) == {"status": "interrupted"}


def test_an_error_is_told_before_what_stands_around_it_is_ended(tmp_path):
    with pytest.raises(RuntimeError), RunFolder.begun(tmp_path / "run", Small(), resume=False) as run:
        try:
            with run.telling():
                raise RuntimeError
        finally:
            assert summary(run.path)["status"] == "failed"


def test_what_comes_after_the_end_does_not_change_it(tmp_path):
    with pytest.raises(KeyboardInterrupt), RunFolder.begun(tmp_path / "run", Small(), resume=False) as run:
        run.tell("ended", steps=3)
        raise KeyboardInterrupt
    assert summary(tmp_path / "run") == {"status": "ended", "steps": 3}


def test_a_mistake_in_going_on_leaves_what_the_summary_said(tmp_path):
    with RunFolder.begun(tmp_path / "run", Small(), resume=False) as run:
        run.log({"step": 1})
    with pytest.raises(ValueError, match="no such"), RunFolder.begun(tmp_path / "run", Small(), resume=True):
        raise Mistake("no such checkpoint")
    assert summary(tmp_path / "run")["status"] == "ended"
    with pytest.raises(ValueError, match="row 3"), RunFolder.begun(tmp_path / "run", Small(), resume=True) as run:
        run.log({"step": 2})
        raise Mistake("row 3")
    assert summary(tmp_path / "run") == {"status": "failed", "error": "Mistake: row 3"}


# The main thread waits in a call that heeds no signals, as there are in Ray; Ray's own handler of SIGTERM is there too.
STUBBORN = """
import hashlib, signal, sys
from pathlib import Path
from cluster.run_folder import RunFolder
from umrg.config import Config, MayChange

class Small(Config):
    lr: float = 0.1

with RunFolder.begun(Path(sys.argv[1]), Small(), resume=False):
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
    print("deaf", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000_000)
"""


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_an_interruption_is_told_at_once(tmp_path, sign):
    command = [sys.executable, "-c", STUBBORN, str(tmp_path / "run")]
    driver = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        # A shell that starts the tests in the background lets everything that they start ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert driver.stdout is not None and driver.stdout.readline() == "deaf\n"
        driver.send_signal(sign)
        deadline = time.monotonic() + 60
        while summary(tmp_path / "run")["status"] == "running":
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert summary(tmp_path / "run") == {"status": "interrupted"} and driver.poll() is None
    finally:
        driver.kill()
        driver.wait()


@pytest.mark.parametrize("end", [KeyboardInterrupt, TimeoutError, SystemExit])
def test_a_run_in_which_nothing_was_done_is_begun_anew(tmp_path, end):
    path = tmp_path / "run"
    with pytest.raises(end), RunFolder.begun(path, Small(), resume=False):
        (path / "data").mkdir()
        (path / "data" / "eval.parquet").touch()
        (path / "results.jsonl").touch()
        (path / "tensorboard").mkdir()
        (path / "tensorboard" / "events").touch()
        (path / ".metrics.json.9.part").touch()
        raise end
    for resume in (False, True):
        with pytest.raises(end), RunFolder.begun(path, Small(lr=0.2 + resume), resume=resume):
            assert sorted(entry.name for entry in path.iterdir()) == ["config.yaml", "summary.json"]
            raise end


@pytest.mark.parametrize(
    "name", ["notes.txt", "samples/step-000001.parquet", "checkpoints/latest", "model/config.json"]
)
def test_a_run_in_which_anything_was_done_is_not(tmp_path, name):
    path = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt), RunFolder.begun(path, Small(), resume=False):
        raise KeyboardInterrupt
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).touch()
    with pytest.raises(ValueError, match="exists"), RunFolder.begun(path, Small(), resume=False):
        pass
    assert (path / name).exists()


def contents(path):
    return {entry: entry.read_bytes() for entry in path.rglob("*") if entry.is_file()}


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_driver_touches_nothing(tmp_path, monkeypatch, resume):
    monkeypatch.setattr(lease, "PATIENCE", 0.0)
    path = tmp_path / "run"
    with RunFolder.begun(path, Small(), resume=False) as run:
        run.log({"step": 1})
        (path / "checkpoints" / ".step-000002.part").mkdir(parents=True)
        (path / "checkpoints" / ".step-000002.part" / "state.json").write_text("{")
        before = contents(path)
        said = f"held by process {os.getpid()} on"
        with pytest.raises(ValueError, match=said), RunFolder.begun(path, Small(steps=5), resume=resume):
            pass
        assert contents(path) == before
        run.log({"step": 2})
    assert summary(path)["status"] == "ended"


def test_a_run_whose_lease_was_taken_writes_no_more(tmp_path):
    path = tmp_path / "run"
    with pytest.raises(LeaseLost), RunFolder.begun(path, Small(), resume=False) as run:
        run.log({"step": 1})
        (tmp_path / ".run.lease").unlink()
        with leased(path):
            (path / ".metrics.jsonl.1.part").touch()
            before = contents(path)
            for write in (lambda: run.log({}), lambda: run.rewind(0, 0), lambda: run.write_json("a", {})):
                with pytest.raises(LeaseLost):
                    write()
            run.tell("failed")
            run.hold()
    assert contents(path).keys() - before.keys() == set()
    assert summary(path)["status"] == "running"


@pytest.mark.parametrize(
    "cache",
    ["session_1/runtime_resources/working_dir_files/_ray_pkg_0a1b", "elsewhere/working_dir_files/s3_bucket_code_zip"],
)
def test_rays_cache_of_packages_is_refused(tmp_path, monkeypatch, cache):
    (tmp_path / cache).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / cache)
    said = "would lie in Ray's cache of packages.*give runs=/a/folder/that/all/nodes/share"
    os.symlink(tmp_path / cache, tmp_path / "link")
    for runs in (Path("runs"), tmp_path / cache / "runs", tmp_path / "link" / "runs"):
        with pytest.raises(ValueError, match=said), RunFolder.begun(runs / "demo", Small(), resume=False):
            pass
    assert list((tmp_path / cache).iterdir()) == []
    os.symlink(tmp_path, "shared")
    with RunFolder.begun(Path("shared") / "runs" / "demo", Small(), resume=False) as run:
        assert run.path.resolve() == tmp_path / "runs" / "demo"


def test_keys_that_are_younger_than_a_run_had_their_defaults(tmp_path):
    run = RunFolder.create(tmp_path / "run", Small())
    run.log({"step": 1})
    (run.path / "config.yaml").write_text("{}")
    RunFolder.begin(run.path, Small(), resume=True)
    with pytest.raises(ValueError, match="made with another lr"):
        RunFolder.begin(run.path, Small(lr=0.5), resume=True)


TEMPLATE = """Où est-ce ? {query} 例 "x": {a: 1}

\t# kein Kommentar: - [1]
'zuletzt'"""


def test_a_run_goes_on_without_the_file_of_its_prompt(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.txt").write_text(TEMPLATE, encoding="utf-8")
    config = load_config(ReasonerConfig, None, ["model=m", "prompt=own.txt"])
    run = RunFolder.create(tmp_path / "run", config)
    run.log({"step": 1})
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
    kept = ReasonerConfig.model_validate({"model": "m", "prompt": str(tmp_path / "own.txt")})
    RunFolder.create(tmp_path / "run", kept).log({"step": 1})
    with pytest.raises(ValueError, match="was made with another prompt"):
        RunFolder.begin(tmp_path / "run", ReasonerConfig.model_validate(asked), resume=True)
