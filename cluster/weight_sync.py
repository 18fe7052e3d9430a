"""Weights from the learner to every rollout, and the proof that they arrived and are used."""

from collections.abc import Sequence

import numpy as np
import ray

from actors.pool import Member
from cluster.config import TrainConfig
from cluster.workers import Workers
from umrg.group import Group, SamplingParams
from umrg.sample import Sample

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.15}
"""Largest mean difference of log-probs, in nats, that is put down to the different arithmetic of engine and learner.
Stale weights or caches make 0.1 and more in float32."""

TOKENS = 24


class WeightsDiffer(RuntimeError):
    """A rollout engine does not compute with the learner's weights."""


def sync_weights(workers: Workers, *, version: int, everything: bool = False) -> None:
    """Send the learner's weights to every rollout that works; others get them before they begin. everything: those of
    modules of which nothing learns too, for engines that may hold others. Raises WeightsDiffer if other tensors arrive
    than were sent, or if an engine's live parameters are others after the update."""
    workers.version = version
    _send(workers, workers.rollouts.ready, everything=everything)


def tend(workers: Workers) -> None:
    """Start the actors that are missing, drain those that are too many, and let those that are loaded work: a rollout
    with the learner's weights, which it is sent here."""
    workers.rollouts.reconcile(workers.wanted["rollout"])
    workers.segmenters.reconcile(workers.wanted["segmenter"])
    if workers.hiring:
        workers.hiring.remind()
    for member in workers.segmenters.loaded:
        assert member.said == workers.expert_digest, f"{member.name} holds another expert than the others"
        workers.segmenters.admit(member.name)
    if joining := workers.rollouts.loaded:
        if workers.version > 0:
            _send(workers, joining, everything=True)
        for member in joining:
            workers.rollouts.admit(member.name)


def _send(workers: Workers, members: Sequence[Member], *, everything: bool) -> None:
    version = workers.version
    checksum, buckets = workers.learner.weights(everything=everything)
    for name, receipt in workers.rollouts.update_weights(version, buckets, members).items():
        if receipt.checksum != checksum:
            raise WeightsDiffer(
                f"weights of version {version} arrived at {name} with checksum {receipt.checksum[:12]}, not "
                f"{checksum[:12]}"
            )
        if receipt.unlike:
            raise WeightsDiffer(
                f"after the update to version {version} {receipt.unlike[0]} of {name} holds other weights than were "
                f"sent ({len(receipt.unlike)} of {receipt.compared} parameters compared)"
            )


class Canary:
    """One fixed prompt that every engine answers after each update; its log-probs must equal the learner's. Because
    prompt and image were seen before, a cache that was not reset shows up."""

    def __init__(self, sample: Sample, config: TrainConfig) -> None:
        self._group = ray.put(Group(run="canary", step=0, index=0, sample=sample).without_masks())
        self._sampling = SamplingParams(n=1, temperature=config.rollout.temperature, max_tokens=TOKENS, seed=0)
        exact = config.rollout.dtype == config.learner.dtype == "float32"
        self._tolerance = TOLERANCE["float32" if exact else "bfloat16"]

    def check(self, workers: Workers) -> float:
        """Let every engine answer, and return the largest mean difference of log-probs from the learner's. Raises
        WeightsDiffer above the tolerance."""
        worst = 0.0
        for answer in workers.rollouts.canary(self._group, self._sampling):
            (completion,) = answer.completions
            expected = workers.learner.logprobs(self._group, completion.token_ids)
            gap = float(np.abs(np.subtract(completion.logprobs, expected)).mean())
            worst = max(worst, gap)
            if not gap <= self._tolerance:
                raise WeightsDiffer(
                    f"after weights of version {completion.policy_version} an engine's log-probs are {gap:.3g} nats "
                    f"off the learner's (at most {self._tolerance:g}): it computes with stale weights or caches"
                )
        return worst
