"""What is made of a dashboard's answers, those of a broken one or of none too."""

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from ray.job_submission import JobDetails, JobStatus, JobType
from typer.testing import CliRunner

from cluster.cli import app
from cluster.jobs import STOP_WAIT, Client, Following, Metadata, Unreachable, stop
from cluster.submission import send_job
from umrg.mistake import Mistake

VERSION = "/api/version"
OK = (200, json.dumps({"ray_version": "2.50.0"}))


class Dashboard(ThreadingHTTPServer):
    """Answers each path with the status and the text that are next for it; the last of them stays."""

    def __init__(self) -> None:
        self.answers: dict[str, list[tuple[int, str]]] = {VERSION: [OK]}
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Dashboard

    def do_GET(self) -> None:
        told = self.server.answers.get(self.path, [(404, "Job does not exist")])
        status, text = told.pop(0) if len(told) > 1 else told[0]
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        """Nothing is logged."""


@pytest.fixture
def dashboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[Dashboard]:
    with Dashboard() as server:
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", server.address)
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize("answer", [(404, "nothing"), (502, "<html>"), (200, "<html>"), (200, "{}"), (200, "[]")])
def test_what_is_no_dashboard_is_told(dashboard, answer):
    dashboard.answers[VERSION] = [answer]
    with pytest.raises(Unreachable, match=r"^no cluster is reached \(.*\); give --address, "):
        Client(dashboard.address)


def details(**changed: object) -> JobDetails:
    known = {"type": JobType.SUBMISSION, "submission_id": "job", "status": JobStatus.SUCCEEDED, "entrypoint": ""}
    return JobDetails(**(known | changed))


def test_a_dashboard_that_fails_for_a_while_does_not_end_a_following(dashboard):
    dashboard.answers["/api/jobs/job"] = [
        (500, "Traceback\n  ..."),
        (502, "<html>"),
        (200, details().model_dump_json()),
    ]
    dashboard.answers["/api/jobs/job/logs"] = [(503, ""), (200, json.dumps({"logs": "done\n"}))]
    shown: list[str] = []
    assert Following(Client(dashboard.address), "job", shown.append).until_end() == JobStatus.SUCCEEDED
    assert shown == ["done\n"]


def test_a_job_that_is_unknown_and_a_dashboard_that_fails_are_told(dashboard):
    client = Client(dashboard.address)
    with pytest.raises(Mistake, match=r" answers 404 \(Job does not exist\); check the job's name") as told:
        Following(client, "nobody", print).until_end()
    assert not isinstance(told.value, Unreachable)
    dashboard.answers["/api/jobs/job"] = [(502, "<html>\n</html>")]
    with pytest.raises(Unreachable, match=r" answers 502 \(Bad Gateway\)"):
        client.get_job_info("job")


def test_an_agent_that_takes_no_job_is_told(dashboard):
    dashboard.answers["/api/jobs/"] = [(500, "No available agent to submit job, please try again later.")]
    with pytest.raises(Mistake, match=r"^the head node's agent took no job within 0 s; see its"):
        send_job(Client(dashboard.address), "true", "job", {}, {}, print, patience=0)


def test_a_run_is_stopped_by_its_name_only(dashboard):
    outcome = CliRunner().invoke(app, ["runs", "stop"])
    assert outcome.exit_code == 2 and "Missing argument" in outcome.output, outcome.output


@pytest.mark.parametrize(
    ("given", "said"),
    [("7.5", "; it has 7.5 s to do so"), ("120", "; it has 120 s to do so"), (None, ""), ("soon", ""), ("nan", "")],
)
def test_a_job_that_is_stopped_is_told_how_long_it_has_where_that_is_known(dashboard, given, said):
    dashboard.answers["/api/jobs/job"] = [(200, details().model_dump_json())]
    dashboard.answers["/api/jobs/job/stop"] = [(200, json.dumps({"stopped": True}))]
    variables = {} if given is None else {"env_vars": {STOP_WAIT: given}}
    lines: list[str] = []
    stop(Client(dashboard.address), details(status=JobStatus.RUNNING, runtime_env=variables), lines.append)
    assert lines == [f"asked job to end{said}", "job has ended: SUCCEEDED"]


def test_metadata_of_other_versions_are_read():
    ours = Metadata(kind="train", name="a", folder="/runs/a", config="a.yaml", overrides=["steps=1"])
    newer = ours.as_strings() | {"medreasoner.user": '"me"', "other": "x"}
    assert Metadata.of(details(metadata=newer)) == ours
    older = {key: value for key, value in newer.items() if not key.endswith(".folder")}
    assert Metadata.of(details(metadata=older)) is None and Metadata.of(details(metadata={})) is None
