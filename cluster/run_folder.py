"""The run folder: `runs/<name>/{config.yaml, metrics.jsonl, samples/, checkpoints/, model/, summary.json, report/}`."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import yaml

from cluster.config import save_config
from umrg.atomic import remove_leftovers, whole_lines, written_aside
from umrg.config import Config

_MAY_CHANGE = (
    *("resume", "checkpoint_every", "keep", "keep_best", "runs", "deadlines", "placement", "segmenter.actors"),
    *(f"{role}.{key}" for role in ("rollout", "segmenter", "learner") for key in ("num_cpus", "num_gpus", "threads")),
    *(f"learner.{key}" for key in ("ranks", "zero_stage", "offload", "micro_batch_tokens", "gradient_checkpointing")),
    *("steps", "patience", "rollout.actors"),
)
"""What a run may go on with otherwise than it began: how it is computed, and how long."""


@dataclass(frozen=True)
class RunFolder:
    """Where one run keeps what it leaves behind."""

    path: Path

    @classmethod
    def create(cls, path: Path, config: Config) -> Self:
        """Make the folder and save the resolved configuration. Raises ValueError where it exists."""
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            raise ValueError(f"the run folder {path} exists; give another name=… or remove it") from None
        save_config(config, path / "config.yaml")
        return cls(path)

    @classmethod
    @contextmanager
    def begun(cls, path: Path, config: Config, *, resume: bool) -> Iterator[Self]:
        """`begin`; where a mistake of the user's ends the run before it has anything to show, a folder that was made
        for it goes too, so that the corrected command finds the name free."""
        ours = not path.exists()
        run = cls.begin(path, config, resume=resume)
        remove_leftovers(path)
        try:
            yield run
        except ValueError:
            if ours and not run.has_results():
                shutil.rmtree(path)
            raise
        finally:
            # An actor that was ended in the middle of a checkpoint may have written on after it was given up.
            remove_leftovers(path)

    @classmethod
    def begin(cls, path: Path, config: Config, *, resume: bool) -> Self:
        """Make the folder, or with `resume` take the one that is there. Raises ValueError where one is there and should
        not be, is no run's, or was made with another configuration."""
        if not (resume and path.exists()):
            return cls.create(path, config)
        kept = yaml.safe_load((path / "config.yaml").read_bytes()) if (path / "config.yaml").is_file() else None
        if not isinstance(kept, dict):
            raise ValueError(f"{path} is not a run's folder (no config.yaml); give another name=… or remove it")
        given, was = _flat(config.model_dump(mode="json")), _flat(kept)
        changed = sorted(key for key in given if not _may_change(key) and was.get(key) != given[key])
        if changed:
            raise ValueError(
                f"{path} was made with another {', '.join(changed)}; resume with what its config.yaml says"
            )
        save_config(config, path / "config.yaml")
        return cls(path)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def report(self) -> Path:
        return self.path / "report"

    @property
    def model(self) -> Path:
        return self.path / "model"

    def has_results(self) -> bool:
        """Whether anything was sampled or learnt."""
        return self.samples.exists() or any((self.path / f"{name}.jsonl").exists() for name in ("results", "metrics"))

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Add a line to metrics.jsonl."""
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(metrics) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return whole_lines(self.path / "metrics.jsonl")

    def metrics_position(self) -> int:
        """Bytes of metrics.jsonl, all of them on the disk."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return 0
        with path.open("rb") as file:
            os.fsync(file.fileno())
        return path.stat().st_size

    def rewind(self, step: int, metrics: int) -> None:
        """Forget what was written after a step. metrics: bytes of metrics.jsonl by then."""
        path = self.path / "metrics.jsonl"
        if path.exists():
            os.truncate(path, min(metrics, path.stat().st_size))
        for samples in self.samples.glob("step-*.parquet"):
            if int(samples.stem.split("-")[1]) > step:
                samples.unlink()

    def read_json(self, name: str) -> Any:
        """What `write_json` wrote under that name; None where there is nothing."""
        path = self.path / name
        return json.loads(path.read_text()) if path.exists() else None

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        with written_aside(self.path / name) as aside:
            aside.write_text(json.dumps(value, indent=2) + "\n")


def status_of(error: BaseException) -> str:
    """What summary.json says of a run that an error ended."""
    return "interrupted" if isinstance(error, KeyboardInterrupt) else f"failed: {type(error).__name__}: {error}"


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        inner = isinstance(value, dict)
        found.update(_flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value})
    return found


def _may_change(key: str) -> bool:
    return any(key == each or key.startswith(f"{each}.") for each in _MAY_CHANGE)
