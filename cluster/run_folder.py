"""The run folder: `runs/<name>/{config.yaml, metrics.jsonl, model/, summary.json, …}`."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from cluster.config import Config, save_config


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
        replace_file(self.path / name, lambda path: path.write_text(json.dumps(value, indent=2) + "\n"))


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file aside, then rename it into place: readers see the old one or the new one, never half of one."""
    aside = path.with_name(f".{path.name}.partial")
    try:
        write(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def replace_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Write a folder aside, then rename it into place, over an older one if there is one."""
    aside = path.with_name(f".{path.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        write(aside)
        shutil.rmtree(path, ignore_errors=True)
        os.replace(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
