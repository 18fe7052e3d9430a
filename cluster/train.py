"""The training job: `medreasoner train CONFIG [key=value …]`, the same as `python -m cluster.train CONFIG …`.

rows ──Group──► rollouts ──GroupSamples──► segmenters ──ScoredAnswer──► learner
                   ▲                                                       │
                   └────────────── weights, digest, canary ────────────────┘
"""

import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from actors.learner_rank import LearnerRank
from cluster.checkpoints import Checkpoint, Checkpoints, RunState, export
from cluster.cli import run_command
from cluster.config import TrainConfig, config_text, load_config
from cluster.data import open_rows
from cluster.display import Display
from cluster.evaluation import Collected, collect, evaluate, questions
from cluster.journal import Clock, Journal
from cluster.run_folder import RunFolder
from cluster.weight_sync import Canary, sync_weights
from cluster.workers import ActorSpec, Workers, cluster, ranks, rollouts, segmenters, started
from learner.config import LearnerTask
from umrg.dataset import Dataset
from umrg.group import Group
from umrg.sample import Sample
from umrg.shuffling import Cursor, batches


def train(config: TrainConfig) -> RunFolder:
    """Run the job; the trained model lies in the run folder's `model/`."""
    with ExitStack() as stack:
        run = stack.enter_context(RunFolder.begun(config.runs / config.name, config, resume=config.resume != "never"))
        checkpoint = checkpoints_of(config, run).chosen(config.resume, config.steps)
        journal = stack.enter_context(Journal(run, config))
        display = stack.enter_context(Display(config))
        with display.waiting("reading data"), journal.clock.phase("data"):
            rows, held_out = open_rows(config, run)
        stack.enter_context(cluster())
        with display.waiting("starting actors"), journal.clock.phase("start"):
            workers = stack.enter_context(started(actors(config, run.path), config))
        stack.enter_context(run.telling())
        Training(config, run, workers, journal, display, rows, held_out).go(checkpoint)
    return run


def actors(config: TrainConfig, run: Path | None = None) -> list[ActorSpec]:
    """The actors of a training run: the learner's ranks, the hardest to place, then rollouts, then segmenters. run: its
    folder; None where no checkpoint is written."""
    spec = config.spec()
    task = LearnerTask(
        model=config.model,
        spec=spec,
        updates=config.updates,
        seed=config.seed,
        temperature=config.rollout.temperature,
        max_tokens=config.rollout.max_tokens,
        run=run,
    )
    return [
        *ranks(LearnerRank, config.learner, task),
        *rollouts(config.model, config.rollout, spec),
        *segmenters(config.expert, config.segmenter, config.reward.scorer(think=spec.think), spec),
    ]


def checkpoints_of(config: TrainConfig, run: RunFolder, clock: Clock | None = None) -> Checkpoints:
    return Checkpoints(
        run.checkpoints,
        keep=config.keep,
        keep_best=config.keep_best,
        every=config.checkpoint_every,
        now=(clock or Clock()).now,
        hold=run.hold,
    )


