"""Folders of runs as their drivers leave them, without any driver: what reads a run's folder is tested on these."""

from collections.abc import Sequence
from pathlib import Path

from cluster.config import EvaluateConfig, SftConfig, TrainConfig
from cluster.records import Results, as_results, write_records
from cluster.run_folder import RunFolder
from phantoms import rows
from rewards.answer_metrics import METRICS
from rewards.scored import ScoredAnswer, ScoredGroup
from rewards.scoring import Reward
from umrg.answers import Answer, Form
from umrg.dataset import Dataset
from umrg.dataset_writer import write_rows
from umrg.frames import Frames
from umrg.group import Completion, Group, GroupSamples
from umrg.masks import encode_rle
from umrg.sample import Sample


def drawn_rows(path: Path, count: int, seed: int = 3) -> list[Sample]:
    """Phantoms in a file, read again."""
    write_rows(path, rows(count, seed=seed, modalities=["CT"], queries_per_image=1))
    return list(Dataset.open(path))


def answered(sample: Sample, *, dice: float, n: int = 1) -> ScoredGroup:
    """A row with n answers, whose box, points and mask are those of the reference and whose metrics are all `dice`."""
    answer = Answer(think="It lies there.", form=Form.CORRECT, box=sample.box, points=sample.points, strict=True)
    scored = ScoredAnswer(
        reward=Reward(total=dice, parts={"mask_dice": dice}),
        answer=answer,
        failure=None,
        metrics=dict.fromkeys(METRICS, dice),
        mask=encode_rle(sample.mask()),
        expert_score=dice,
    )
    completion = Completion(text="", token_ids=(1,), logprobs=(-0.5,), policy_version=0, finished=True)
    return ScoredGroup(
        group=Group(run="trial", step=0, index=0, sample=sample),
        samples=GroupSamples(
            prompt_ids=(1, 2),
            frames=Frames(original=sample.size, model=sample.size),
            completions=(completion,) * n,
        ),
        answers=(scored,) * n,
    )


def trained(config: TrainConfig, samples: Sequence[Sample], *, steps: int, after: int | None = None) -> RunFolder:
    """A training run of so many steps, evaluated before it and after step `after`."""
    run = RunFolder.create(config.runs / config.name, config)
    evaluations = {"before": (0, 0.25)} | ({} if after is None else {f"step-{after:06d}": (after, 0.75)})
    for step in range(1, steps + 1):
        run.log({"step": step, "reward/total": 0.5, "answers/iou": 0.5, "seconds/rollout": 1.0, "learner/kl": 0.0})
    figures = {name: {"step": step, "greedy": told(dice, len(samples))} for name, (step, dice) in evaluations.items()}
    run.write_json("evaluations.json", figures)
    for name, (_, dice) in evaluations.items():
        write_records(run.samples / f"{name}-greedy.parquet", [answered(sample, dice=dice) for sample in samples])
    return run


def told(dice: float, count: int) -> dict[str, float]:
    return {**dict.fromkeys(("dice", "iou", "pdice", "well_formed"), dice), "n": count}


def tuned(config: SftConfig, *, steps: int) -> RunFolder:
    """A supervised run of so many steps, validated at the last."""
    run = RunFolder.create(config.runs / config.name, config)
    for step in range(1, steps + 1):
        last = {"validation/loss": 0.5} if step == steps else {}
        run.log({"step": step, "learner/loss": 1 / step, "learner/grad_norm": 1.0, "learner/lr": 1e-4, **last})
    return run


def evaluated(config: EvaluateConfig, samples: Sequence[Sample], *, dice: float = 0.5) -> RunFolder:
    """An evaluation that has answered these rows, and has not ended."""
    run = RunFolder.create(config.runs / config.name, config)
    groups = [answered(sample, dice=dice) for sample in samples]
    sampled = [answered(sample, dice=dice, n=config.n) for sample in samples] if config.n else []
    Results(run.path / "results.jsonl", n=config.n).add(
        [*as_results(groups, "greedy"), *as_results(sampled, "sampled")]
    )
    return run
