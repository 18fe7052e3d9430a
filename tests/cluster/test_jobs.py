"""The training job as its users start and end it: as a command, as a Ray job, by Ctrl-C, by a crash."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from cluster.records import read_records
from tests.cluster.test_nodes import LIGHT
from tests.conftest import ROOT
from tests.runs import SMALL, Run, told

REAL_IMAGES = ROOT.parent / "shared" / "data" / "umrg_real_sample.parquet"
pytestmark = pytest.mark.cluster


# First: a killed cluster's agent may hold on to the port that jobs are submitted to.
@pytest.mark.slow
@pytest.mark.chaos
def test_the_job_is_submitted_from_a_clean_checkout(ray_cluster, tmp_path):
    """With a folder for runs; without one it would lie where Ray unpacked the checkout."""
    from ray.job_submission import JobStatus, JobSubmissionClient

    checkout = tmp_path / "checkout"
    checkout.mkdir()
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x"], cwd=checkout, input=archive, check=True)
    client = JobSubmissionClient(f"http://{ray_cluster}")
    deadline = time.monotonic() + 500

    def ended(*overrides: str) -> tuple[JobStatus, str]:
        words = " ".join(f"'{override}'" for override in (*SMALL, "name=job", "steps=1", *overrides))
        while True:
            try:
                job = client.submit_job(
                    entrypoint=f"{sys.executable} -m cluster.train configs/demo.yaml {words}",
                    runtime_env={"working_dir": str(checkout)},
                )
                break
            except RuntimeError as error:  # the cluster's agent starts after the cluster
                assert "No available agent" in str(error) and time.monotonic() < deadline
                time.sleep(2)
        while not (status := client.get_job_status(job)).is_terminal():
            assert time.monotonic() < deadline, client.get_job_logs(job)
            time.sleep(1)
        return status, client.get_job_logs(job)

    status, log = ended()
    assert status == JobStatus.FAILED and "Traceback" not in log
    assert "error: the run folder runs/job would lie in Ray's cache of packages" in log
    assert "give runs=/a/folder/that/all/nodes/share" in log
    status, log = ended(f"runs={tmp_path}")
    assert status == JobStatus.SUCCEEDED, log
    assert json.loads((tmp_path / "job" / "summary.json").read_text())["status"] == "ended"


def line(text: str, seconds: float = 1.0) -> Callable[[Run], None]:
    """So long after a line of output."""

    def wait(run: Run) -> None:
        run.await_line(text)
        time.sleep(seconds)

    return wait


def file(pattern: str) -> Callable[[Run], None]:
    """As soon as there is such a file in the run folder."""

    def wait(run: Run) -> None:
        deadline = time.monotonic() + 600
        while not any(run.folder.glob(pattern)):
            assert run.process.poll() is None and time.monotonic() < deadline, run.output.read_text()
            time.sleep(0.01)

    return wait


AT_ONCE = "evaluation.before=false"
# Many short passes through the model, so that of a step nearly all is learning.
LEARNING = ("batch=16", "rollout.n=16", "learner.micro_batch_tokens=640")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "overrides", "sign"),
    [
        pytest.param(line("reading data"), ("data.train.phantoms=4000",), signal.SIGTERM, id="data"),
        pytest.param(line("starting actors", 0.3), (), signal.SIGTERM, id="cluster"),
        pytest.param(line("starting actors", 12), (), signal.SIGTERM, id="start", marks=pytest.mark.chaos),
        pytest.param(line("evaluating before"), (), signal.SIGTERM, id="evaluate", marks=pytest.mark.chaos),
        pytest.param(line("step 1/"), (AT_ONCE,), signal.SIGINT, id="sample"),
        pytest.param(line("step 1/", 3.0), (AT_ONCE, *LEARNING), signal.SIGTERM, id="learn", marks=pytest.mark.chaos),
        pytest.param(
            file("checkpoints/.step-*"),
            (AT_ONCE, "checkpoint_every=1"),
            signal.SIGTERM,
            id="checkpoint",
            marks=pytest.mark.chaos,
        ),
        pytest.param(file("model/*"), (AT_ONCE, "steps=1"), signal.SIGTERM, id="save", marks=pytest.mark.chaos),
    ],
)
def test_whoever_ends_a_run_leaves_no_process_and_a_readable_folder(tmp_path, moment, overrides, sign):
    """The summary tells it at once: a job that Ray stops is killed three seconds after SIGTERM."""
    run = Run(tmp_path, *(overrides if "steps=1" in overrides else ("steps=200", *overrides)))
    moment(run)
    assert run.summary()["status"] == "running"
    # A terminal sends Ctrl-C to all; who ends a job or a service sends SIGTERM to the driver.
    os.killpg(run.process.pid, sign) if sign == signal.SIGINT else run.process.send_signal(sign)
    deadline = time.monotonic() + 60
    alive = True
    while run.summary()["status"] == "running":
        assert alive, "the summary is told before anything is ended, which Ray would not wait for"
        assert time.monotonic() < deadline
        time.sleep(0.02)
        alive = run.process.poll() is None
    assert run.summary()["status"] == "interrupted"
    assert run.process.wait(timeout=90) == 130, run.output.read_text()
    run.assert_nothing_left()
    assert run.summary()["status"] == "interrupted"
    assert "Traceback" not in run.output.read_text()
    assert yaml.safe_load((run.folder / "config.yaml").read_text())["name"] == "trial"
    if (run.folder / "metrics.jsonl").exists():
        for text in (run.folder / "metrics.jsonl").read_text().splitlines():
            json.loads(text)
    assert not list(run.folder.glob("**/.*.part"))


def assert_a_second_driver_is_refused(run: Run, folder: Path, *settings: str) -> None:
    """The first is stopped meanwhile, so that nothing but the second could change the run's folder. It lives all the
    same."""
    run.process.send_signal(signal.SIGSTOP)
    await_rest(run.folder)
    before = contents(run.folder)
    second = Run(folder, *settings, "resume=auto", output="second")
    assert second.process.wait(timeout=300) == 2
    said = second.output.read_text()
    assert f"error: the run is held by process {run.process.pid} on " in said and "Traceback" not in said
    assert contents(run.folder) == before


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def await_rest(folder: Path) -> None:
    """Until nobody writes: learners finish a checkpoint that was begun without their driver."""
    deadline = time.monotonic() + 60
    before = None
    while before != (before := contents(folder)):
        assert time.monotonic() < deadline
        time.sleep(2)


# Each step takes twelve minutes, as the run's clock has it.
LONG_STEPS = """
import sys, time
from cluster import train
from cluster.cli import run_command
from cluster.timesheet import Clock