class Training:
    """One run from its first step, or the one after a checkpoint, to its last."""

    def __init__(
        self,
        config: TrainConfig,
        run: RunFolder,
        workers: Workers,
        journal: Journal,
        display: Display,
        rows: Dataset,
        held_out: list[Sample],
    ) -> None:
        self.config, self.run, self.workers = config, run, workers
        self.journal, self.display, self.rows, self.held_out = journal, display, rows, held_out
        self.checkpoints = checkpoints_of(config, run, journal.clock)
        self.canary = Canary(rows[0], config)
        self.sampling = config.rollout.sampling(seed=config.seed)
        self.cursor = Cursor(seed=config.seed)
        self.step = 0

    def go(self, checkpoint: Checkpoint | None) -> None:
        """Resume or begin, take all steps, and leave model, summary and report behind."""
        self.resume(checkpoint)
        if self.config.evaluation.before and not self.journal.has_evaluation("before"):
            self.measure("before")
        while self.step < self.config.steps:
            self.take_step()
            if self.due(self.config.evaluation.every) and self.step < self.config.steps:
                self.measure(f"step-{self.step:06d}")
            self.checkpoint()
        self.measure("after")
        self.leave_model(checkpoint)
        self.workers.check_expert()
        self.display.improvement(self.journal.finish(self.held_out))

    def take_step(self) -> None:
        """Sample, score, learn, hand on."""
        clock = self.journal.clock
        groups, resampled = self.collect()
        with clock.phase("learn"):
            report = self.workers.learner.update([group.refs for group in groups])
        self.step += 1
        with clock.phase("sync"):
            sync_weights(self.workers, version=self.step)
            gap = self.canary.check(self.workers)
        scored = [group.scored for group in groups]
        metrics = self.journal.step(self.step, scored, report, canary_gap=gap, resampled=resampled)
        self.display.step(self.step, metrics)

    def collect(self) -> tuple[list[Collected], int]:
        """A step's groups, sampled and scored, and how many zero-variance groups gave way to fresh ones
        (dynamic sampling: DAPO, Yu et al. 2025, arXiv:2503.14476)."""
        kept: list[Collected] = []
        asked = 0
        for _ in range(self.config.dynamic_sampling_retries + 1):
            fresh = self.groups(self.config.batch - len(kept), first=asked)
            asked += len(fresh)
            collected = collect(
                self.workers,
                fresh,
                self.sampling,
                "reward",
                phase=self.journal.clock.phase,
                meanwhile=self.place_checkpoint,
            )
            kept += [group for group in collected if not group.scored.zero_variance]
            zero_variance = [group for group in collected if group.scored.zero_variance]
            if not zero_variance:
                break
        # What no retry made up for is kept as it is, so that every step has as many groups.
        kept += zero_variance[: self.config.batch - len(kept)]
        return kept, asked - len(kept)

    def groups(self, count: int, first: int) -> list[Group]:
        """The next rows of the data, as groups of this step from an index on."""
        rows, self.cursor = next(batches(self.rows, count, self.cursor))
        return [
            Group(run=self.config.name, step=self.step, index=first + i, sample=sample)
            for i, sample in enumerate(self.rows.samples(rows))
        ]

    def measure(self, name: str) -> None:
        """Evaluate on the held-out rows, under a name."""
        with self.display.waiting(f"evaluating {name}"), self.journal.clock.phase("evaluate"):
            evaluation = evaluate(
                self.workers,
                questions(self.held_out),
                replace(self.sampling, n=self.config.evaluation.n),
            )
        self.journal.evaluation(name, self.step, evaluation)
        self.display.evaluation(name, evaluation.summary())

    def due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def checkpoint(self) -> None:
        """Begin to write a checkpoint of everything that the next step depends on, where one is due; put the one begun
        before in its place as soon as it is written."""
        with self.journal.clock.phase("checkpoint"):
            if self.checkpoints.due(self.step) or self.step == self.config.steps:
                state = RunState(
                    step=self.step, cursor=self.cursor, metrics=self.journal.position(), score=self.journal.score()
                )
                self.checkpoints.begin(state, config_text(self.config), self.workers.learner)
            else:
                self.place_checkpoint()

    def place_checkpoint(self) -> None:
        """Put the checkpoint that was begun in its place, if it is written by now."""
        self.checkpoints.poll(self.workers.learner)

    def resume(self, checkpoint: Checkpoint | None) -> None:
        """Go on from a checkpoint, if there is one; the rollouts then get its weights."""
        position = 0
        if checkpoint:
            self.workers.learner.load(checkpoint.folder)
            self.step, self.cursor = checkpoint.state.step, checkpoint.state.cursor
            if checkpoint.folder.parent == self.run.checkpoints.resolve():
                position = checkpoint.state.metrics
            sync_weights(self.workers, version=self.step)
            self.display.resumed(self.step)
        self.journal.rewind(self.step, position)
        self.checkpoints.rewind(self.step)
        self.canary.check(self.workers)

    def leave_model(self, resumed: Checkpoint | None) -> None:
        """The newest checkpoint's model becomes the run's; where no step was left to take, that of the one resumed."""
        with self.journal.clock.phase("save"):
            self.checkpoints.finish(self.workers.learner)
            newest = self.checkpoints.placed or resumed
            assert newest is not None and newest.state.step == self.step, "the last step has a checkpoint"
            export(newest, self.run.model)


def main(arguments: list[str]) -> None:
    if not arguments:
        raise ValueError("usage: python -m cluster.train CONFIG [key=value …]")
    run = train(load_config(TrainConfig, Path(arguments[0]), arguments[1:]))
    print(f"the run lies in {run.path}; open {run.path / 'report' / 'index.html'}")


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
