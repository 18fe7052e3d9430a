"""Runs that are submitted to a cluster from outside: what is sent, what is shown, and how they end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import ray
from ray.job_submission import JobStatus
from rich.console import Console
from typer.testing import CliRunner

from cluster.cli import app
from cluster.commands.submit import passing_on
from cluster.config import EvaluateConfig, TrainConfig, load_config
from cluster.jobs import STOP_WAIT, Client, Following, find_job, living_actors
from cluster.submission import prepare, send_job
from tests.conftest import ROOT, TINY_REASONER
from tests.runs import MARK, SMALL, cluster_folder, marked
from umrg.mistake import Mistake

DEMO = ROOT / "configs" / "demo.yaml"
TINY = f"model={TINY_REASONER}"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory that is not the checkout."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def sent_config(submission, folder: Path):
    """The configuration as the job reads it."""
    content = submission.files[submission.config_file]
    (folder / "sent.yaml").write_bytes(content)
    return load_config(type(submission.config), folder / "sent.yaml")


def test_a_job_goes_on_from_its_newest_checkpoint_unless_told_otherwise(here):
    submission = prepare(DEMO, [TINY, "runs=/shared/runs", "steps=7"])
    assert sent_config(submission, here).resume == "auto" and sent_config(submission, here).steps == 7
    assert sent_config(prepare(DEMO, [TINY, "runs=/shared/runs", "resume=never"]), here).resume == "never"
    assert submission.entrypoint == "exec python -m cluster.cli train submitted/demo.yaml"
    assert submission.metadata.folder == "/shared/runs/demo"
    assert {"cluster/cli.py", "submitted/demo.yaml"} <= set(submission.files)
    assert " MiB; nothing of " in submission.summary() and ".git" in submission.left_out


SFT = ["runs=/shared", "data.train=/shared/rows.parquet"]


def test_each_kind_of_configuration_is_run_by_its_command(here):
    (here / "e.yaml").write_text(
        f"{{name: e, model: {TINY_REASONER}, expert: tiny, data: {{eval: {{phantoms: 2}}}}, runs: /shared}}"
    )
    submission = prepare(here / "e.yaml", [])
    assert isinstance(submission.config, EvaluateConfig) and submission.metadata.kind == "evaluate"
    assert prepare(ROOT / "configs" / "tiny_reasoner_sft.yaml", [*SFT, TINY]).metadata.kind == "sft"


def test_what_cannot_be_found_on_the_cluster_is_refused_before_it_is_sent(here):
    with pytest.raises(Mistake, match=r"^runs is runs, .* give runs=/a/folder/that/all/nodes/share"):
        prepare(DEMO, [TINY])
    shared = "runs=/shared/runs"
    with pytest.raises(Mistake, match=r"^model is models/none, which is not in the working directory; give"):
        prepare(DEMO, [shared, "model=models/none"])
    with (here / "rows.parquet").open("wb") as file:
        file.truncate(33 * 2**20)
    with pytest.raises(Mistake, match=r"^data\.train is rows\.parquet, which has 33\.0 MiB and is not sent"):
        prepare(DEMO, [TINY, shared, "data.train=rows.parquet", "data.eval=/shared/rows.parquet"])
    with pytest.raises(Mistake, match=r"^segmenter\.checkpoint is \.\./sam"):
        prepare(DEMO, [TINY, shared, "segmenter.checkpoint=../sam"])
    with pytest.raises(Mistake, match=r"learner\.lr"):
        prepare(DEMO, [TINY, shared, "learner.lr=fast"])
    with pytest.raises(
        Mistake, match=r"^tracking\.python is \.venv/bin/python, which would .* give tracking\.python=/"
    ):
        prepare(DEMO, [TINY, shared, "tracking.python=.venv/bin/python"])
    with pytest.raises(Mistake, match=r"^cache is copies, which would .* give cache=/"):
        prepare(DEMO, [TINY, shared, "cache=copies"])
    with pytest.raises(Mistake, match=r"^segmenter\.embeddings\.folder is kept, which would .* give segmenter\."):
        prepare(DEMO, [TINY, shared, "segmenter.embeddings.folder=kept"])
    prepare(DEMO, [TINY, shared, "segmenter.embeddings.folder=/scratch/embeddings"])
    with pytest.raises(Mistake, match=r"^runs is s3:/b/runs, which would "):
        prepare(DEMO, [TINY, "runs=s3://b/runs"])


def test_what_is_named_by_uri_is_read_on_the_cluster(here):
    given = ["expert=gs://b/expert", "data.train=https://b.org/rows.parquet", "data.eval=s3://b/rows.parquet"]
    submission = prepare(DEMO, ["model=s3://b/model", "runs=/shared", *given])
    content = submission.files[submission.config_file]
    assert isinstance(content, bytes)
    text = content.decode()
    assert "model: s3://b/model\n" in text and all(f" {each.partition('=')[2]}\n" in text for each in given)


def test_small_files_that_the_configuration_names_are_sent(here):
    (here / "rows.parquet").write_bytes(b"PAR1\0")
    (here / "mine.txt").write_text("Where is it? {query}")
    (here / "my_terms.py").write_text("from my_words import short\ndef term(case):\n    return short(case)\n")
    (here / "my_words.py").write_text("def short(case):\n    return 0.5\n")
    submission = prepare(
        DEMO,
        [
            TINY,
            "runs=/shared",
            "data.train=rows.parquet",
            "prompt=mine.txt",
            "reward={terms: [{name: 'my_terms:term'}]}",
        ],
    )
    assert {"rows.parquet", "my_terms.py"} <= set(submission.files)
    (here / "mine.txt").unlink()
    assert sent_config(submission, here).prompt == "Where is it? {query}"
    assert isinstance(submission.config, TrainConfig)


def test_the_bundled_model_is_sent_where_it_is_named(monkeypatch):
    monkeypatch.chdir(ROOT)
    name = "models/tiny-reasoner/model.safetensors"
    assert name in prepare(DEMO, ["runs=/shared"]).files
    assert name not in prepare(DEMO, ["runs=/shared", "model=/shared/Lingshu-7B"]).files


def test_a_terminal_shows_whole_lines_above_a_bar_of_steps():
    console = Console(record=True, force_terminal=True, width=100)
    with passing_on(console) as show:
        show("reading data\nstep 3/")
        show("50  reward [0.2]\nevaluating: 4 of 12 rows\nno newline")
    shown = console.export_text()
    assert "step 3/50  reward [0.2]" in shown and "no newline" in shown


class Broken(Client):
    """A client whose first connection breaks within the log, and whose second is refused."""

    log = "one\ntwo\nthree\n"

    def __init__(self):
        self.connections = 0

    async def tail_job_logs(self, job):
        self.connections += 1
        if self.connections == 2:
            raise RuntimeError("closed")
        yield "one\n"
        yield "tw"
        raise RuntimeError("closed")

    def get_job_status(self, job):
        return JobStatus.RUNNING if self.connections == 1 else JobStatus.STOPPED

    def get_job_logs(self, job):
        return self.log[:10] if self.connections == 1 else self.log


def test_a_connection_that_breaks_is_made_again_and_nothing_is_shown_twice():
    shown: list[str] = []
    assert Following(Broken(), "job", shown.append).until_end() == JobStatus.STOPPED
    assert "".join(shown) == Broken.log


# As an interpreter it does what it likes with `-m cluster.cli train submitted/NAME.yaml`.
PATIENT = """#!{python}
import pathlib, signal, sys, time
def end(*_):
    time.sleep(6)
    pathlib.Path({told!r}).write_text("told")
    sys.exit(130)
