"""What training and supervised fine-tuning share: the step count, the position in the data, checkpoints."""

import time
from collections.abc import Callable, Sequence

from actors.pools import RankPool
from cluster.checkpoints import Checkpoint, CheckpointFolder, Checkpoints, RunState, export
from cluster.config import LearningConfig
from cluster.run_folder import RunFolder
from umrg.mistake import Mistake
from umrg.shuffling import Cursor


def checkpoint_to_resume(config: LearningConfig, run: RunFolder) -> Checkpoint | None:
    """The checkpoint that the configuration asks to go on from; None for none. Raises ValueError as
    `CheckpointFolder.chosen` does."""
    return CheckpointFolder(run.checkpoints).chosen(config.resume, config.steps)


def refuse_other_rows(checkpoint: Checkpoint | None, run: RunFolder, rows: int) -> None:
    """Raise ValueError where the run had another number of rows when its checkpoint was written. rows: those now, those
    left out not counted."""
    if checkpoint is None or not CheckpointFolder(run.checkpoints).holds(checkpoint):
        return
    if checkpoint.state.rows not in (None, rows):
        raise Mistake(
            f"the run has {rows} rows and had {checkpoint.state.rows} when {checkpoint.folder.name} was written, among "
            "which its position in the data is; resume with the files and the limits on tokens of then"
        )


class Loop:
    """One run from its first step, or the one after a checkpoint, to its last."""

    def __init__(
        self,
        config: LearningConfig,
        run: RunFolder,
        learner: RankPool,
        *,
        rows: int,
        keep_best: int,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """rows: of the data, those left out not counted."""
        self.config, self.run, self._row_count = config, run, rows
        self.checkpoints = Checkpoints(
            run.checkpoints,
            learner,
            keep=config.keep,
            keep_best=keep_best,
            every=config.checkpoint_every,
            now=now,
            hold=run.hold,
        )
        self.cursor = Cursor(seed=config.seed)
        """Position in the shuffled data."""
        self.step = 0
        """Steps taken so far."""

    @property
    def at_end(self) -> bool:
        """All steps are taken."""
        return self.step >= self.config.steps

    def due(self, every: int) -> bool:
        """Whether an action of every N steps is due after this one. every: N; 0 for never."""
        return every > 0 and self.step % every == 0

    def resume(self, checkpoint: Checkpoint | None) -> int:
        """Resume from a checkpoint, if there is one. Returns how many bytes of metrics.jsonl to keep: 0 for the
        checkpoint of another run, whose metrics are not this run's. The caller drops what came later, once nothing can
        refuse the checkpoint any more."""
        if checkpoint is None:
            self.step, self.cursor = 0, Cursor(seed=self.config.seed)
            return 0
        self.checkpoints.load(checkpoint)
        self.step, self.cursor = checkpoint.state.step, checkpoint.state.cursor
        return checkpoint.state.metrics if self.checkpoints.holds(checkpoint) else 0

    def save_if_due(self, score: float | None, *, at_once: bool = False, ahead: Sequence[Sequence[int]] = ()) -> None:
        """Begin to write a checkpoint of everything that the next step depends on, if one is due; otherwise put the one
        under way in its place if it is written. score, ahead: as in `RunState`. at_once: even if none is due."""
        if at_once or self.at_end or self.checkpoints.due(self.step):
            position = self.run.metrics_position()
            state = RunState(
                step=self.step,
                cursor=self.cursor,
                metrics=position,
                score=score,
                rows=self._row_count,
                ahead=[list(rows) for rows in ahead],
            )
            self.checkpoints.save(state, (self.run.path / "config.yaml").read_text(encoding="utf-8"))
        else:
            self.checkpoints.saved()

    def export_model(self, resumed: Checkpoint | None, *, best: bool = False) -> Checkpoint:
        """Export a checkpoint's model as the run's: the newest one's or, if no step was left to take, that of the one
        resumed from; with `best`, that with the highest score."""
        self.checkpoints.saved(wait=True)
        chosen = self.checkpoints.best() if best else self.checkpoints.placed or resumed
        assert chosen is not None, "the last step has a checkpoint"
        export(chosen, self.run.model)
        return chosen
