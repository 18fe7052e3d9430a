"""One experiment tracker, in a process of its own: metrics come on stdin and go to wandb, SwanLab or MLflow.

A process, because these libraries hang on networks, take over exit hooks and the terminal, and cannot be installed
beside everything else that a run needs: whatever becomes of one here, training does not notice, and a library's error
simply ends the process. Run by path, by an interpreter that has the tracker's package and need not have this project's,
of which it imports nothing.

Lines on stdin are JSON: first an `About`, then a step's or an evaluation's metrics with their "step" each, last
`{"status": "ended"}` or "failed". If that is missing, the driver was killed, and the run failed.
"""

import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True, kw_only=True)
class About:
    """What a tracker is told of a run."""

    name: str
    project: str
    folder: str
    """Where it keeps what it keeps, as an absolute path."""
    offline: bool
    mlflow_uri: str | None
    config: Mapping[str, Any]
    """The resolved configuration."""
    seconds: float
    """How long it may take to end."""


class State:
    """What is known of a tracker's run from one start to the next: its id, and the last step sent of each metric. Steps
    that are taken again after a resume are not sent again, because none of the libraries can take a value back."""

    def __init__(self, path: Path) -> None:
        self._path = path
        kept = json.loads(path.read_text()) if path.exists() else {}
        self.id: str | None = kept.get("id")
        self._sent: dict[str, int] = kept.get("sent", {})

    def fresh(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """The metrics that were not sent of this step or a later one."""
        return {name: value for name, value in metrics.items() if step > self._sent.get(name, -1)}

    def sent(self, step: int, metrics: Mapping[str, float]) -> None:
        self._sent.update(dict.fromkeys(metrics, step))
        self.write()

    def write(self) -> None:
        aside = self._path.with_suffix(".part")
        aside.write_text(json.dumps({"id": self.id, "sent": self._sent}))
        os.replace(aside, self._path)


class Tracker(Protocol):
    """A library's run, begun or gone on with."""

    def __init__(self, about: About, state: State) -> None: ...

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self, *, ended: bool) -> None:
        """ended: the run is complete; otherwise it failed or was interrupted."""


class Wandb:
    def __init__(self, about: About, state: State) -> None:
        import wandb

        self._run = wandb.init(
            project=about.project,
            name=about.name,
            id=state.id,
            resume="allow",
            mode="offline" if about.offline else None,
            dir=about.folder,
            config=dict(about.config),
            allow_val_change=True,
            settings=wandb.Settings(console="off"),
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self, *, ended: bool) -> None:
        self._run.finish(exit_code=0 if ended else 1)


class SwanLab:
    def __init__(self, about: About, state: State) -> None:
        import swanlab

        self._run = swanlab.init(
            project=about.project,
            name=about.name,
            id=state.id,
            resume="allow",
            mode="offline" if about.offline else None,
            log_dir=f"{about.folder}/swanlog",
            config=dict(about.config),
            settings=swanlab.Settings(interactive=False),
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self, *, ended: bool) -> None:
        self._run.finish(state="success" if ended else "crashed")


class MLflow:
    def __init__(self, about: About, state: State) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient(f"sqlite:///{about.folder}/mlflow.db" if about.offline else about.mlflow_uri)
        if state.id is None:
            self._run = self._begun(about)
            state.id = self._run
        else:
            self._run = state.id
            self._client.update_run(self._run, status="RUNNING")

    def _begun(self, about: About) -> str:
        from mlflow.entities import Param

        experiment = self._client.get_experiment_by_name(about.project)
        into = experiment.experiment_id if experiment else self._client.create_experiment(about.project)
        run: str = self._client.create_run(into, run_name=about.name).info.run_id
        params = [Param(key, str(value)[:6000]) for key, value in flat(about.config)]
        for first in range(0, len(params), 100):  # its limits, in characters and in number
            self._client.log_batch(run, params=params[first : first + 100])
        return run

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self._client.log_batch(self._run, metrics=[Metric(name, value, now, step) for name, value in metrics.items()])

    def close(self, *, ended: bool) -> None:
        self._client.set_terminated(self._run, "FINISHED" if ended else "FAILED")


def flat(tree: Mapping[str, Any], under: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a nested configuration by dotted key."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{under}{key}.")
        else:
            yield f"{under}{key}", value


TRACKERS: Mapping[str, type[Tracker]] = {"wandb": Wandb, "swanlab": SwanLab, "mlflow": MLflow}


def end_after_the_driver(seconds: float) -> None:
    """A driver ends this process; one that was killed cannot, and the library may hang."""
    driver = os.getppid()
    while os.getppid() == driver:
        time.sleep(1.0)
    time.sleep(seconds)
    os._exit(1)


def main(name: str) -> None:
    # A line without an end is what a driver that was killed left behind.
    lines = (json.loads(line) for line in sys.stdin if line.endswith("\n"))
    about = About(**next(lines))
    threading.Thread(target=end_after_the_driver, args=[about.seconds], daemon=True).start()
    state = State(Path(about.folder) / f"{name}.json")
    if name != "mlflow":  # whose server gives the id
        state.id = state.id or uuid.uuid4().hex
    tracker = TRACKERS[name](about, state)
    state.write()
    status = "failed"
    for line in lines:
        if "status" in line:
            status = line["status"]
            break
        step = line.pop("step")
        if metrics := state.fresh(step, line):
            tracker.log(step, metrics)
            state.sent(step, metrics)
    tracker.close(ended=status == "ended")


if __name__ == "__main__":
    main(sys.argv[1])
