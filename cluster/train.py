"""The training job: `medreasoner train CONFIG [key=value …]`, the same as `python -m cluster.train CONFIG …`.

rows ──Group──► rollouts ──GroupSamples──► segmenters ──ScoredAnswer──► learner
                   ▲                                                       │
                   └────────────── weights, digest, canary ────────────────┘
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from cluster.broadcast import Canary, broadcast
from cluster.checkpoints import Checkpoints
from cluster.cli_frame import run_command
from cluster.config import TrainConfig, load_config
from cluster.data import open_rows
from cluster.display import Display
from cluster.evaluation import evaluate, questions
from cluster.experience import Draw, gain
from cluster.journal import Journal
from cluster.run_folder import RunFolder
from cluster.workers import Workers, cluster, started
from umrg.atomic import written_aside
from umrg.dataset import Dataset
from umrg.group import Group
from umrg.sample import Sample
from umrg.shuffling import Cursor, batches


def train(config: TrainConfig) -> RunFolder:
    """Run the job; the trained model lies in the run folder's `model/`."""
    with ExitStack() as stack:
        folder = config.runs / config.name
        run = stack.enter_context(RunFolder.begun(folder, config, resume=config.resume == "auto"))
        journal = stack.enter_context(Journal(run, config))
        display = stack.enter_context(Display(config))
        with display.waiting("reading data"), journal.clock.phase("data"):
            rows, held_out = open_rows(config, run)
        stack.enter_context(cluster())
        with display.waiting("starting actors"), journal.clock.phase("start"):
            workers = stack.enter_context(started(config, run.path))
        Training(config, run, workers, journal, display, rows, held_out).go()
    return run


class Training:
    """One run from its first step, or the one after its newest checkpoint, to its last."""

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
        self.checkpoints = Checkpoints(run.checkpoints, keep=config.keep)
        self.canary = Canary(rows[0], config)
        self.draw = Draw(
            n=config.rollout.n,
            temperature=config.rollout.temperature,
            max_tokens=config.rollout.max_tokens,
            run_seed=config.seed,
        )
        self.cursor = Cursor(seed=config.seed)
        self.step = 0

    def go(self) -> None:
        """Resume or begin, take all steps, and leave model, summary and report behind."""
        self.resume()
        if self.config.evaluation.before and not self.journal.has_evaluation("before"):
            self.measure("before")
        for groups in self.groups():
            self.take_step(groups)
            if self.due(self.config.checkpoint_every) or self.step == self.config.steps:
                self.save()
            if self.due(self.config.evaluation.every) and self.step < self.config.steps:
                self.measure(f"step-{self.step:06d}")
        self.measure("after")
        with self.journal.clock.phase("save"), written_aside(self.run.model) as aside:
            self.workers.learner.save_model(aside.resolve())
        self.workers.check_expert()
        self.display.gain(self.journal.finish(self.held_out))

    def take_step(self, groups: list[Group]) -> None:
        """Sample, score, learn, hand on."""
        clock = self.journal.clock
        experience = gain(self.workers, groups, self.draw, clock)
        with clock.phase("learn"):
            report = self.workers.learner.update(
                [each.ref for each in experience],
                [each.samples for each in experience],
                [each.rewards for each in experience],
            )
        self.step += 1
        with clock.phase("sync"):
            broadcast(self.workers, version=self.step)
            gap = self.canary.check(self.workers)
        metrics = self.journal.step(self.step, experience, report, canary_gap=gap)
        self.display.step(self.step, metrics)

    def groups(self) -> Iterator[list[Group]]:
        """The groups of each step that is still to be taken."""
        for step, (rows, cursor) in zip(
            range(self.step, self.config.steps), batches(self.rows, self.config.batch, self.cursor), strict=False
        ):
            self.cursor = cursor
            samples = self.rows.samples(rows)
            yield [Group(run=self.config.name, step=step, index=i, sample=sample) for i, sample in enumerate(samples)]

    def measure(self, name: str) -> None:
        """Evaluate on the held-out rows, under a name."""
        with self.display.waiting(f"evaluating {name}"), self.journal.clock.phase("evaluate"):
            evaluation = evaluate(
                self.workers,
                questions(self.held_out),
                n=self.config.evaluation.n,
                temperature=self.config.rollout.temperature,
                max_tokens=self.config.rollout.max_tokens,
            )
        self.journal.evaluation(name, self.step, evaluation)
        self.display.evaluation(name, evaluation.summary())

    def due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def save(self) -> None:
        """Write a checkpoint of everything that the next step depends on."""
        with self.journal.clock.phase("checkpoint"):
            self.checkpoints.save(self.step, self.cursor, self.workers.learner)

    def resume(self) -> None:
        """Go on from the newest checkpoint, if the run has one; the rollouts then get its weights."""
        if state := self.checkpoints.newest():
            self.workers.learner.load_state(state.folder)
            self.step, self.cursor = state.step, state.cursor
            broadcast(self.workers, version=self.step)
            self.display.resumed(self.step)
        self.journal.rewind(self.step)
        self.canary.check(self.workers)


def main(arguments: list[str]) -> None:
    if not arguments:
        raise ValueError("usage: python -m cluster.train CONFIG [key=value …]")
    run = train(load_config(TrainConfig, Path(arguments[0]), arguments[1:]))
    print(f"the run lies in {run.path}; open {run.path / 'report' / 'index.html'}")


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
