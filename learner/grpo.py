"""GRPO on one rank: a step's groups in, updated weights out.

    groups of this rank ──encode──► packed sequences of micro_batch_tokens ──scores, token_losses, backward──► step

A step's groups make one or more mini-batches, an update each. At the first, the policy that learns is the one that
sampled, so its own log-probs are the old ones; those of later mini-batches are computed before it moves.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import distributed

from learner.config import LearnerConfig
from learner.encoding import EncodedGroup, counts, encode_group
from learner.objective import TokenLosses, Tokens, Totals, token_losses
from learner.shared_prefix import micro_batches
from learner.update_report import UpdateReport
from learner.zero import ZeroRank
from rewards.scored import ScoredGroup

Fetch = Callable[[int], ScoredGroup]
"""A group of the step by its index, with the row's image."""


@dataclass(kw_only=True)
class _MiniBatch:
    """This rank's share of the groups of one update."""

    sequences: list[list[EncodedGroup]]
    """Packed sequences, as many as every rank has; the last ones may be idle and count nothing."""
    tokens: int
    """Of all completions of all ranks."""
    old: list[torch.Tensor] | None = None
    """Log-probs of each sequence's tokens under the policy that sampled; None where that is the one that learns."""


class GrpoRank:
    """All ranks call `update`, each taking its own of the step's groups."""

    def __init__(self, zero: ZeroRank, config: LearnerConfig) -> None:
        self._zero, self._config = zero, config
        self._reference = zero.frozen_copy() if config.objective.kl > 0 else None

    def update(self, count: int, fetch: Fetch) -> UpdateReport:
        """Learn from a step's groups, `count` of them. Raises FloatingPointError where the loss is no longer finite."""
        size = self._config.mini_batch or count
        batches = [self._mini_batch(range(start, min(start + size, count)), fetch) for start in range(0, count, size)]
        for batch in batches[1:]:
            batch.old = self._old_logprobs(batch)
        sums, norm = _Sums(), 0.0
        for batch in batches:
            self._accumulate(batch, sums)
            sums.check()
            norm = self._zero.step()
        return UpdateReport(
            **sums.means(),
            grad_norm=norm,
            lr=self._zero.lr,
            tokens=sum(batch.tokens for batch in batches),
            updates=len(batches),
        )

    def _mini_batch(self, indices: range, fetch: Fetch) -> _MiniBatch:
        """This rank's share. A zero-variance group is left out where nothing but its advantages would teach."""
        rank, ranks = distributed.get_rank(), distributed.get_world_size()
        objective = self._config.objective
        own = [fetch(i) for i in indices[rank::ranks]]
        counted = [each for group in own for each in group.samples.completions if counts(each, objective)]
        sums = (sum(len(each.token_ids) for each in counted), len(counted), sum(group.tokens for group in own))
        counted_tokens, answers, tokens = _over_ranks(sums, distributed.ReduceOp.SUM)
        totals = Totals(tokens=max(1, counted_tokens), answers=max(1, answers), longest=self._zero.task.max_tokens)
        encoded = [encode_group(self._zero.reasoner, group, objective, totals) for group in own]
        telling = [group for group in encoded if objective.kl > 0 or objective.entropy > 0 or group.advantages.any()]
        sequences = micro_batches(telling, self._config.micro_batch_tokens)
        (most,) = _over_ranks([len(sequences)], distributed.ReduceOp.MAX)
        if missing := max(1, most) - len(sequences):
            sequences += [self._idle(own[0] if own else fetch(indices[0]))] * missing
        return _MiniBatch(sequences=sequences, tokens=tokens)

    def _idle(self, group: ScoredGroup) -> list[EncodedGroup]:
        """A sequence that counts nothing, for a rank that has fewer than others: all make the same calls."""
        totals = Totals(tokens=1, answers=1, longest=1)
        encoded = encode_group(self._zero.reasoner, group, self._config.objective, totals)
        weightless = replace(encoded, weights=torch.zeros_like(encoded.weights))
        return weightless.split(self._config.micro_batch_tokens)[:1]

    @torch.no_grad()
    def _old_logprobs(self, batch: _MiniBatch) -> list[torch.Tensor]:
        return [self._zero.scores([group.branches for group in row]).logprobs for row in batch.sequences]

    def _accumulate(self, batch: _MiniBatch, sums: "_Sums") -> None:
        """Gradients of a mini-batch."""
        for i, sequence in enumerate(batch.sequences):
            packed = self._zero.packed([group.branches for group in sequence])
            scores = self._zero.engine(packed)
            reference = None
            if self._reference is not None:
                with torch.no_grad():
                    reference = self._reference(packed).logprobs
            tokens = Tokens(
                logprobs=scores.logprobs,
                entropy=scores.entropy,
                old_logprobs=scores.logprobs.detach() if batch.old is None else batch.old[i],
                engine_logprobs=self._joined([group.engine_logprobs for group in sequence]),
                advantages=self._joined([group.advantages for group in sequence]),
                answer=packed.branch,
                reference_logprobs=reference,
            )
            losses = token_losses(tokens, self._config.objective)
            weights = self._joined([group.weights for group in sequence])
            self._zero.backward((losses.loss * weights).sum(), last=i == len(batch.sequences) - 1)
            sums.add(tokens, losses, weights)

    def _joined(self, values: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat(list(values)).to(self._zero.device)


def _over_ranks(values: Sequence[int], operation: Any) -> list[int]:
    """Numbers of this rank, summed or compared with those of the others."""
    reduced = torch.tensor(values)
    distributed.all_reduce(reduced, op=operation)
    return [int(value) for value in reduced]


class _Sums:
    """What an update's report is made of, summed over the tokens that count, of all ranks."""

    def __init__(self) -> None:
        self._loss = torch.zeros((), dtype=torch.float64)
        self._sums = torch.zeros(7, dtype=torch.float64)

    def add(self, tokens: Tokens, losses: TokenLosses, weights: torch.Tensor) -> None:
        log_ratio = tokens.old_logprobs - tokens.engine_logprobs
        watched = (
            torch.ones_like(weights),
            losses.kl,
            losses.clipped,
            tokens.entropy.detach(),
            log_ratio.abs(),
            log_ratio.exp() - log_ratio - 1,
            losses.truncated,
        )
        self._loss += (losses.loss.detach() * weights).double().sum().cpu()
        self._sums += (torch.stack(watched).double() @ (weights > 0).double()).cpu()

    def check(self) -> None:
        """On all ranks alike, raise FloatingPointError where the loss is no longer finite."""
        finite = torch.tensor(float(torch.isfinite(self._loss)))
        distributed.all_reduce(finite, op=distributed.ReduceOp.MIN)
        if not finite:
            raise FloatingPointError("the loss is no longer finite; lower learner.lr")

    def means(self) -> dict[str, float]:
        """The loss, and the means of what is watched; all ranks."""
        everything = torch.cat([self._loss[None], self._sums])
        distributed.all_reduce(everything)
        loss, count, *sums = everything.tolist()
        names = ("kl", "clipped", "entropy", "engine_gap", "engine_kl", "truncated")
        return {"loss": loss, **{name: value / max(1.0, count) for name, value in zip(names, sums, strict=True)}}
