"""The run folder: `runs/<name>/{config.yaml, metrics.jsonl, samples/, checkpoints/, model/, summary.json, report/}`."""

import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import yaml
from pydantic import ValidationError

from cluster.config import save_config
from cluster.config_keys import flat, may_change, nested
from cluster.faults import RENAMED
from cluster.interruption import first_of_all
from cluster.lease import Lease, leased
from umrg.atomic import named, remove_leftovers, whole_lines, write_text, written_aside
from umrg.config import Config
from umrg.mistake import Mistake

SUMMARY = "summary.json"
Status = Literal["running", "ended", "interrupted", "failed"]
C = TypeVar("C", bound=Config)

_REMOVED = {"rollout.reset_caches"}
"""Keys of older runs' config.yaml that mean nothing anymore."""

_OF_A_BEGINNING = {"config.yaml", SUMMARY, "data/train.parquet", "data/eval.parquet", "results.jsonl"}
_RAYS_CACHE = {"working_dir_files", "py_modules_files"}
_telling = threading.Lock()


@dataclass(frozen=True)
class RunFolder:
    """The folder in which a run keeps everything that it leaves behind."""

    path: Path
    lease: Lease | None = None
    """Held by the driver of the run; None if the folder is only read."""

    @classmethod
    def create(cls, path: Path, config: Config) -> Self:
        """Make the folder, with the resolved configuration and a summary of status "running". Raises ValueError if it
        exists, unless it is blank (`is_blank`)."""
        begins_anew(path, config, resume=False)
        with written_aside(path) as aside:
            aside.mkdir()
            save_config(config, aside / "config.yaml")
            cls(aside).write_json(SUMMARY, {"status": "running"})
        return cls(path)

    @classmethod
    @contextmanager
    def begun(cls, path: Path, config: Config, *, resume: bool) -> Iterator[Self]:
        """`begin` under a lease, with a summary that tells the run's status from the first second to the last. If a
        user's mistake ends the run before it has results, a folder that was made for it is removed, so that the
        corrected command finds the name free. Raises ValueError, and touches nothing, if another driver holds the
        folder."""
        refuse_rays_cache(path)
        with leased(path) as lease:
            ours = not path.exists() or is_blank(path)
            run = replace(cls.begin(path, config, resume=resume), lease=lease)
            remove_leftovers(path)
            try:
                with run._told():
                    yield run
            except Mistake:
                if ours and lease.ours() and not run.has_results():
                    shutil.rmtree(path)
                raise
            finally:
                # An actor that was killed while it wrote a checkpoint may have left files aside.
                if lease.ours():
                    remove_leftovers(path)

    @classmethod
    def begin(cls, path: Path, config: Config, *, resume: bool) -> Self:
        """Make the folder or, with `resume`, take over an existing one. Raises ValueError if one exists and `resume` is
        false, if it is no run's folder, or if it was made with another configuration."""
        if begins_anew(path, config, resume=resume):
            return cls.create(path, config)
        save_config(config, path / "config.yaml")
        return cls(path)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Keep the summary's status up to date. The former summary is restored if a user's mistake ends the run before
        it has changed anything."""
        before, done = self.read_json(SUMMARY) or {}, self._done()
        self.write_json(SUMMARY, {"status": "running"})
        try:
            with first_of_all(lambda: self._end("interrupted")), self.telling():
                yield
        except Mistake:
            if before.get("status", "running") != "running" and self._done() == done:
                self.write_json(SUMMARY, before)
            raise
        self.tell("ended")

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Write an error that ends this context to the summary at once, before the enclosing contexts shut actors down,
        which may take long."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            self._end("interrupted")
            raise
        except BaseException as error:
            self._end("failed", error=f"{type(error).__name__}: {error}")
            raise

    def tell(self, status: Status | None = None, **details: Any) -> None:
        """Update the summary's status and details, unless another driver has taken over the folder."""
        with _telling:
            if self.lease is None or self.lease.ours():
                kept = self.read_json(SUMMARY) or {}
                told = {"status": status or kept.get("status", "running")}
                self._write_json(SUMMARY, {**kept, **details, **told})

    def status(self) -> Status:
        """The summary's status; "interrupted" if there is none."""
        found: Status = (self.read_json(SUMMARY) or {}).get("status", "interrupted")
        return found

    def _end(self, status: Status, **details: Any) -> None:
        # Errors while actors are shut down must not overwrite how the run ended.
        if self.status() == "running":
            self.tell(status, **details)

    def hold(self) -> None:
        """Raises LeaseLost if another driver has taken over the folder."""
        if self.lease:
            self.lease.hold()

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

    @property
    def drawn_train(self) -> Path:
        """The phantoms that the run drew to train on, if it did."""
        return self.path / "data" / "train.parquet"

    @property
    def drawn_eval(self) -> Path:
        """Those that it drew to evaluate on."""
        return self.path / "data" / "eval.parquet"

    def has_results(self) -> bool:
        """Whether anything was sampled or learnt."""
        return self.samples.exists() or any(self._done())

    def _done(self) -> list[int]:
        """Sizes in bytes of the files that grow with every result."""
        files = [self.path / f"{name}.jsonl" for name in ("results", "metrics")]
        return [file.stat().st_size if file.exists() else 0 for file in files]

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        self.hold()
        path = self.path / "metrics.jsonl"
        with named(path), path.open("a") as file:
            file.write(json.dumps(metrics) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return whole_lines(self.path / "metrics.jsonl")

    def metrics_position(self) -> int:
        """Size of metrics.jsonl in bytes, once all of it is on the disk."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return 0
        with path.open("rb") as file:
            os.fsync(file.fileno())
        return path.stat().st_size

    def rewind(self, step: int, metrics: int) -> None:
        """Drop what was written after a step. metrics: bytes of metrics.jsonl to keep."""
        self.hold()
        path = self.path / "metrics.jsonl"
        if path.exists():
            os.truncate(path, min(metrics, path.stat().st_size))
        for samples in self.samples.glob("step-*.parquet"):
            if int(samples.stem.split("-")[1]) > step:
                samples.unlink()

    def read_json(self, name: str) -> Any:
        """The value of a JSON file of the folder; None if there is no such file."""
        path = self.path / name
        return json.loads(path.read_text()) if path.exists() else None

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        self.hold()
        self._write_json(name, value)

    def _write_json(self, name: str, value: Mapping[str, Any]) -> None:
        write_text(self.path / name, json.dumps(value, indent=2) + "\n")


def begins_anew(path: Path, config: Config, *, resume: bool) -> bool:
    """Whether a run makes its folder, or takes over the one that is there. Raises ValueError as `RunFolder.begin`."""
    if not path.exists() or is_blank(path):
        return True
    if not resume:
        raise Mistake(f"the run folder {path} exists; give another name=… or remove it")
    kept = _kept(path)
    if not isinstance(kept, dict):
        raise Mistake(f"{path} is not a run's folder (no config.yaml); give another name=… or remove it")
    given, was = flat(config.model_dump(mode="json")), _as_read_now(type(config), kept)
    changed = sorted(key for key in given if not may_change(type(config), key) and was.get(key) != given[key])
    if changed:
        raise Mistake(f"{path} was made with another {', '.join(changed)}; resume with what its config.yaml says")
    return False


def is_blank(path: Path) -> bool:
    """Whether a folder is that of a run that ended before anything was sampled or learnt, and holds nothing else."""
    if not (path / "config.yaml").is_file() or not (path / SUMMARY).is_file():
        return False
    files = [entry.relative_to(path) for entry in path.rglob("*") if not entry.is_dir()]
    names = {file.as_posix() for file in files if not _passing(file)}
    return names <= _OF_A_BEGINNING and not RunFolder(path).has_results()


def _passing(path: Path) -> bool:
    """Written anew at every start, or left aside by a writer that was killed."""
    aside = any(part.startswith(".") and part.endswith(".part") for part in path.parts)
    return aside or path.parts[0] in ("tensorboard", "trackers")


def refuse_rays_cache(path: Path) -> None:
    """Raises ValueError for a folder in the cache into which Ray unpacks jobs' packages, and which it may empty."""
    if _RAYS_CACHE & set(path.resolve().parts):
        raise Mistake(
            f"the run folder {path} would lie in Ray's cache of packages ({path.resolve()}), from which it may vanish "
            "at any time; give runs=/a/folder/that/all/nodes/share"
        )


def _as_read_now(schema: type[Config], kept: Mapping[str, Any]) -> dict[str, Any]:
    """A run's configuration by dotted key. Keys that are younger than the run have their defaults in it, and older
    names are translated."""
    translated = _translated(kept)
    try:
        return flat(schema.model_validate(nested(translated)).model_dump(mode="json"))
    except ValidationError:
        return translated


def kept_values(run: Path) -> dict[str, Any]:
    """The values of a run's configuration by dotted key, in today's names, unchecked: what a check looks for, such as a
    reward term of one's own, need not be where the folder is now. Raises ValueError where it is no run's folder."""
    kept = _kept(run)
    if not isinstance(kept, dict):
        raise Mistake(f"{run} is not a run's folder (no config.yaml); give that of a run, such as runs/demo")
    return _translated(kept)


def kept_config(schema: type[C], run: Path) -> C:
    """The configuration in a run's folder, which an earlier version may have written. Raises ValueError as
    `kept_values` does."""
    return schema.model_validate(nested(kept_values(run)))


def _kept(run: Path) -> Any:
    """What a run's config.yaml holds; None without one."""
    file = run / "config.yaml"
    try:
        return yaml.safe_load(file.read_bytes()) if file.is_file() else None
    except yaml.YAMLError as error:
        said = " ".join(str(error).split())
        raise Mistake(f"{file} is damaged, it is not YAML: {said}; mend it, or give another run's folder") from error


def _translated(kept: Mapping[str, Any]) -> dict[str, Any]:
    """A run's configuration by dotted key, in today's names."""
    values = {RENAMED.get(key, key): value for key, value in flat(kept).items() if key not in _REMOVED}
    if values.get("placement") in ("pack", "spread"):
        values["spread"] = values.pop("placement") == "spread"
    return values
