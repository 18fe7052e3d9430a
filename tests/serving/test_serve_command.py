"""`medreasoner serve` as the README has it: started, asked by its own curl line, ended by Ctrl-C."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.commands.answering import serve
from cluster.config import load_config
from serving.config import ServeConfig
from tests.conftest import ROOT, TINY_REASONER
from umrg.images import decode_image

SERVE = (sys.executable, "-m", "cluster.cli", "serve")


def started(log, *arguments, model=TINY_REASONER):
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.Popen(
        [*SERVE, str(model), *arguments],
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


def documented(language):
    """The examples of the README and of docs/serving.md that ask a service: its curl lines, or its Python."""
    texts = [(ROOT / "README.md").read_text(), (ROOT / "docs" / "serving.md").read_text()]
    blocks = [block for text in texts for block in re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)]
    if language == "python":
        return [block for block in blocks if "127.0.0.1:8000" in block]
    lines = "\n".join(blocks).splitlines()
    return [line for line in lines if line.startswith("curl") and "127.0.0.1:8000" in line]


def engines(server):
    """Process ids of the engines below a service."""
    return {each.pid for each in psutil.Process(server.pid).children(recursive=True) if "EngineCore" in each.name()}


def write_other_weights(folder):
    """In place of a model's, as a later step of training would."""
    torch.manual_seed(0)
    weights = {
        name: tensor + 0.1 * tensor.std() * torch.randn_like(tensor) if tensor.numel() > 1 else tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(weights, folder / "aside", metadata={"format": "pt"})
    (folder / "aside").rename(folder / "model.safetensors")


@pytest.mark.slow
def test_documented_examples_are_answered_and_ctrl_c_ends_the_service(tmp_path):
    port, model = free_port(), tmp_path / "tiny"
    shutil.copytree(TINY_REASONER, model)
    server = started(tmp_path / "log", "--port", port, model=model)
    try:
        await_line(server, tmp_path / "log", "is told at")
        curls = documented("sh")
        for number, line in enumerate(curls):
            command = shlex.split(line.replace(":8000/", f":{port}/").replace("overlay.png", str(tmp_path / "o.png")))
            reply = subprocess.run([*command, "-sS"], cwd=ROOT, capture_output=True, check=True, timeout=120)
            if number == 0:
                first, found = command, json.loads(reply.stdout)
                assert found["well_formed"] and found["mask"]["size"] == [found["height"], found["width"]]
            assert b'"detail"' not in reply.stdout, (line, reply.stdout)
        assert len(curls) >= 5 and decode_image((tmp_path / "o.png").read_bytes(), "it").ndim == 3
        for block in documented("python"):
            code = block.replace("127.0.0.1:8000", f"127.0.0.1:{port}")
            told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=120)
            assert told.returncode == 0 and told.stdout, told.stderr
        engine = engines(server)
        write_other_weights(model)
        os.kill(server.pid, signal.SIGHUP)
        await_line(server, tmp_path / "log", f"serving {model}")
        reply = subprocess.run([*first, "-sS"], cwd=ROOT, capture_output=True, check=True, timeout=120)
        assert json.loads(reply.stdout)["completion"] != found["completion"]
        assert engines(server) == engine, "the engine was not started anew"
    finally:
        os.killpg(server.pid, signal.SIGINT)
    assert server.wait(timeout=60) == 0
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_ctrl_c_ends_the_start_too(tmp_path):
    server = started(tmp_path / "log", "--port", free_port())
    time.sleep(12)
    assert server.poll() is None and "told at" not in (tmp_path / "log").read_text()
    os.killpg(server.pid, signal.SIGINT)
    assert server.wait(timeout=60) == 130
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--expert", "tinny"), "the nearest expert is 'tiny'"),
        (("--keys", "none.yaml"), "none.yaml cannot be read"),
        (("--host", "0.0.0.0"), "give it keys with --keys FILE"),
        (("--expert", "sam_vit_b"), "sam_vit_b needs its weights"),
        (("--expert", "sam_vit_b", "--checkpoint", "none.safetensors"), "there is no checkpoint none.safetensors"),
    ],
)
def test_a_wrong_expert_is_one_line_before_anything_starts(tmp_path, arguments, message):
    server = started(tmp_path / "log", "--port", free_port(), *arguments)
    assert server.wait(timeout=120) == 2
    assert message in (tmp_path / "log").read_text()
    assert len((tmp_path / "log").read_text().strip().splitlines()) == 1


def test_keys_of_the_configuration_may_follow_without_a_model(capsys):
    with pytest.raises(ValueError, match=r"image_mb'.*image_mib"):
        serve(Path("limits.image_mb=3"), dry_run=True)


def test_a_prompt_that_is_none_is_named_before_anything_starts():
    with pytest.raises(ValueError, match=r"^prompt: there is no file 'fulll'; did you mean 'full'\?$"):
        load_config(ServeConfig, None, ["prompt=fulll"], {"model": TINY_REASONER})
