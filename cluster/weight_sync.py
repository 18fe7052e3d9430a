"""Weights from the learner to every rollout, and the proof that they arrived and are used.

    learner ──publish──► Weights ──tend──► each rollout, once it has ended what it has ──► works again

`settle` waits until all work with them, as a synchronous step does. Where steps overlap nobody waits: the rollouts take
them over one after another while the learner goes on.
"""

import numpy as np
import ray

from actors.engine_report import UpdateReceipt
from actors.failures import TransferFailed
from actors.pools import LearnerDied, Weights
from cluster.config import TrainConfig
from cluster.direct_transfer import DirectTransfer
from cluster.workers import Workers
from umrg.group import Group, SamplingParams
from umrg.sample import Sample

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.15}
"""Largest mean difference of log-probs, in nats, that is put down to the different arithmetic of engine and learner.
Stale weights or caches make 0.1 and more in float32."""

TOKENS = 24
EVERY = 10
"""Where steps overlap, an engine is asked about the first version, and about each so many-th after it."""


class WeightsDiffer(RuntimeError):
    """A rollout engine does not compute with the learner's weights."""


def publish(workers: Workers, *, version: int, everything: bool = False) -> None:
    """Make the learner's weights those that rollouts are to work with. Where weights go from GPU to GPU, those that
    work have them when it returns; where that fails, they go through host memory. everything: those of modules of
    which nothing learns too, for engines that may hold others. Raises WeightsDiffer as `tend` does."""
    rollouts = workers.rollouts
    if before := rollouts.weights:
        before.buckets = None  # two versions may be more than the object store holds
    if workers.direct is None or not _sent_directly(workers, workers.direct, version, everything=everything):
        rollouts.weights = workers.learner.weights(version, everything=everything)


def _sent_directly(workers: Workers, direct: DirectTransfer, version: int, *, everything: bool) -> bool:
    """Send weights to the rollouts that work, all at once, whatever they are at. Those that can do nothing more after a
    transfer that failed are given up."""
    rollouts, members = workers.rollouts, workers.rollouts.ready
    if direct.given_up or not members or any(member.taking for member in members):
        return False
    try:
        sent = direct.send(version, members, everything=everything)
    except (TransferFailed, LearnerDied) as error:
        for name, cause in direct.abandon(members).items():
            workers.calls.gone(name, cause)
            rollouts.died(name, cause)
        if isinstance(error, LearnerDied):
            raise
        print(f"{error}; the weights go through host memory", flush=True)
        return False
    weights = Weights(version=version, checksum=sent.checksum, buckets=None)
    for member in members:
        check_receipt(member.name, weights, sent.receipts[member.name])
        member.holds = weights
    rollouts.weights = weights
    return True


def settle(workers: Workers, *, one: bool = False) -> None:
    """Wait until all rollouts that work do so with the published weights; those that start get them before they begin.
    one: until a single one does. Raises WeightsDiffer as `tend` does."""
    while True:
        tend(workers)
        rollouts = workers.rollouts
        behind = [each for each in rollouts if each.state in ("loaded", "ready") and not rollouts.renewed(each)]
        if not behind or (one and any(map(rollouts.renewed, rollouts.ready))):
            return
        workers.calls.turn()


def sync_weights(workers: Workers, *, version: int, everything: bool = False) -> None:
    """Publish the learner's weights, wait until all rollouts work with them, and clear them from the object store."""
    publish(workers, version=version, everything=everything)
    settle(workers)
    if weights := workers.rollouts.weights:
        weights.buckets = None


def tend(workers: Workers) -> None:
    """Start the actors that are missing, drain those that are too many, send the published weights to rollouts that
    hold others and have nothing to do, and let those work that hold them. Raises WeightsDiffer, here or in the turn
    that follows, if other tensors arrive than were sent, or if an engine's live parameters are others afterwards."""
    workers.rollouts.reconcile(workers.wanted["rollout"])
    workers.segmenters.reconcile(workers.wanted["segmenter"])
    if workers.hiring:
        workers.hiring.remind()
    for member in workers.segmenters.loaded:
        assert member.said == workers.expert_digest, f"{member.name} holds another expert than the others"
        workers.segmenters.admit(member.name)
    weights = workers.rollouts.weights
    if weights and weights.buckets is None and workers.rollouts.waiting and not workers.learner.busy:
        # For those that join, and where they were lost on their way. One that joins may hold other frozen modules than
        # the learner, which a run that resumed got.
        again = workers.learner.weights(weights.version, everything=True)
        weights.checksum, weights.buckets = again.checksum, again.buckets
    workers.rollouts.renew(check_receipt)


def check_receipt(name: str, sent: Weights, receipt: UpdateReceipt) -> None:
    """Raises WeightsDiffer if a rollout received other weights than were sent, or holds others."""
    if receipt.checksum != sent.checksum:
        raise WeightsDiffer(
            f"weights of version {sent.version} arrived at {name} with checksum {receipt.checksum[:12]}, not "
            f"{sent.checksum[:12]}"
        )
    if receipt.unlike:
        raise WeightsDiffer(
            f"after the update to version {sent.version} {receipt.unlike[0]} of {name} holds other weights than were "
            f"sent ({len(receipt.unlike)} of {receipt.compared} parameters compared)"
        )


class Canary:
    """One fixed prompt that engines answer after an update; its log-probs must equal the learner's. Because prompt and
    image were seen before, a cache that was not reset shows up."""

    def __init__(self, sample: Sample, config: TrainConfig) -> None:
        self._group = ray.put(Group(run="canary", step=0, index=0, sample=sample).without_masks())
        self._sampling = SamplingParams(n=1, temperature=config.rollout.temperature, max_tokens=TOKENS, seed=0)
        exact = config.rollout.dtype == config.learner.dtype == "float32"
        self._tolerance = TOLERANCE["float32" if exact else "bfloat16"]

    def check(self, workers: Workers) -> float | None:
        """Let every engine that works with the published weights answer, and return the largest mean difference of
        log-probs from the learner's, which must not have moved since; None where none works. Raises WeightsDiffer above
        the tolerance."""
        worst = None
        for answer in workers.rollouts.canary(self._group, self._sampling):
            (completion,) = answer.completions
            expected = workers.learner.logprobs(self._group, completion.token_ids)
            gap = float(np.abs(np.subtract(completion.logprobs, expected)).mean())
            worst = max(worst or 0.0, gap)
            if not gap <= self._tolerance:
                raise WeightsDiffer(
                    f"after weights of version {completion.policy_version} an engine's log-probs are {gap:.3g} nats "
                    f"off the learner's (at most {self._tolerance:g}): it computes with stale weights or caches"
                )
        return worst
