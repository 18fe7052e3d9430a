"""The training job: `medreasoner train CONFIG [key=value …]`, the same as `python -m cluster.train CONFIG …`.

rows ──Group──► rollouts ──GroupSamples──► segmenters ──ScoredGroup──► learner
                   ▲                                                      │
                   └───────────── weights, checksum, canary ──────────────┘
"""

import math
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from actors.experts.registry import licence_line
from actors.learner_rank import LearnerRank
from actors.pools import LearnerDied
from cluster.checkpoints import Checkpoint
from cluster.cli import run_command
from cluster.colocation import Colocation
from cluster.commands.doctor_demand import demand, parameters
from cluster.config import TrainConfig, load_config
from cluster.data import open_rows
from cluster.direct_transfer import DirectTransfer
from cluster.display import Display
from cluster.evaluation import Collecting, evaluate, evaluation_groups
from cluster.fetching import fetched
from cluster.hiring import ActorSpec
from cluster.journal import Journal
from cluster.loop import Loop, checkpoint_to_resume, refuse_other_rows
from cluster.placement import alone
from cluster.run_folder import RunFolder
from cluster.scaling import Autoscaler, Scaling, Wishes
from cluster.steps_ahead import StepsAhead
from cluster.timesheet import Timesheet, cache_metrics
from cluster.trackers import Trackers
from cluster.weight_sync import EVERY, Canary, publish, settle, sync_weights, tend
from cluster.workers import Workers, ranks, ray_connection, rollouts, segmenters, started
from learner.config import LearnerTask
from umrg.dataset import Dataset
from umrg.group import Group
from umrg.mistake import Mistake
from umrg.sample import Sample
from umrg.shuffling import batches


def train(config: TrainConfig) -> RunFolder:
    """Run the job. The trained model is left in the run folder's `model/`."""
    with ExitStack() as stack:
        run = stack.enter_context(RunFolder.begun(config.runs / config.name, config, resume=config.resume != "never"))
        config = fetched(config)
        checkpoint = checkpoint_to_resume(config, run)
        display = stack.enter_context(Display(config))
        trackers = stack.enter_context(Trackers(run, config, display.warning))
        journal = stack.enter_context(Journal(run, trackers))
        with display.waiting("reading data"), journal.clock.phase("data"):
            rows, held_out, lengths = open_rows(config, run, display.console)
        for name, each in lengths.items():
            display.note(f"{name}: {each}")
        refuse_other_rows(checkpoint, run, len(rows))
        journal.facts["prompts"] = {name: asdict(each) for name, each in lengths.items()}
        stack.enter_context(ray_connection())
        listed = actors(config, run.path)
        display.note(licence_line(config.expert, config.segmenter.checkpoint))
        if remark := idle_segmenters(config, listed):
            display.warning(remark)
        with display.waiting("starting actors"), journal.clock.phase("start"):
            workers = stack.enter_context(started(listed, config))
        stack.enter_context(run.telling())
        Training(config, run, workers, journal, display, rows, held_out).go(checkpoint)
    return run


def actors(config: TrainConfig, run: Path | None = None) -> list[ActorSpec]:
    """The actors of a training run: the learner's ranks, which are the hardest to place, rollouts, and segmenters. run:
    its folder; None if no checkpoint is written."""
    spec = config.spec()
    task = LearnerTask(
        model=config.model,
        spec=spec,
        updates=config.updates,
        seed=config.seed,
        temperature=config.rollout.temperature,
        max_tokens=config.rollout.max_tokens,
        run=run,
        resume=config.resume if isinstance(config.resume, Path) else None,
    )
    return [
        *ranks(LearnerRank, config.learner, task, image_tokens=config.image_tokens, colocated=config.colocated),
        *rollouts(config.model, config.engines, spec, demand(config, parameters(config.model)).weights),
        *segmenters(config.expert, config.segmenter, config.reward.scorer(think=spec.think), spec),
    ]


