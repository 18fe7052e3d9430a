"""The run folder: `runs/<name>/{config.yaml, metrics.jsonl, samples/, checkpoints/, model/, summary.json, report/}`."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import yaml

from cluster.config import save_config
from umrg.atomic import remove_leftovers, whole_lines, written_aside
from umrg.config import Config

_MAY_CHANGE = ("steps", "resume", "checkpoint_every", "keep", "runs", "deadlines", "placement")


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
        kept = yaml.safe_load((path / "config.yaml").read_text()) if (path / "config.yaml").is_file() else None
        if not isinstance(kept, dict):
            raise ValueError(f"{path} is not a run's folder (no config.yaml); give another name=… or remove it")
        given = config.model_dump(mode="json")
        changed = sorted(key for key in given if key not in _MAY_CHANGE and kept.get(key) != given[key])
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
        """Whether anything was sampled."""
        return self.samples.exists() or (self.path / "results.jsonl").exists()

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Add a line to metrics.jsonl."""
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(metrics) + "\n")

    def keep_metrics(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Drop the lines of metrics.jsonl that are not wanted."""
        path = self.path / "metrics.jsonl"
        if path.exists():
            kept = [line for line in whole_lines(path) if wanted(line)]
            with written_aside(path) as aside:
                aside.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def read_json(self, name: str) -> Any:
        """What `write_json` wrote under that name; None where there is nothing."""
        path = self.path / name
        return json.loads(path.read_text()) if path.exists() else None

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        with written_aside(self.path / name) as aside:
            aside.write_text(json.dumps(value, indent=2) + "\n")
