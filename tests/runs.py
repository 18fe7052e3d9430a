"""Runs as their users start them: commands in processes of their own, on their own cluster or on one that is there."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import ray

from actors.pools import Weights
from actors.weight_files import checksum_of, pack
from cluster.weight_sync import settle
from tests.conftest import ROOT, TIMED

SMALL = (
    "data.train={phantoms: 16, seed: 1, modalities: [CT]}",
    "data.eval={phantoms: 4, seed: 2, modalities: [CT]}",
    *("batch=2", "rollout.n=2", "evaluation.limit=4", "evaluation.n=0"),
)
MARK = "MEDREASONER_TEST_RUN"


TRAIN = ("-m", "cluster.train")


class Run:
    """`python -m cluster.train` in a process group of its own, all of whose descendants carry a mark. program: in its
    place. address: of the cluster; None for one of its own."""

    def __init__(
        self,
        folder: Path,
        *overrides: str,
        program: Sequence[str] = TRAIN,
        output: str = "output",
        address: str | None = None,
    ) -> None:
        self.mark = uuid.uuid4().hex
        self.folder = folder / "runs" / "trial"
        self.output = folder / f"{output}.txt"
        folder.mkdir(exist_ok=True)
        environment = {**os.environ, MARK: self.mark}
        environment.pop("RAY_ADDRESS", None)
        if address:
            environment["RAY_ADDRESS"] = address
        command = (sys.executable, *program, "configs/demo.yaml", "name=trial", f"runs={folder / 'runs'}")
        self.process = subprocess.Popen(
            [*command, *SMALL, *overrides],
            cwd=ROOT,
            env=environment,
            stdout=self.output.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # A shell that starts the tests in the background lets everything that they start ignore Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def await_line(self, text: str, seconds: float = 600) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.output.read_text():
            assert self.process.poll() is None, self.output.read_text()
            assert time.monotonic() < deadline, f"no {text!r} in: {self.output.read_text()}"
            time.sleep(0.2)

    def processes(self) -> list[psutil.Process]:
        """Living processes that descend from the run, whoever their parent is now."""
        return marked(self.mark)

    def assert_nothing_left(self, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while left := self.processes():
            assert time.monotonic() < deadline, [" ".join(process.cmdline())[:80] for process in left]
            time.sleep(0.5)

    def summary(self) -> dict[str, object]:
        found: dict[str, object] = json.loads((self.folder / "summary.json").read_text())
        return found


@contextmanager
def cluster_folder() -> Iterator[Path]:
    """A folder for a cluster of its own, with a path short enough for Ray's sockets. A job's supervisor looks for its
    cluster's address in `ray_current_cluster` there; without it any cluster of this machine would do for Ray."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def marked(mark: str) -> list[psutil.Process]:
    """Living processes with a mark in their environment."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def told(folder: Path) -> list[dict[str, object]]:
    """Metrics of each step of a run, timings left out."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if not name.startswith(TIMED)} for line in lines]


def hand_out(workers, tensors):
    """Let the rollouts work with other weights than the learner's. tensors: by name."""
    buckets = (ray.put(pack(tensors)),)
    workers.rollouts.weights = Weights(version=1, checksum=checksum_of([tensors]), buckets=buckets)
    settle(workers)
