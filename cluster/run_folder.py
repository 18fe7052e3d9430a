"""The run folder: `runs/<name>/{config.yaml, metrics.jsonl, model/, summary.json, …}`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from cluster.config import Config, save_config
from umrg.atomic import written_aside


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

    @property
    def model(self) -> Path:
        return self.path / "model"

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Add a line to metrics.jsonl."""
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(metrics) + "\n")

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        with written_aside(self.path / name) as aside:
            aside.write_text(json.dumps(value, indent=2) + "\n")
