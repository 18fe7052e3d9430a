"""`medreasoner serve` as the README has it: started, asked by its own curl line, ended by Ctrl-C."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time

import pytest

from cluster.config import load_config
from serving.config import ServeConfig
from tests.conftest import ROOT, TINY_REASONER

SERVE = (sys.executable, "-m", "cluster.cli", "serve", str(TINY_REASONER))


def started(log, *arguments):
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.Popen(
        [*SERVE, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
        # A shell that starts the tests in the background lets everything that they start ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def await_line(server, log, text):
    deadline = time.monotonic() + 300
    while text not in log.read_text():
        assert server.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.slow
@pytest.mark.cluster
def test_the_readmes_curl_is_answered_and_ctrl_c_ends_the_service(tmp_path):
    (curl,) = re.findall(r"^curl .*/v1/ground$", (ROOT / "README.md").read_text(), re.MULTILINE)
    port = free_port()
    server = started(tmp_path / "log", "--port", port)
    try:
        await_line(server, tmp_path / "log", "serving")
        command = shlex.split(curl.replace(":8000/", f":{port}/"))
        reply = subprocess.run([*command, "-sS"], cwd=ROOT, capture_output=True, check=True, timeout=120)
        found = json.loads(reply.stdout)
        assert found["well_formed"] and found["mask"]["size"] == [found["height"], found["width"]]
    finally:
        os.killpg(server.pid, signal.SIGINT)
    assert server.wait(timeout=60) == 0
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.slow
@pytest.mark.cluster
def test_ctrl_c_ends_the_start_too(tmp_path):
    server = started(tmp_path / "log", "--port", free_port())
    time.sleep(12)
    assert server.poll() is None and "serving" not in (tmp_path / "log").read_text()
    os.killpg(server.pid, signal.SIGINT)
    assert server.wait(timeout=60) == 130
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--expert", "tinny"), "the nearest expert is 'tiny'"),
        (("--expert", "sam_vit_b"), "sam_vit_b needs its weights"),
        (("--expert", "sam_vit_b", "--checkpoint", "none.safetensors"), "there is no checkpoint none.safetensors"),
    ],
)
def test_a_wrong_expert_is_one_line_before_anything_starts(tmp_path, arguments, message):
    server = started(tmp_path / "log", "--port", free_port(), *arguments)
    assert server.wait(timeout=120) == 2
    assert message in (tmp_path / "log").read_text()
    assert len((tmp_path / "log").read_text().strip().splitlines()) == 1


def test_a_prompt_that_is_none_is_named_before_anything_starts():
    with pytest.raises(ValueError, match=r"^prompt: there is no file 'fulll'; did you mean 'full'\?$"):
        load_config(ServeConfig, None, ["prompt=fulll"])
