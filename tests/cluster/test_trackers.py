"""Where a run's metrics go besides metrics.jsonl."""

import json
import subprocess
import sys
import threading
import time
import venv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cluster.evaluation import SUMMARY_METRICS, Evaluation
from cluster.journal import Journal, evaluation_metrics
from cluster.run_folder import RunFolder
from cluster.tracker_process import About
from cluster.trackers import BEHIND, TrackerFailed, TrackerProcess, Trackers, refuse_missing
from tests.cluster.test_journal import group, report
from umrg.mistake import Mistake

NAMES = ("wandb", "swanlab", "mlflow")
STORES = Path(__file__).parents[1] / "tracker_stores.py"


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory):
    """That of an environment made as docs/watching.md says; and TensorBoard, to read what was written for it."""
    folder = tmp_path_factory.mktemp("trackers")
    venv.create(folder, with_pip=True)
    packages = ["wandb", "swanlab", "mlflow-skinny", "sqlalchemy", "alembic", "tensorboard"]
    pip = [folder / "bin/python", "-m", "pip", "install", "-qq", "--disable-pip-version-check", *packages]
    subprocess.run(pip, check=True, timeout=900)
    return folder / "bin" / "python"


def stored(interpreter, tracker, run):
    """What a tracker holds of a run: values by metric and step, and in how many runs of its own they are."""
    command = [interpreter, "-I", STORES, tracker, run.path / "trackers"]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=120).stdout)
    values = {(name, step): value for _, name, step, value in found}
    assert len(values) == len(found), "nothing twice"
    return values, {id for id, *_ in found}


def evaluated():
    (answer,) = group(1).answers
    return replace(group(1), answers=(replace(answer, metrics=dict.fromkeys(SUMMARY_METRICS, 2 / 3)),))


