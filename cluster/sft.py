"""The supervised job: `medreasoner sft CONFIG [key=value …]`, the same as `python -m cluster.sft CONFIG …`.

images, each with the samples that ask about it ──► learner's ranks ──► checkpoints ──► model
                                                        └─ every N steps: loss on the held-out images
"""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import numpy as np

from actors.learner_rank import SupervisedRank
from actors.pools import SupervisedPool
from cluster.checkpoints import Checkpoint
from cluster.cli import run_command
from cluster.config import SftConfig, load_config
from cluster.data import opened
from cluster.display import progress
from cluster.fetching import fetched
from cluster.hiring import ActorSpec
from cluster.lengths import RowLimit, fitting
from cluster.loop import Loop, checkpoint_to_resume, refuse_other_rows
from cluster.report import write_supervised_report
from cluster.run_folder import SUMMARY, RunFolder
from cluster.trackers import Trackers
from cluster.workers import ranks, ray_connection, started_supervised
from learner.config import LearnerTask
from reasoner.prompter import load_prompter
from umrg.dataset import Dataset
from umrg.mistake import Mistake
from umrg.rows import reasoning_fault
from umrg.sample import Sample
from umrg.shuffling import batches

VALIDATION = "validation/loss"
_SHOWN = ("learner/loss", VALIDATION)
"""Metrics shown beside the progress, each with its latest value."""


def sft(config: SftConfig) -> RunFolder:
    """Fine-tune a reasoner. The model is left in the run folder's `model/`."""
    with ExitStack() as stack:
        run = stack.enter_context(RunFolder.begun(config.runs / config.name, config, resume=config.resume != "never"))
        config = fetched(config)
        checkpoint = checkpoint_to_resume(config, run)
        images = Images(config)
        print(images.lengths, flush=True)
        run.tell(prompts=asdict(images.lengths))
        trackers = stack.enter_context(Trackers(run, config, lambda text: print(f"warning: {text}", flush=True)))
        refuse_other_rows(checkpoint, run, images.lengths.rows)
        stack.enter_context(ray_connection())
        print("starting the learner", flush=True)
        learner = stack.enter_context(started_supervised(actors(config, run.path), config))
        stack.enter_context(run.telling())
        Finetuning(config, run, learner, images, trackers).go(checkpoint)
    return run


def actors(config: SftConfig, run: Path) -> list[ActorSpec]:
    """The actors of a supervised run: its ranks."""
    task = LearnerTask(
        model=config.model,
        spec=config.spec(),
        updates=config.steps,
        seed=config.seed,
        run=run,
        resume=config.resume if isinstance(config.resume, Path) else None,
    )
    return ranks(SupervisedRank, config.learner, task, image_tokens=config.image_tokens)


class Images:
    """The rows of a run by image, divided into training and held-out images."""

    def __init__(self, config: SftConfig) -> None:
        self._dataset = opened(config.data.train, config.data)
        if config.spec().think:
            _refuse_unteachable(self._dataset)
        prompter, most = load_prompter(config.model, config.spec()), config.learner.micro_batch_tokens
        limit = RowLimit(prompter, most, "learner.micro_batch_tokens", answers=True)
        self._dataset, self.lengths = fitting(self._dataset, limit, config.data.overlong)
        images = self._dataset.rows_by_image()
        held_out = round(config.validation * len(images))
        if config.validation and not 0 < held_out < len(images):
            raise Mistake(
                f"validation={config.validation:g} of {len(images)} images leaves none on one side; give another share"
            )
        order = np.random.default_rng(config.seed).permutation(len(images)).tolist()
        self.held_out = [images[i] for i in sorted(order[:held_out])]
        self.learnt = [images[i] for i in sorted(order[held_out:])]

    def load(self, images: Sequence[Sequence[int]]) -> list[list[Sample]]:
        """The samples of images, which are given as lists of row indices."""
        # Rows were grouped by image path; only equal bytes make them the same image.
        together: dict[bytes, list[Sample]] = {}
        for sample in self._dataset.samples([row for rows in images for row in rows]):
            together.setdefault(sample.image_bytes, []).append(sample)
        return list(together.values())


