"""deploy/slurm.sbatch with stand-ins for SLURM's commands, Ray and the run: what is started on which node, and that it
is ended."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from cluster.commands.doctor_demand import ROOM, SHARED_SHARE, demand
from tests.conftest import ROOT
from tests.deploy.manifests import run_of

SCRIPT = ROOT / "deploy" / "slurm.sbatch"
STAND_INS = {
    "scontrol": """
        case "$1" in show) printf 'n1\\nn2\\nn3\\n';; *) echo "scontrol $*" >> "$LOG";; esac""",
    "srun": """
        for option; do case "$option" in --nodelist=*) node="${option#*=}"; shift; break;; -*) shift;; esac; done
        case "$1" in
            df) printf ' Size\\n%4s\\n' "$SHM"; exit;;
            hostname) echo "192.0.2.1 2001:db8::1"; exit;;
        esac
        echo "$node: $* ($RAY_JOB_STOP_WAIT_TIME_S s)" >> "$LOG"
        trap 'echo "$node: ended" >> "$LOG"; exit 143' TERM
        while :; do sleep 0.05; done""",
    "ray": "exit 0",
    "python": """
        if [ "$1" = -c ]; then exec "$PYTHON" "$@"; fi
        until [ "$(grep -c 'ray start' "$LOG")" -eq 3 ]; do sleep 0.05; done
        echo "run: $* at $RAY_ADDRESS, token $(stat -c %a "$RAY_AUTH_TOKEN_PATH")" \\
            "of $(wc -c < "$RAY_AUTH_TOKEN_PATH") characters" >> "$LOG"
        trap 'echo "run: stopped" >> "$LOG"; exit 130' TERM
        [ -z "$LASTS" ] || while :; do sleep 0.05; done
        exit "$CODE" """,
}


@pytest.fixture
def sbatch(tmp_path):
    """Starts the script as SLURM would on the first of three nodes."""
    (tmp_path / "bin").mkdir()
    for name, body in STAND_INS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "log").touch()
    settings = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "LOG": str(tmp_path / "log"),
        "HOME": str(tmp_path),
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_NODELIST": "n[1-3]",
        "SLURM_JOB_ID": "123456",
        "SLURM_CPUS_PER_TASK": "88",
        "SHM": "1007",
        "LASTS": "",
        "CODE": "0",
    }

    def start(*arguments, **changed):
        return subprocess.Popen(
            ["bash", SCRIPT, *arguments], env=settings | changed, stderr=subprocess.PIPE, text=True, cwd=tmp_path
        )

    return start


def logged(tmp_path):
    return (tmp_path / "log").read_text().splitlines()


def test_it_is_bash():
    subprocess.run(["bash", "-n", SCRIPT], check=True)


@pytest.mark.parametrize("code", [0, 2])
def test_head_workers_run_and_end(sbatch, tmp_path, code):
    """The head on the first node, workers on the others, then the run; all end, and the exit code is the run's."""
    job = sbatch("configs/demo_gpu.yaml", "runs=/shared/runs", CODE=str(code))
    assert job.wait(timeout=60) == code, job.stderr.read()
    lines = logged(tmp_path)
    assert lines[0] == "n1: ray start --head --block --node-ip-address=192.0.2.1 --port=23456 (120 s)"
    # The workers start in the background, and on a busy machine the run may be first.
    assert sorted(lines[1:4]) == [
        *(f"n{i}: ray start --block --address=192.0.2.1:23456 (120 s)" for i in (2, 3)),
        "run: -m cluster.train configs/demo_gpu.yaml runs=/shared/runs resume=auto at 192.0.2.1:23456, "
        "token 600 of 64 characters",
    ]
    assert sorted(lines[4:]) == ["n1: ended", "n2: ended", "n3: ended"]
    assert not list((tmp_path / ".ray").iterdir()), "the token goes with the job"


def test_a_run_whose_time_is_up_is_stopped_and_queued_again(sbatch, tmp_path):
    job = sbatch("configs/demo_gpu.yaml", LASTS="yes")
    deadline = time.monotonic() + 60
    while len(logged(tmp_path)) < 4:
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=60) == 130
    first, *ended, last = logged(tmp_path)[4:]
    assert first == "run: stopped" and last == "scontrol requeue 123456"
    assert sorted(ended) == ["n1: ended", "n2: ended", "n3: ended"]


def test_a_node_with_too_little_shared_memory_is_named_and_nothing_is_started(sbatch, tmp_path):
    job = sbatch("configs/demo_gpu.yaml", SHM="16")
    assert job.wait(timeout=60) == 1
    assert "error: n1 has 16 GiB in /dev/shm, 24 are needed" in job.stderr.read()
    assert not logged(tmp_path) and not list((tmp_path / ".ray").iterdir())


def test_what_it_asks_for_is_what_the_model_needs():
    (gib,) = re.findall(r"^SHM_GIB=(\d+) ", SCRIPT.read_text(), re.MULTILINE)
    parameters = 8_292_166_656  # of Lingshu-7B, bench.architectures
    assert int(gib) << 30 >= ROOM * demand(run_of("train"), parameters).shared / SHARED_SHARE


def test_without_a_configuration_it_says_how_it_is_used(sbatch):
    job = sbatch()
    assert job.wait(timeout=60) == 2 and "usage: sbatch deploy/slurm.sbatch CONFIG" in job.stderr.read()
