"""Where a run's metrics go besides metrics.jsonl, by the same names and steps: TensorBoard, Ray's metrics, and the
experiment trackers that the configuration names. No experiment tracker can end a run, or make it wait."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from queue import Full, Queue
from typing import Any, Self

from tensorboardX import SummaryWriter

from cluster.config import LearningConfig
from cluster.gauges import Gauges
from cluster.run_folder import RunFolder
from cluster.tracker_process import About
from cluster.tracking_config import TrackerName
from umrg.mistake import Mistake

END_S = 30.0
"""Seconds that trackers have at the end for what they have not sent yet, all of them together."""
BEHIND = 1000
"""Records that wait for a tracker, above which it counts as hung."""

_PROCESS = Path(__file__).with_name("tracker_process.py")
_NEEDS: Mapping[TrackerName, Mapping[str, str]] = {
    "wandb": {"wandb": "wandb"},
    "swanlab": {"swanlab": "swanlab"},
    "mlflow": {"mlflow": "mlflow-skinny", "sqlalchemy": "sqlalchemy", "alembic": "alembic"},
}
"""The modules of each tracker, and what is installed for them."""
_FIND = "import importlib.util as u, sys; print(*[name for name in sys.argv[1:] if u.find_spec(name) is None])"


class Trackers:
    """Everything that a run's metrics go to. warn: tells the user that one of them failed, once for each."""

    def __init__(self, run: RunFolder, config: LearningConfig, warn: Callable[[str], None]) -> None:
        """Raises ValueError if a tracker's package is not installed."""
        python = interpreter(config)
        refuse_missing(python, config.trackers)
        self._board = TensorBoard(run.path / "tensorboard")
        self._gauges = Gauges(config.name)
        about = About(
            name=config.name,
            project=config.tracking.project,
            folder=str((run.path / "trackers").absolute()),
            offline=config.tracking.offline,
            mlflow_uri=config.tracking.mlflow_uri,
            config=config.model_dump(mode="json"),
            seconds=END_S,
        )
        self._processes = [
            TrackerProcess(name, [python, "-I", str(_PROCESS), name], about) for name in dict.fromkeys(config.trackers)
        ]
        self._warn = warn

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._board.close()
        for each in self._processes:
            each.end("failed" if kind else "ended")
        deadline = time.monotonic() + END_S
        self._each(lambda process: process.wait(deadline))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a step, or of an evaluation after it."""
        self._board.log(step, metrics)
        self._gauges.log(step, metrics)
        self._each(lambda process: process.log({"step": step, **metrics}))

    def rewind(self, step: int) -> None:
        """The run goes on after a step, and takes later ones again."""
        self._board.rewind(step)

    def _each(self, do: Callable[["TrackerProcess"], None]) -> None:
        for process in list(self._processes):
            try:
                do(process)
            except TrackerFailed as failure:
                self._processes.remove(process)
                self._warn(str(failure))


def interpreter(config: LearningConfig) -> str:
    """Path of the one that trackers run in."""
    return str((config.tracking.python or Path(sys.executable)).absolute())


def refuse_missing(python: str, trackers: Sequence[TrackerName]) -> None:
    """Raise ValueError if an interpreter lacks a tracker's package. python: its path."""
    needs = {module: package for name in trackers for module, package in _NEEDS[name].items()}
    if not needs:
        return
    try:
        found = subprocess.run([python, "-I", "-c", _FIND, *needs], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Mistake(f"tracking.python={python} cannot be run ({error}); give a Python interpreter") from error
    if found.returncode:
        raise Mistake(f"tracking.python={python} is no Python interpreter: {found.stderr.strip() or found.stdout}")
    if missing := found.stdout.split():
        packages = " ".join(needs[module] for module in missing)
        raise Mistake(
            f"trackers={','.join(trackers)} needs packages that {python} lacks: pip install {packages} (best into an "
            "environment of their own, whose interpreter tracking.python names), or leave the tracker out"
        )


class TensorBoard:
    """Event files. Those of steps that are taken again are hidden by what follows them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._first: int | None = None
        self._writer: SummaryWriter | None = None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._writer is None:
            self._writer = SummaryWriter(str(self._folder), purge_step=self._first)
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def rewind(self, step: int) -> None:
        self.close()
        self._first = step + 1

    def close(self) -> None:
        if self._writer:
            self._writer.close()
        self._writer = None


class TrackerFailed(RuntimeError):
    """A tracker ended, or takes nothing any more."""


class TrackerProcess:
    """A tracker's process, started with the first record. Records wait for it in a queue that a thread empties, so that
    nothing but `wait` waits for it."""

    def __init__(self, name: str, command: Sequence[str], about: About) -> None:
        self.name, self._command, self._about = name, command, about
        self._output = Path(about.folder) / f"{name}.log"
        self._lines: Queue[str | None] = Queue(BEHIND)
        self._process: subprocess.Popen[str] | None = None

    def log(self, record: Mapping[str, Any]) -> None:
        """Raises TrackerFailed if the process has ended, or is too far behind."""
        if self._process is None:
            self._process = self._started()
        if self._process.poll() is not None:
            raise self._failure(self._last_words())
        try:
            self._lines.put_nowait(json.dumps(record))
        except Full:
            self._kill(self._process)
            raise self._failure(f"it is {BEHIND} records behind") from None

    def end(self, status: str) -> None:
        """Ask it to send what is left, and to end. status: "ended" or "failed"."""
        if self._process:
            # One that takes nothing is killed at the deadline.
            with contextlib.suppress(Full):
                self._lines.put_nowait(json.dumps({"status": status}))
                self._lines.put_nowait(None)

    def wait(self, deadline: float) -> None:
        """Wait until it has ended. Raises TrackerFailed, and kills it, if it fails or has not ended by a moment of the
        monotonic clock."""
        if self._process is None:
            return
        try:
            code = self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._kill(self._process)
            raise self._failure(f"it did not take its last records within {END_S:.0f} s") from None
        if code:
            raise self._failure(self._last_words())

    def _started(self) -> subprocess.Popen[str]:
        try:
            self._output.parent.mkdir(exist_ok=True)
            with self._output.open("ab") as output:
                process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    cwd=self._output.parent,
                    text=True,
                    start_new_session=True,  # Ctrl-C is for the driver, which then ends it.
                )
        except OSError as error:
            raise self._failure(str(error)) from error
        self._lines.put(json.dumps(asdict(self._about)))
        threading.Thread(target=self._send, args=[process], name=f"tracker-{self.name}", daemon=True).start()
        return process

    @staticmethod
    def _kill(process: "subprocess.Popen[str]") -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    def _send(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdin is not None, "it is a pipe"
        # A process that has ended is told of by `log` and `wait`.
        with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
            for line in iter(self._lines.get, None):
                pipe.write(line + "\n")
                pipe.flush()

    def _last_words(self) -> str:
        lines = self._output.read_text(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it ended without a word")

    def _failure(self, why: str) -> TrackerFailed:
        return TrackerFailed(f"tracker {self.name} gets no more metrics: {why} (see {self._output})")
