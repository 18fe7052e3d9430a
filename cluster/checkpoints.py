"""Checkpoints of a run: whole and checked, or not there.

    checkpoints/step-NNNNNN/   what the learner's ranks wrote (`learner.checkpoint`), and
        state.json             what the driver goes on from
        config.yaml            the run's
        manifest.json          size and sha256 of each of these files; written when all others are on the disk
    checkpoints/latest         the newest one's name and its manifest's sha256; changed last

The ranks write aside while training goes on; when all have written, `Checkpoints.saved` puts the folder in its place.
Stopped at any moment, a run finds the one before or the new one.
"""

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, Self

from pydantic import Field, NonNegativeInt, ValidationError

from cluster.config import Every
from umrg.atomic import written_aside
from umrg.config import Config
from umrg.durable import (
    MANIFEST,
    Damaged,
    Disk,
    FileRecord,
    manifest,
    manifest_digest,
    replace_durably,
    verify,
    write_durably,
)
from umrg.mistake import Mistake
from umrg.shuffling import Cursor

LATEST, STATE = "latest", "state.json"

PERIOD, WORTH = 600.0, 20.0
"""By time, a checkpoint is due so many seconds after the last, or so many times what that one made training wait,
whichever is longer."""


class RunState(Config):
    """The driver's state. Sampling seeds are hashes, so there is no random state besides the learner's."""

    step: NonNegativeInt
    """Steps taken, which is also the weights' version."""
    cursor: Cursor
    """Position in the shuffled data."""
    metrics: NonNegativeInt
    """Bytes of metrics.jsonl by then."""
    score: float | None = None
    """Of the evaluation at this step, greater is better; None where there was none."""
    rows: NonNegativeInt | None = None
    """Of the data that the cursor is a position in; None in checkpoints of earlier versions."""
    ahead: list[list[NonNegativeInt]] = Field(default_factory=list)
    """Numbers of the rows that were taken from before the cursor's position and not yet learnt from, of each later step
    that was begun."""


class Learner(Protocol):
    """What checkpoints ask of the learner (`actors.pools.RankPool`)."""

    def save(self, folder: Path) -> None: ...

    def saved(self, *, wait: bool) -> dict[str, FileRecord] | None: ...

    def load(self, folder: Path) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint that was verified to be whole."""

    folder: Path
    state: RunState
    sha256: str
    """Of its manifest."""

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Verify every file. Raises ValueError if there is no checkpoint, Damaged if it is not as it was written."""
        if not folder.is_dir():
            raise Mistake(f"there is no checkpoint {folder}; give auto, or the folder of one")
        sha256 = verify(folder)
        state = RunState.model_validate_json((folder / STATE).read_text())
        return cls(folder=folder.resolve(), state=state, sha256=sha256)