signal.signal(signal.SIGTERM, end)
print("step 1/3  reward 0.500", flush=True)
time.sleep(600)
"""
FAILING = """#!{python}
print("no luck", flush=True)
raise SystemExit(3)
"""


def interpreter(folder: Path, program: str, told: str = "") -> str:
    path = folder / "interpreter"
    path.write_text(program.format(python=sys.executable, told=told))
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def dashboard(ray_cluster, monkeypatch):
    """The address of the tests' cluster, as commands are given it."""
    address = f"http://{ray_cluster}"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", address)
    return address


def run(*arguments: str) -> tuple[int, str]:
    """A command in this process: exit code and output."""
    outcome = CliRunner().invoke(app, list(arguments))
    assert outcome.exception is None or isinstance(outcome.exception, SystemExit), outcome.output
    return outcome.exit_code, outcome.output


def command(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    """The same in a process of its own, with one stream for both outputs."""
    return subprocess.Popen(
        [sys.executable, "-m", "cluster.cli", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def await_status(client: Client, job: str, *wanted: JobStatus) -> None:
    deadline = time.monotonic() + 120
    while (status := client.get_job_status(job)) not in wanted:
        assert time.monotonic() < deadline and not status.is_terminal(), client.get_job_logs(job)
        time.sleep(0.2)


def test_a_job_has_the_time_that_it_needs_for_its_end(dashboard, tmp_path):
    """More than the three seconds after which Ray kills: the variable is set where the supervisor reads it."""
    name, told = f"name=patient-{uuid.uuid4().hex[:6]}", tmp_path / "told"
    given = (str(DEMO), TINY, f"runs={tmp_path}", name, "--python", interpreter(tmp_path, PATIENT, str(told)))
    code, said = run("submit", *given, "--detach")
    assert code == 0 and "medreasoner runs stop patient-" in said, said
    client = Client(dashboard)
    job = find_job(client, name.removeprefix("name="))
    assert job.submission_id in said and job.runtime_env["env_vars"][STOP_WAIT] == "120"
    while "step 1/3" not in client.get_job_logs(job.submission_id):
        await_status(client, job.submission_id, JobStatus.PENDING, JobStatus.RUNNING)
    code, said = run("runs", "list")
    row = next(line for line in said.splitlines() if job.submission_id in line)
    assert code == 0 and "RUNNING" in row and "train" in row and str(tmp_path) in row
    code, said = run("runs", "show", job.submission_id)
    assert code == 0 and f"runs={tmp_path}" in said and "last       step 1/3  reward 0.500" in said
    code, said = run("runs", "stop", job.submission_id)
    assert (code, told.read_text()) == (0, "told"), said
    assert "it has 120 s to do so" in said and "has ended: STOPPED" in said and "nothing is left behind" in said
    assert run("runs", "logs", job.submission_id)[1].endswith("step 1/3  reward 0.500\n")


def test_a_job_that_fails_is_told_with_its_exit_code(dashboard, tmp_path):
    given = (str(DEMO), TINY, f"runs={tmp_path}", "name=failing", "--python", interpreter(tmp_path, FAILING))
    code, said = run("submit", *given)
    assert code == 1 and "no luck" in said, said
    assert "failed     failing-" in said and "Job entrypoint command failed with exit code 3" in said
    assert run("runs", "show", "failing")[1].count("exit code 3") == 1


def test_ctrl_c_leaves_the_job_running(dashboard, tmp_path):
    given = (str(DEMO), TINY, f"runs={tmp_path}", "name=watched")
    watching = command("submit", *given, "--python", interpreter(tmp_path, PATIENT, str(tmp_path / "told")))
    assert watching.stdout
    said = ""
    while "step 1/3" not in said:
        line = watching.stdout.readline()
        assert line, said
        said += line
    watching.send_signal(signal.SIGINT)
    rest = watching.communicate(timeout=60)[0]
    assert watching.returncode == 130 and "Traceback" not in rest, rest
    client = Client(dashboard)
    job = find_job(client, "watched").submission_id
    assert f"{job} goes on" in rest and f"medreasoner runs logs -f {job} --address {dashboard}" in rest
    assert client.get_job_status(job) == JobStatus.RUNNING
    client.stop_job(job)
    await_status(client, job, JobStatus.STOPPED)


def test_actors_of_a_job_are_seen(dashboard):
    """A job's own, and none of others."""
    program = "import ray, time; ray.init(); a = ray.remote(num_cpus=0)(type('Mine', (), {})).remote(); time.sleep(600)"
    client, job = Client(dashboard), f"acting-{uuid.uuid4().hex[:6]}"
    send_job(client, f'exec {sys.executable} -c "{program}"', job, {}, {}, print)
    deadline = time.monotonic() + 120
    while not (left := living_actors(client, job)):
        assert time.monotonic() < deadline, client.get_job_logs(job)
        time.sleep(0.5)
    assert len(left) == 1 and left[0].startswith("Mine (process ")
    code, said = run("runs", "stop", job)
    assert code == 0 and "nothing is left behind" in said, said


def test_mistakes_in_an_address_or_a_name_are_told(dashboard, monkeypatch):
    with pytest.raises(Mistake, match="no job has nobody; the runs that were submitted there are: "):
        find_job(Client(dashboard), "nobody")
    with pytest.raises(Mistake, match=r"no dashboard of Ray answers at http://127\.0\.0\.1:9 "):
        Client("http://127.0.0.1:9")
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS")
    with pytest.raises(Mistake, match="say which cluster: give --address"):
        Client()


@pytest.mark.slow
@pytest.mark.chaos
def test_a_submitted_training_learns_and_a_second_submission_goes_on(dashboard, tmp_path):
    given = (str(DEMO), *SMALL, f"runs={tmp_path}", "name=small", "--python", sys.executable)
    first = command("submit", *given, "steps=1", "checkpoint_every=1")
    said = first.communicate(timeout=400)[0]
    assert first.returncode == 0, said
    assert "sending    " in said and "step 1/1" in said and "succeeded  small-" in said
    assert json.loads((tmp_path / "small" / "summary.json").read_text())["status"] == "ended"
    second = command("submit", *given, "steps=2")
    said = second.communicate(timeout=400)[0]
    assert second.returncode == 0 and "resumed after step 1" in said and "step 2/2" in said, said
    code, said = run("runs", "show", "small")
    assert code == 0 and "last       step 2  " in said, said


@pytest.fixture(params=["token", pytest.param("disabled", marks=pytest.mark.chaos)])
def outside(request, tmp_path):
    """A head node and another that were started by hand, with or without a token: dashboard, Ray's address and the
    environment of whoever may use them."""
    mark, token = uuid.uuid4().hex, tmp_path / "token"
    token.write_text("a" * 64)
    environment = {**os.environ, "RAY_AUTH_MODE": request.param, "RAY_AUTH_TOKEN_PATH": str(token), MARK: mark}
    environment.pop("PYTHONPATH", None)
    gcs, port = free_ports(2)
    start = (str(Path(sys.executable).parent / "ray"), "start", "--num-cpus=1", "--disable-usage-stats")
    head = (f"--port={gcs}", f"--dashboard-port={port}", "--dashboard-agent-listen-port=0")
    address = f"{ray.util.get_node_ip_address()}:{gcs}"
    with cluster_folder() as folder:
        try:
            for options in (
                ("--head", *head, f"--temp-dir={folder}"),
                (f"--address={address}", '--resources={"b": 1}'),
            ):
                subprocess.run([*start, *options], env=environment, cwd="/tmp", check=True, capture_output=True)
            yield f"http://127.0.0.1:{port}", address, environment
        finally:
            for process in marked(mark):
                with suppress(psutil.Error):
                    process.kill()


def free_ports(count: int) -> list[int]:
    with socket.socket() as first, socket.socket() as second:
        probes = [first, second][:count]
        for probe in probes:
            probe.bind(("", 0))
        return [probe.getsockname()[1] for probe in probes]


WHERE = """
import ray
from actors.connection import connect
connect()

@ray.remote(num_cpus=0, resources={"b": 0.1})
def where():
    import actors, learner, my_terms
    return actors.__file__, my_terms.here
print(*ray.get(where.remote(), timeout=120))
"""


@pytest.mark.slow
@pytest.mark.cluster
def test_a_cluster_that_was_started_by_hand_is_used_from_outside(outside, tmp_path):
    """With and without tokens; and a driver outside of a job brings its code along."""
    dashboard, address, environment = outside
    given = (str(DEMO), TINY, f"runs={tmp_path}", "name=outside", "--address", dashboard)
    sent = command("submit", *given, "--python", interpreter(tmp_path, FAILING), **environment)
    said = sent.communicate(timeout=120)[0]
    assert sent.returncode == 1 and "no luck" in said and "exit code 3" in said, said
    for words in (("list",), ("stop", "outside")):
        seen = command("runs", *words, "--address", dashboard, **environment)
        said = seen.communicate(timeout=120)[0]
        assert seen.returncode == 0 and "outside-" in said and "FAILED" in said, said
    (tmp_path / "my_terms.py").write_text("here = 'found'\n")
    paths = {"PYTHONPATH": f"{ROOT}:{tmp_path}", "RAY_ADDRESS": address}
    outcome = subprocess.run(
        [sys.executable, "-c", WHERE], cwd=tmp_path, env={**environment, **paths}, capture_output=True, text=True
    )
    assert outcome.returncode == 0, outcome.stderr
    assert "/runtime_resources/working_dir_files/" in outcome.stdout and "found" in outcome.stdout
    if environment["RAY_AUTH_MODE"] == "token":
        (tmp_path / "wrong").write_text("b" * 64)
        for wrong in (
            {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "wrong")},
            {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")},
            {"RAY_AUTH_MODE": "disabled"},
        ):
            refused = command("runs", "list", "--address", dashboard, **{**environment, **wrong})
            said = refused.communicate(timeout=120)[0]
            assert refused.returncode == 2 and said.count("\n") == 1, said
            assert said.startswith(f"error: the cluster at {dashboard} did not accept this process's token"), said
            assert "RAY_AUTH_TOKEN_PATH" in said