passed = [0.0]
Clock.__init__.__defaults__ = (lambda: time.monotonic() + passed[0],)
take_step = train.Training.take_step

def take_long_step(self):
    take_step(self)
    passed[0] += 12 * 60

train.Training.take_step = take_long_step
run_command(lambda: train.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.chaos
def test_with_default_settings_a_killed_run_of_long_steps_goes_on_from_the_step_before(tmp_path):
    run = Run(tmp_path, "steps=5", program=("-c", LONG_STEPS))
    run.await_line("step 2/")
    file("checkpoints/step-000002")(run)
    run.process.kill()
    run.process.wait()
    run.assert_nothing_left()
    assert run.summary()["status"] == "running"
    again = Run(tmp_path, "steps=3", "resume=auto", program=("-c", LONG_STEPS))
    assert again.process.wait(timeout=600) == 0, again.output.read_text()
    assert "resumed after step 2" in again.output.read_text()
    assert (again.summary()["status"], again.summary()["steps"]) == ("ended", 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "learner",
    [
        pytest.param(("learner.zero_stage=0",), id="zero-0", marks=pytest.mark.chaos),
        pytest.param(("learner.zero_stage=2", "learner.ranks=2"), id="zero-2-of-two"),
    ],
)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, learner):
    """Parameters, optimizer, metrics and sampled tokens are those of the run that was not killed, bit for bit. Until it
    is dead no other takes it up, and then it leaves no process."""
    settings = ("steps=4", "checkpoint_every=2", "evaluation.every=1", "learner.num_cpus=0.3", *learner)
    whole = Run(tmp_path / "whole", *settings)
    assert whole.process.wait(timeout=600) == 0, whole.output.read_text()
    killed = Run(tmp_path / "killed", *settings)
    file("checkpoints/latest")(killed)
    killed.await_line("step 3/")
    assert_a_second_driver_is_refused(killed, tmp_path / "killed", *settings)
    killed.process.kill()
    killed.process.wait()
    killed.assert_nothing_left()
    again = Run(tmp_path / "killed", *settings, "resume=auto")
    assert again.process.wait(timeout=600) == 0, again.output.read_text()
    assert "step 2/" not in again.output.read_text() and "step 3/" in again.output.read_text()
    assert learnt(again.folder) == learnt(whole.folder) and len(learnt(whole.folder)) > 5
    assert told(again.folder) == told(whole.folder) and len(told(whole.folder)) == 4
    for path in sorted((whole.folder / "samples").iterdir()):
        assert read_records(again.folder / "samples" / path.name) == read_records(path), path.name
    assert again.summary()["after"] == whole.summary()["after"]


def learnt(folder):
    """Digests of the last checkpoint's files, but of what the driver adds, which holds paths and timings' digits."""
    files = json.loads((folder / "checkpoints" / "step-000004" / "manifest.json").read_text())["files"]
    return {name: each["sha256"] for name, each in files.items() if name not in ("state.json", "config.yaml")}


@pytest.mark.slow
def test_a_learner_that_may_not_restart_ends_the_run_by_its_name(tmp_path):
    program = LIGHT + "run_command(lambda: train.main(sys.argv[1:]))"
    run = Run(tmp_path, "steps=200", "restarts=0", AT_ONCE, program=("-c", program))
    run.await_line("step 1/")
    (rank,) = [process for process in run.processes() if "ray::LearnerRank" in " ".join(process.cmdline())]
    rank.kill()
    assert run.process.wait(timeout=120) == 1
    assert "LearnerDied: learner 0 died while" in run.output.read_text()
    run.assert_nothing_left()
    assert run.summary()["status"] == "failed"
    assert str(run.summary()["error"]).startswith("LearnerDied: learner 0 died")


@pytest.mark.slow
@pytest.mark.skipif(not REAL_IMAGES.exists(), reason="the real images are not part of the project")
def test_real_images_with_the_full_prompt(tmp_path):
    run = Run(
        tmp_path,
        f"data.train={REAL_IMAGES}",
        f"data.eval={REAL_IMAGES}",
        *("prompt=full", "think=true", "steps=2", "learner.lr=1e-6", "evaluation.limit=6"),
        *("rollout.max_prompt_tokens=4096", "rollout.max_tokens=96", "rollout.cpu_cache_gib=1"),
    )
    assert run.process.wait(timeout=600) == 0, run.output.read_text()
    metrics = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2]
    assert all(np.isfinite(list(line.values())).all() for line in metrics)
    for step in (1, 2):
        records = read_records(run.folder / "samples" / f"step-{step:06d}.parquet")
        assert len(records) == 4 and all(np.isfinite(record["reward"]) for record in records)
    page = (run.folder / "report" / "index.html").read_text()
    assert page.count("<article") == 6 and page.count("data:image/webp") == 12