def idle_segmenters(config: TrainConfig, listed: Sequence[ActorSpec]) -> str | None:
    """A remark where segmenters have GPUs for themselves, and the reward looks at no mask; None otherwise."""
    idle = alone("segmenter", [actor.bundle for actor in listed], colocated=config.colocated)
    if not idle or config.reward.scorer(think=config.spec().think).uses_mask:
        return None
    gpus = "a GPU" if idle == 1 else f"{idle} GPUs"
    found = f"the reward looks at no mask, and segmenters have {gpus} for themselves, idle but for evaluations; "
    rollout, beside = config.rollout, math.ceil(config.segmenter.actors / config.rollout.actors)
    if rollout.tensor_parallel > 1 or beside > 4:
        return found + "set segmenter.num_gpus to 0, and they work on CPUs"
    return (
        f"{found}set rollout.num_gpus to {1 - 0.1 * beside:g} and segmenter.num_gpus to 0.1, with a lower "
        "rollout.gpu_memory, and they lie beside the engines"
    )


class Training(Loop):
    """A GRPO run."""

    config: TrainConfig

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
        clock = journal.clock
        super().__init__(config, run, workers.learner, rows=len(rows), keep_best=config.keep_best, now=clock.now)
        self.workers = workers
        self.journal, self.display, self.rows, self.held_out = journal, display, rows, held_out
        self.canary = Canary(rows[0], config)
        self.colocation = Colocation(workers, config.deadlines) if config.colocated else None
        bounds = {"rollout": config.rollout.autoscale, "segmenter": config.segmenter.autoscale}
        self.timesheet = Timesheet(clock, (workers.rollouts, workers.segmenters), ranks=config.learner.ranks)
        self.scaling = Scaling(
            Wishes(run.path),
            {role: Autoscaler(role, each) for role, each in bounds.items() if each},
            workers.wanted,
            display.note,
        )
        self.sampling = config.rollout.sampling(seed=config.seed)
        self.ahead = StepsAhead(
            draw=self.draw,
            begin=self.begin,
            tend=partial(tend, workers),
            turn=workers.calls.turn,
            batch=config.batch,
            retries=config.dynamic_sampling_retries,
            staleness=config.staleness,
            last=config.steps - 1,
        )
        workers.learner.meanwhile = self.ahead.attend
        workers.direct = DirectTransfer(workers.learner, config) if config.transfer != "host" else None
        self.resumed = False
        """Whether engines may hold other modules of which nothing learns than the learner."""
        self.told = 0
        """Groups that were put aside so far."""
        journal.facts["engines"] = [asdict(engine) for engine in workers.engines]

    def go(self, checkpoint: Checkpoint | None) -> None:
        """Resume or begin, take all steps, and leave model, summary and report behind. Where the learner dies, it is
        started again and goes on from the newest checkpoint, `restarts` times."""
        for left in range(self.config.restarts, -1, -1):
            try:
                if left < self.config.restarts:
                    if self.colocation:
                        self.colocation.before_restart()
                    self.workers.restart_learner(self.config.deadlines.start)
                self.take_all_steps(checkpoint)
                break
            except LearnerDied as error:
                if left == 0:
                    raise
                self.display.warning(f"{error}; the learner starts again")
                self.ahead.restore([])
                if self.workers.direct:
                    self.workers.direct.forget()
                checkpoint = self.checkpoints.newest() or checkpoint
        self.workers.check_expert()
        if self.workers.put_aside:
            self.journal.facts["put_aside"] = self.workers.put_aside
        self.display.improvement(self.journal.finish(self.held_out))
        self.display.advice()

    def take_all_steps(self, checkpoint: Checkpoint | None) -> None:
        """From a checkpoint, or from the first step, to the exported model."""
        self.resume(checkpoint)
        clock = self.journal.clock
        if self.config.evaluation.before and not self.journal.has_evaluation("before"):
            self.evaluate_held_out("before")
        while not self.at_end:
            self.take_step()
            if self.due(self.config.evaluation.every) and not self.at_end:
                self.evaluate_held_out(f"step-{self.step:06d}")
            with clock.phase("checkpoint"):
                self.save_if_due(self.journal.score(), ahead=self.ahead.rows())
        self.evaluate_held_out("after")
        with clock.phase("save"):
            self.export_model(checkpoint)

    def take_step(self) -> None:
        """Sample and score, learn, sync weights, record."""
        phase = self.timesheet.phase
        groups, resampled = self.ahead.collect(self.step, phase=phase, meanwhile=self.meanwhile)
        while self.told < len(self.workers.put_aside):
            self.display.warning(f"put aside: {self.workers.put_aside[self.told]}")
            self.told += 1
        with phase("learn"):
            work = [self.config.learner.work(group.scored) for group in groups]
            if self.colocation:
                self.colocation.before_learning()
            report = self.workers.learner.update([group.refs for group in groups], work)
        self.step += 1
        with phase("sync"):
            gap = self.sync()
        scored = [group.scored for group in groups]
        roles = {**self.timesheet.lap(), **cache_metrics(self.workers.segmenters.cache_use())}
        metrics = self.journal.step(self.step, scored, report, canary_gap=gap, resampled=resampled, roles=roles)
        self.display.step(self.step, metrics)
        self.scaling.follow(metrics)
        self.warn()

    def warn(self) -> None:
        """Show what is alarming, each once."""
        if self.workers.direct and (given_up := self.workers.direct.given_up):
            self.journal.alarms["transfer"] = given_up
        for alarm in self.journal.alarms.values():
            self.display.warning(alarm)

    def sync(self) -> float | None:
        """Give the rollouts the new weights. Returns the canary's gap; None where it was not asked, because the learner
        would have to wait for rollouts that are yet sampling with older weights."""
        if self.config.staleness == 0:
            self.send_weights()
            return self.canary.check(self.workers)
        publish(self.workers, version=self.step, everything=self.resumed)
        if self.step % EVERY != 1:
            return None
        settle(self.workers, one=True)
        return self.canary.check(self.workers)

    def meanwhile(self) -> None:
        """What is looked at every second while groups are sampled and scored."""
        self.checkpoints.saved()
        self.scaling.heed()

    def draw(self, count: int) -> list[int]:
        """Numbers of the next rows of the data."""
        rows, self.cursor = next(batches(self.rows, count, self.cursor))
        return rows

    def begin(self, step: int, first: int, rows: Sequence[int], aside: int) -> Collecting:
        """Rows as groups of a step, with indices from `first` on, on their way to be sampled and scored. aside: groups
        of the step that were put aside."""
        groups = [
            Group(run=self.config.name, step=step, index=first + i, sample=sample)
            for i, sample in enumerate(self.rows.samples(rows))
        ]
        tolerated = self.config.tolerated_failures * self.config.batch - aside
        return Collecting(self.workers, groups, self.sampling, "reward", tolerated=tolerated)

    def evaluate_held_out(self, name: str) -> None:
        """Evaluate on the held-out rows, and record it under a name."""
        settle(self.workers)
        with self.display.waiting(f"evaluating {name}"), self.journal.clock.phase("evaluate"):
            evaluation = evaluate(
                self.workers,
                evaluation_groups(self.held_out),
                replace(self.sampling, n=self.config.evaluation.n),
            )
        self.workers.segmenters.cache_use()  # of the evaluation, which is no part of a step
        self.journal.evaluation(name, self.step, evaluation)
        self.display.evaluation(name, evaluation.summary())

    def send_weights(self, *, everything: bool = False) -> None:
        """Send engines the weights of this step; where they share the learner's GPUs, they wake for it. everything: as
        for `sync_weights`."""
        if self.colocation:
            self.colocation.after_learning(lambda: sync_weights(self.workers, version=self.step, everything=True))
        else:
            sync_weights(self.workers, version=self.step, everything=everything)

    def resume(self, checkpoint: Checkpoint | None) -> int:
        """As `Loop.resume`; the rollouts get the checkpoint's weights, and the journal drops later records."""
        position = super().resume(checkpoint)
        # Those of another run's checkpoint are rows of other data.
        own = checkpoint is not None and self.checkpoints.holds(checkpoint)
        self.ahead.restore(checkpoint.state.ahead if checkpoint and own else [])
        self.resumed = checkpoint is not None
        begun = self.resumed or self.workers.rollouts.weights is not None
        if begun or self.colocation:  # engines that slept while ranks loaded have no weights
            self.send_weights(everything=True)
        if begun:
            self.display.resumed(self.step)
        self.journal.rewind(self.step, position)
        self.checkpoints.rewind(self.step)
        self.canary.check(self.workers)
        return position


def main(arguments: list[str]) -> None:
    if not arguments:
        raise Mistake("usage: python -m cluster.train CONFIG [key=value …]")
    run = train(load_config(TrainConfig, Path(arguments[0]), arguments[1:]))
    print(f"the run lies in {run.path}; open {run.path / 'report' / 'index.html'}")


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
