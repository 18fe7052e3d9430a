"""Checkpoints of a run: `checkpoints/step-NNNNNN/`, each whole or not there."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from actors.pools import LearnerPool
from umrg.atomic import written_aside
from umrg.shuffling import Cursor

_STATE = "state.json"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """step: taken so far. cursor: where the data goes on. folder: the learner's state."""

    folder: Path
    step: int
    cursor: Cursor


class Checkpoints:
    """The newest `keep` checkpoints in a folder."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        self._folder, self._keep = folder, keep

    def save(self, step: int, cursor: Cursor, learner: LearnerPool) -> None:
        with written_aside(self._folder / f"step-{step:06d}") as aside:
            aside.mkdir()
            learner.save_state(aside.resolve())
            learner.save_model(aside.resolve() / "model")
            state = {"step": step, "cursor": cursor.model_dump()}
            (aside / _STATE).write_text(json.dumps(state, indent=2) + "\n")
        for old in self._all()[: -self._keep]:
            shutil.rmtree(old)

    def newest(self) -> Checkpoint | None:
        """The newest one; None where there is none."""
        if not (found := self._all()):
            return None
        state = json.loads((found[-1] / _STATE).read_text())
        return Checkpoint(folder=found[-1].resolve(), step=state["step"], cursor=Cursor.model_validate(state["cursor"]))

    def _all(self) -> list[Path]:
        return sorted(self._folder.glob("step-*")) if self._folder.is_dir() else []