def steps(run, trackers, numbers, *, resumed_after=None):
    """Some steps of a journal; after the first there is an evaluation."""
    with Journal(run, trackers) as journal:
        if resumed_after is not None:
            lines = (run.path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
            journal.rewind(resumed_after, sum(map(len, lines[:resumed_after])))
        for number in numbers:
            journal.step(number, [group(number)], report(number / 7), canary_gap=1 / 3, resampled=0, roles={})
            if number == 1:
                journal.evaluation("step-000001", 1, Evaluation(greedy=[evaluated()], sampled=()))


def recorded(run):
    """The same of the run's own files."""
    lines = {(name, line["step"]): line[name] for line in run.metrics() for name in line if name != "step"}
    for each in run.read_json("evaluations.json").values():
        figures = evaluation_metrics({"greedy": each["greedy"]})
        lines |= {(name, each["step"]): value for name, value in figures.items()}
    return lines


@pytest.mark.slow
def test_every_tracker_holds_the_numbers_of_the_run(demo_config, tmp_path, interpreter):
    config = demo_config(
        f"runs={tmp_path}", "name=tracked", f"trackers=[{','.join(NAMES)}]", "tracking.offline=true",
        f"tracking.python={interpreter}",
    )  # fmt: skip
    run = RunFolder.create(tmp_path / "tracked", config)
    with Trackers(run, config, pytest.fail) as trackers:
        steps(run, trackers, [1, 2, 3])
    first = recorded(run)
    assert ("learner/engine_kl", 3) in first and ("evaluation/greedy_dice", 1) in first
    with Trackers(run, config, pytest.fail) as trackers:
        steps(run, trackers, [3, 4], resumed_after=2)
    now = recorded(run)
    assert now.keys() - first.keys() == {(name, 4) for name, step in now if step == 4}
    for tracker in NAMES:
        values, ids = stored(interpreter, tracker, run)
        assert values == {**now, **first}, f"{tracker} keeps what it was sent first of a step that is taken again"
        assert len(ids) == 1, f"{tracker} goes on with the same run"
    board, _ = stored(interpreter, "tensorboard", run)
    assert board == {key: float(np.float32(value)) for key, value in now.items()}, "and TensorBoard what came last"


def about(tmp_path):
    return About(
        name="demo", project="p", folder=str(tmp_path / "trackers"), offline=True, mlflow_uri=None, config={}, seconds=1
    )


def tracker(tmp_path, program):
    return TrackerProcess("wandb", [sys.executable, "-I", "-c", program], about(tmp_path))


def test_a_process_gets_everything_and_how_the_run_ended(tmp_path):
    process = tracker(tmp_path, "import sys; open('got', 'w').write(sys.stdin.read())")
    process.log({"step": 1, "reward/total": 0.5})
    process.end("ended")
    process.wait(time.monotonic() + 60)
    said, *lines = map(json.loads, (tmp_path / "trackers" / "got").read_text().splitlines())
    assert said["name"] == "demo" and lines == [{"step": 1, "reward/total": 0.5}, {"status": "ended"}]


def failure(process):
    """What is raised when it is sent more and more."""
    until = time.monotonic() + 60
    with pytest.raises(TrackerFailed) as failed:
        while time.monotonic() < until:
            process.log({"step": 1})
            time.sleep(0.01)
    return str(failed.value)


def test_a_tracker_that_fails_is_told_by_name_with_its_own_words(tmp_path):
    process = tracker(tmp_path, "import sys; sys.stdin.readline(); raise ValueError('no api key')")
    said = failure(process)
    assert said.startswith("tracker wandb gets no more metrics: ValueError: no api key (see ")
    with pytest.raises(TrackerFailed, match="no api key"):
        process.wait(time.monotonic() + 60)


HANGS = "import time; time.sleep(600)"


def test_a_tracker_that_hangs_is_waited_for_until_a_deadline(tmp_path):
    process = tracker(tmp_path, HANGS)
    process.log({"step": 1})
    process.end("ended")
    with pytest.raises(TrackerFailed, match="did not take its last records"):
        process.wait(time.monotonic() + 0.5)
    assert "ended without a word" in failure(process), "and then killed"


def test_the_end_does_not_wait_for_a_tracker_that_hangs_with_one_free_place(tmp_path):
    process = tracker(tmp_path, HANGS)
    process.log({"step": 1, "long": "x" * 2**20})
    while process._lines.qsize():
        time.sleep(0.01)  # until it is being written, which a pipe has no room for
    for step in range(BEHIND - 1):
        process.log({"step": step})
    ending = threading.Thread(target=process.end, args=["ended"], daemon=True)
    ending.start()
    ending.join(20)
    assert not ending.is_alive()
    with pytest.raises(TrackerFailed, match="did not take its last records"):
        process.wait(time.monotonic())


def test_a_tracker_that_hangs_in_a_long_run_is_given_up(tmp_path):
    process = tracker(tmp_path, HANGS)
    with pytest.raises(TrackerFailed, match=f"{BEHIND} records behind"):
        for step in range(2 * BEHIND):
            process.log({"step": step, "long": "x" * 1000})
    process.end("ended")
    with pytest.raises(TrackerFailed, match="ended without a word"):
        process.wait(time.monotonic() + 60)


INTERPRETER = """#!/bin/sh
# Lacks nothing; its wandb fails, and its mlflow hangs.
[ "$2" = -c ] && exit 0
[ "$3" = mlflow ] && exec sleep 600
echo "OSError: full"
exit 1
"""


def test_each_failure_is_told_once_and_the_run_goes_on(demo_config, tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text(INTERPRETER)
    python.chmod(0o700)
    config = demo_config(f"runs={tmp_path}", "name=failing", "trackers=[wandb,mlflow]", f"tracking.python={python}")
    monkeypatch.setattr("cluster.trackers.END_S", 0.5)
    run = RunFolder.create(tmp_path / "failing", config)
    said: list[str] = []
    with Trackers(run, config, said.append) as trackers:
        until, step = time.monotonic() + 60, 0
        while not said and time.monotonic() < until:
            step += 1
            trackers.log(step, {"reward/total": 0.5})
            time.sleep(0.01)
        trackers.log(step + 1, {"reward/total": 0.5})
    wandb, mlflow = said
    assert "tracker wandb gets no more metrics: OSError: full" in wandb and "tracker mlflow" in mlflow
    assert any((run.path / "tensorboard").iterdir())


def test_a_package_that_is_missing_is_named_at_the_start(demo_config, tmp_path):
    empty = tmp_path / "empty"
    venv.create(empty, with_pip=False)
    config = demo_config(f"runs={tmp_path}", "trackers=[mlflow,wandb]", f"tracking.python={empty}/bin/python")
    with pytest.raises(Mistake, match="pip install mlflow-skinny sqlalchemy alembic wandb"):
        Trackers(RunFolder.create(tmp_path / "demo", config), config, pytest.fail)
    with pytest.raises(Mistake, match="cannot be run"):
        refuse_missing(str(tmp_path / "nothing"), ["wandb"])
    refuse_missing(str(tmp_path / "nothing"), [])