class CheckpointFolder:
    """The checkpoints that a run has, to be read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint; None without any. Raises Damaged with the newest whole one before it."""
        pointer = self._folder / LATEST
        if not pointer.exists() and not self._all():
            return None
        # A run may have been killed after its first checkpoint was put in its place and before the pointer was.
        text = pointer.read_text(errors="replace") if pointer.exists() else self._all()[-1].name
        name, _, sha256 = text.strip().partition(" ")
        try:
            if not (self._folder / name).is_dir():
                raise Damaged(f"{pointer} names {name!r}, which is not there")
            checkpoint = Checkpoint.open(self._folder / name)
            if pointer.exists() and checkpoint.sha256 != sha256:
                raise Damaged(f"{pointer} is not as it was written")
        except Damaged as error:
            raise Damaged(f"{error}; {self._advice(self._folder / name)}") from error
        return checkpoint

    def chosen(self, resume: Literal["never", "auto"] | Path, steps: int) -> Checkpoint | None:
        """The checkpoint that a run of `steps` steps is to resume from; None for none. Raises ValueError if it is
        missing or damaged, or if no step is left."""
        if isinstance(resume, Path):
            if resume.resolve().parent != self._folder and self._all():
                raise Mistake(f"{self._folder} has checkpoints of its own; resume from these, or give another name")
            checkpoint = Checkpoint.open(resume)
            if checkpoint.state.step >= steps:
                raise Mistake(f"{resume} is of step {checkpoint.state.step}; give steps a larger number")
            return checkpoint
        return self.latest() if resume == "auto" else None

    def best(self) -> Checkpoint | None:
        """The checkpoint with the highest score, the newest of equals; None if none has a score."""
        return Checkpoint.open(best[0]) if (best := self._best(1)) else None

    def at(self, step: int) -> Checkpoint:
        """The checkpoint of a step."""
        return Checkpoint.open(self._path(step))

    def steps(self) -> list[int]:
        """The steps that have a checkpoint."""
        return [_step(path) for path in self._all()]

    def holds(self, checkpoint: Checkpoint) -> bool:
        """Whether a checkpoint lies in this folder."""
        return checkpoint.folder.parent == self._folder

    def _best(self, count: int) -> list[Path]:
        scores = {path: score for path in self._all() if (score := _score(path)) is not None}
        return sorted(scores, key=lambda path: (scores[path], path.name), reverse=True)[:count]

    def _advice(self, damaged: Path) -> str:
        """What to resume from instead."""
        found = self._all()
        for path in reversed(found[: found.index(damaged)] if damaged in found else found):
            try:
                return f"the newest whole one before it is resume={Checkpoint.open(path).folder}"
            except Damaged:
                continue
        return "there is no whole one before it, so begin again under another name"

    def _all(self) -> list[Path]:
        return sorted(self._folder.glob("step-" + 6 * "[0-9]")) if self._folder.is_dir() else []

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step:06d}"


@dataclass(frozen=True, kw_only=True)
class _Begun:
    """A checkpoint that the learner is still writing."""

    state: RunState
    config: str
    aside: Path


class Checkpoints(CheckpointFolder):
    """The checkpoints of a run that is under way, and the learner that writes them."""

    def __init__(
        self,
        folder: Path,
        learner: Learner,
        *,
        keep: int,
        keep_best: int,
        every: Every = "auto",
        now: Callable[[], float] = time.monotonic,
        hold: Callable[[], None] = lambda: None,
        disk: Disk | None = None,
    ) -> None:
        """keep: so many of the newest stay, and beside them the `keep_best` with the highest scores. every: steps
        between two; 0 for none but the last; "auto" by time, which `now` tells in seconds. hold: called before
        anything is changed; raises where the folder is another's by now."""
        super().__init__(folder)
        self._learner, self._keep, self._keep_best = learner, keep, keep_best
        self._every, self._now, self._hold, self._disk = every, now, hold, disk or Disk()
        self._last, self._cost = now(), 0.0
        self._begun: _Begun | None = None
        self.placed: Checkpoint | None = None
        """The checkpoint that was last put in its place."""

    def due(self, step: int) -> bool:
        """Whether one is to be written after a step, by number or by time."""
        if self._every == "auto":
            return self._now() - self._last >= max(PERIOD, WORTH * self._cost)
        return self._every > 0 and step % self._every == 0

    def save(self, state: RunState, config: str) -> None:
        """Begin to write a checkpoint, once the one before is in its place. config: the run's, as YAML."""
        began = self._now()
        self.saved(wait=True)
        self._hold()
        aside = _aside(self._path(state.step))
        self._disk.remove(aside)
        self._disk.make_folder(aside)
        self._learner.save(aside)
        self._begun = _Begun(state=state, config=config, aside=aside)
        self._last = self._now()
        self._cost = self._last - began

    def saved(self, *, wait: bool = False) -> None:
        """Put what `save` began in its place, if all of it is written, or once it is. Here a checkpoint becomes
        visible. Raises what stopped the writing."""
        if self._begun is None or (files := self._learner.saved(wait=wait)) is None:
            return
        self._hold()
        begun, self._begun = self._begun, None
        self._place(begun, files)
        self._prune()

    def newest(self) -> Checkpoint | None:
        """The newest of those that were put in their place, after the learner died; what it was writing is given up.
        None before the first: what the folder holds then may be later than what the run resumed from."""
        self._begun = None
        return self.latest() if self.placed else None

    def load(self, checkpoint: Checkpoint) -> None:
        """Let the learner go on from a checkpoint, this run's or another's. Later ones stay until `rewind`."""
        self._learner.load(checkpoint.folder)

    def rewind(self, step: int) -> None:
        """Remove the checkpoints after the step that the run resumes from."""
        later = [path for path in self._all() if _step(path) > step]
        if later and self._path(step).exists():
            self._point(self._path(step))
        for path in later:
            self._drop(path)

    def _place(self, begun: _Begun, files: Mapping[str, FileRecord]) -> None:
        own = {STATE: begun.state.model_dump_json(indent=1), "config.yaml": begun.config}
        records = {name: write_durably(self._disk, begun.aside / name, text.encode()) for name, text in own.items()}
        # The manifest comes after all that it lists, the folder's name after the manifest, and the pointer last: what
        # is seen at any moment is whole.
        write_durably(self._disk, begun.aside / MANIFEST, manifest({**files, **records}))
        self._disk.sync(begun.aside)
        target = self._path(begun.state.step)
        self._disk.rename(begun.aside, target)
        self._disk.sync(self._folder)
        self._point(target)
        self.placed = Checkpoint(folder=target, state=begun.state, sha256=manifest_digest(target))

    def _point(self, target: Path) -> None:
        """Let `latest` name a checkpoint."""
        pointer = f"{target.name} {manifest_digest(target)}\n"
        replace_durably(self._disk, self._folder / LATEST, pointer.encode())

    def _prune(self) -> None:
        best = self._best(self._keep_best)
        for path in self._all()[: -self._keep]:
            if path not in best:
                self._drop(path)

    def _drop(self, path: Path) -> None:
        # Renamed first, so that a half-removed folder is never taken for a checkpoint.
        self._disk.rename(path, _aside(path))
        self._disk.remove(_aside(path))