def _refuse_unteachable(dataset: Dataset) -> None:
    for info, reasoning in dataset.reasonings():
        if fault := reasoning_fault(reasoning):
            raise Mistake(f"row {info.row} ({info.id!r}) of {info.file} has {fault}")


class Finetuning(Loop):
    """A supervised run."""

    config: SftConfig

    def __init__(
        self, config: SftConfig, run: RunFolder, learner: SupervisedPool, images: Images, trackers: Trackers
    ) -> None:
        super().__init__(config, run, learner, rows=images.lengths.rows, keep_best=1)
        self.learner, self.images, self.trackers = learner, images, trackers
        self.validations: list[float] = []

    def go(self, checkpoint: Checkpoint | None) -> None:
        """Resume or begin, take all steps, and leave the best model behind; without validation that is the last one."""
        started = time.monotonic()
        self.resume(checkpoint)
        shown: dict[str, str] = {}
        with progress("sft", self.config.steps, done=self.step, unit="steps") as show:
            for images in self.batches():
                line = self.take_step(images)
                shown |= {name: f"{name} {line[name]:.4f}" for name in _SHOWN if name in line}
                show(self.step, "  ".join(shown.values()), at_once=VALIDATION in line)
        chosen = self.export_model(checkpoint, best=bool(self.images.held_out))
        seconds = {"sft": round(time.monotonic() - started, 2)}
        facts = {"steps": self.step, "model_of_step": chosen.state.step, "seconds": seconds}
        write_supervised_report(self.run, {**(self.run.read_json(SUMMARY) or {}), **facts})
        # Last, because it declares the run complete.
        self.run.tell("ended", **facts)

    def batches(self) -> Iterator[list[list[Sample]]]:
        """The images of each step that is still to be taken."""
        for rows, cursor in batches(self.images.learnt, self.config.batch, self.cursor):
            if self.finished():
                return
            self.cursor = cursor
            yield self.images.load([self.images.learnt[i] for i in rows])

    def finished(self) -> bool:
        """All steps are taken, or the validation loss has stopped improving."""
        return self.at_end or out_of_patience(self.validations, self.config.patience)

    def take_step(self, images: list[list[Sample]]) -> dict[str, float]:
        """Learn, validate if due, record, save if due. Returns the metrics by name."""
        line = {f"learner/{name}": value for name, value in asdict(self.learner.update(images)).items()}
        self.step += 1
        if self.images.held_out and (self.at_end or self.due(self.config.validate_every)):
            line[VALIDATION] = self.validate()
            self.validations.append(line[VALIDATION])
        self.run.log({"step": self.step, **line})
        self.trackers.log(self.step, line)
        lowest = VALIDATION in line and line[VALIDATION] == min(self.validations)
        score = -line[VALIDATION] if VALIDATION in line else None
        self.save_if_due(score, at_once=lowest)
        return line

    def validate(self) -> float:
        """Mean negative log-likelihood per token of the answers about the held-out images, in nats."""
        held_out, batch = self.images.held_out, self.config.batch
        parts = [self.learner.loss(self.images.load(held_out[i : i + batch])) for i in range(0, len(held_out), batch)]
        return sum(loss for loss, _ in parts) / sum(tokens for _, tokens in parts)

    def resume(self, checkpoint: Checkpoint | None) -> int:
        """As `Loop.resume`; the validation losses so far are read from the metrics."""
        position = super().resume(checkpoint)
        if checkpoint:
            print(f"resumed after step {self.step}", flush=True)
        self.run.rewind(self.step, position)
        self.trackers.rewind(self.step)
        self.checkpoints.rewind(self.step)
        self.validations = [line[VALIDATION] for line in self.run.metrics() if VALIDATION in line]
        return position


def out_of_patience(validations: Sequence[float], patience: int | None) -> bool:
    """Whether the last `patience` validation losses were all no lower than the lowest before them."""
    if patience is None or not validations:
        return False
    return len(validations) - 1 - int(np.argmin(validations)) >= patience


def main(arguments: list[str]) -> None:
    if not arguments:
        raise Mistake("usage: python -m cluster.sft CONFIG [key=value …]")
    run = sft(load_config(SftConfig, Path(arguments[0]), arguments[1:]))
    print(f"the model lies in {run.model}; open {run.report / 'index.html'}")


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
