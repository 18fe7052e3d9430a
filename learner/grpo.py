"""GRPO on one rank: a step's groups in, updated weights out.

    groups of this rank ──encode──► rows of micro_batch_tokens ──scores, token_losses, backward──► step

A step's groups make one or more mini-batches, an update each. At the first, the policy that learns is the one that
sampled, so its own log-probs are the old ones; those of later mini-batches are computed before it moves.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import distributed

from learner.config import LearnerConfig
from learner.objective import TokenLosses, Tokens, Totals, token_losses
from learner.scored_group import LearnerGroup, ScoredGroup, counts, encode_group
from learner.shared_prefix import micro_batches
from learner.update_report import UpdateReport
from learner.zero import ZeroRank


@dataclass(kw_only=True)
class _MiniBatch:
    """rows: of this rank. rounds: forward passes that every rank makes. old: log-probs of each row's tokens under the
    policy that sampled; None where that is the one that learns."""

    rows: list[list[LearnerGroup]]
    rounds: int
    old: list[torch.Tensor] | None = None


class GrpoRank:
    """All ranks call `update`, each given all groups and taking its own.

    model: folder of the model that the run began with, for the divergence from it. longest: tokens that an answer may
    have.
    """

    def __init__(self, zero: ZeroRank, config: LearnerConfig, model: Path, *, longest: int) -> None:
        self._zero, self._config, self._longest = zero, config, longest
        self._reference = zero.frozen_copy(model) if config.objective.kl > 0 else None

    def update(self, groups: Sequence[ScoredGroup]) -> UpdateReport:
        """Learn from a step's groups. Raises FloatingPointError where the loss is no longer finite."""
        size = self._config.mini_batch or len(groups)
        batches = [self._mini_batch(groups[start : start + size]) for start in range(0, len(groups), size)]
        for batch in batches[1:]:
            batch.old = self._old_logprobs(batch, groups[0])
        sums, norm = _Sums(), 0.0
        for batch in batches:
            self._accumulate(batch, groups[0], sums)
            sums.check()
            norm = self._zero.step()
        return UpdateReport(
            **sums.means(),
            grad_norm=norm,
            lr=self._zero.lr,
            tokens=sum(group.tokens for group in groups),
            updates=len(batches),
        )

    def _mini_batch(self, groups: Sequence[ScoredGroup]) -> _MiniBatch:
        """This rank's share. A group without spread is left out where nothing but its advantages would teach."""
        rank, ranks = distributed.get_rank(), distributed.get_world_size()
        objective = self._config.objective
        counted = [answer for group in groups for answer in group.completions if counts(answer, objective)]
        tokens = sum(len(answer.token_ids) for answer in counted)
        totals = Totals(tokens=max(1, tokens), answers=max(1, len(counted)), longest=self._longest)
        own = [encode_group(self._zero.reasoner, group, objective, totals) for group in groups[rank::ranks]]
        telling = [group for group in own if objective.kl > 0 or objective.entropy > 0 or group.advantages.any()]
        rows = micro_batches(telling, self._config.micro_batch_tokens)
        rounds = torch.tensor(len(rows))
        distributed.all_reduce(rounds, op=distributed.ReduceOp.MAX)
        return _MiniBatch(rows=rows, rounds=max(1, int(rounds)))

    @torch.no_grad()
    def _old_logprobs(self, batch: _MiniBatch, filler: ScoredGroup) -> list[torch.Tensor]:
        rows = self._filled(batch, filler)
        return [self._zero.scores([group.branches for group in row]).logprobs for row in rows]

    def _accumulate(self, batch: _MiniBatch, filler: ScoredGroup, sums: "_Sums") -> None:
        """Gradients of a mini-batch."""
        for i, row in enumerate(self._filled(batch, filler)):
            packed = self._zero.packed([group.branches for group in row])
            scores = self._zero.engine(packed)
            reference = None
            if self._reference is not None:
                with torch.no_grad():
                    reference = self._reference(packed).logprobs
            tokens = Tokens(
                logprobs=scores.logprobs,
                entropy=scores.entropy,
                old_logprobs=scores.logprobs.detach() if batch.old is None else batch.old[i],
                engine_logprobs=self._joined([group.engine_logprobs for group in row]),
                advantages=self._joined([group.advantages for group in row]),
                answer=packed.branch,
                reference_logprobs=reference,
            )
            losses = token_losses(tokens, self._config.objective)
            weights = self._joined([group.weights for group in row])
            self._zero.backward((losses.loss * weights).sum(), last=i == batch.rounds - 1)
            sums.add(tokens, losses, weights)

    def _filled(self, batch: _MiniBatch, filler: ScoredGroup) -> list[list[LearnerGroup]]:
        """As many rows as the rank with the most has; those that are too few count nothing."""
        missing = batch.rounds - len(batch.rows)
        if not missing:
            return batch.rows
        totals = Totals(tokens=1, answers=1, longest=1)
        group = encode_group(self._zero.reasoner, filler, self._config.objective, totals)
        idle = replace(group, weights=torch.zeros_like(group.weights)).split(self._config.micro_batch_tokens)[0]
        return [*batch.rows, *[[idle]] * missing]

    def _joined(self, values: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat(list(values)).to(self._zero.device)


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