def export(checkpoint: Checkpoint, out: Path, *, part: str = "model") -> None:
    """Write a checkpoint's model as an ordinary Hugging Face folder, or its adapter as one of peft's, over one that is
    there."""
    source = checkpoint.folder / part
    with written_aside(out) as aside:
        aside.mkdir()
        for path in sorted(source.rglob("*")):
            target = aside / path.relative_to(source)
            target.mkdir() if path.is_dir() else shutil.copyfile(path, target)


def export_run(run: Path, step: int | None, out: Path, *, adapter: bool = False) -> Checkpoint:
    """`medreasoner export RUN [--step N] --out DIR`: the checkpoint whose model was written. step: None for the newest.
    adapter: the adapter alone. Raises ValueError where there is no such checkpoint, it is damaged, or has no adapter,
    and where `out` exists."""
    checkpoints = CheckpointFolder(run / "checkpoints")
    there = checkpoints.steps()
    if not there or (step is not None and step not in there):
        raise Mistake(f"{run} has no such checkpoint; those there are of steps {', '.join(map(str, there)) or 'none'}")
    if out.exists():
        raise Mistake(f"{out} exists; give another folder")
    checkpoint = checkpoints.latest() if step is None else checkpoints.at(step)
    assert checkpoint is not None
    if adapter and not (checkpoint.folder / "adapter").is_dir():
        raise Mistake(f"{run} trained no adapter (learner.lora); leave --adapter out")
    export(checkpoint, out, part="adapter" if adapter else "model")
    return checkpoint


def _aside(path: Path) -> Path:
    """Where a folder is written or removed: a fixed name, because the ranks of several processes write into it."""
    return path.with_name(f".{path.name}.part")


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _score(path: Path) -> float | None:
    """None for a damaged one too: it is refused only when somebody asks for it."""
    try:
        return RunState.model_validate_json((path / STATE).read_bytes()).score
    except (OSError, ValidationError):
        return None
