"""GRPO on one rank: a step's groups in, updated weights out.

    groups of this rank ──encode──► packed sequences of micro_batch_tokens ──scores, token_losses, backward──► step

A packed sequence is a micro-batch; gradients are accumulated over those of a mini-batch, and each mini-batch makes one
update. The old log-probs are those of the policy before the step: at the first update that is the learning policy
itself, so they are its own, detached; those of later mini-batches are computed before the first update moves it. Where
steps overlap, an earlier version sampled; its log-probs are the engine's (`learner.objective`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from learner.collectives import Ranks
from learner.config import LearnerConfig, ObjectiveConfig
from learner.encoding import EncodedGroup, encode_group, in_loss
from learner.objective import TokenLosses, Tokens, Totals, token_losses
from learner.reference import reference_of
from learner.shared_prefix import PackedSequence, micro_batches, shares
from learner.update_report import UpdateReport
from learner.zero import ZeroRank
from rewards.scored import ScoredGroup

Fetch = Callable[[int], ScoredGroup]
"""Returns a group of the step, with its image, by its index."""
Losses = Callable[[Tokens, ObjectiveConfig], TokenLosses]
"""The per-token losses of a micro-batch."""


@dataclass(kw_only=True)
class _MiniBatch:
    """This rank's share of the groups of one update."""

    sequences: list[list[EncodedGroup]]
    """Packed sequences, as many as every rank has; the last ones may be idle, with weights of 0."""
    tokens: int
    """Of all completions, over all ranks."""
    old: list[torch.Tensor] | None = None
    """Log-probs of each sequence's tokens under the policy before the step; None if that is the learning policy
    itself."""
    reference: list[torch.Tensor] | None = None
    """The same under the reference model; None without a KL term."""


class GrpoRank:
    """A rank that learns by GRPO. All ranks call `update`, and each takes its own share of the step's groups."""

    def __init__(self, zero: ZeroRank, config: LearnerConfig, losses: Losses = token_losses) -> None:
        self._zero, self._config, self._losses = zero, config, losses
        self._reference = reference_of(zero, config) if config.objective.kl > 0 else None

    def update(self, work: Sequence[int], fetch: Fetch) -> UpdateReport:
        """Learn from the groups of a step. work: `LearnerConfig.work` of each. Raises FloatingPointError if the loss is
        not finite."""
        size = self._config.mini_batch or len(work)
        batches = [self._mini_batch(start, work[start : start + size], fetch) for start in range(0, len(work), size)]
        if self._reference is not None:
            with self._reference() as logprobs:
                for batch in batches:
                    batch.reference = [logprobs(self._packed(groups)) for groups in batch.sequences]
        for batch in batches[1:]:
            batch.old = self._old_logprobs(batch)
        sums, norm = _Sums(self._zero.ranks), 0.0
        for batch in batches:
            self._accumulate(batch, sums)
            # Before the step: a loss that is not finite must not reach the weights.
            sums.check()
            norm = self._zero.step()
        return UpdateReport(
            **sums.means(),
            grad_norm=norm,
            lr=self._zero.lr,
            tokens=sum(batch.tokens for batch in batches),
            updates=len(batches),
        )

    def _mini_batch(self, start: int, work: Sequence[int], fetch: Fetch) -> _MiniBatch:
        """This rank's share of the groups from `start` on. Zero-variance groups, whose advantages are all 0, are left
        out if nothing else in the objective has a gradient; they still count in the denominators."""
        ranks = self._zero.ranks
        objective, budget = self._config.objective, self._config.micro_batch_tokens
        own = [fetch(start + i) for i in shares(work, ranks.count)[ranks.rank]]
        included = [each for group in own for each in group.samples.completions if in_loss(each, objective)]
        included_tokens, answers, tokens = ranks.summed(
            sum(len(each.token_ids) for each in included), len(included), sum(group.tokens for group in own)
        )
        # At least 1: overlong filtering may leave nothing, and the weights then multiply zeros.
        totals = Totals(tokens=max(1, included_tokens), answers=max(1, answers), max_tokens=self._zero.task.max_tokens)

        def encoded(group: ScoredGroup) -> EncodedGroup:
            return encode_group(self._zero.reasoner, group, objective, totals)

        def idle() -> list[EncodedGroup]:
            return [encoded(own[0] if own else fetch(start)).idle(budget)]

        groups = [each for each in map(encoded, own) if objective.everything_learns or each.advantages.any()]
        return _MiniBatch(sequences=ranks.with_idle(micro_batches(groups, budget), idle), tokens=tokens)

    @torch.no_grad()
    def _old_logprobs(self, batch: _MiniBatch) -> list[torch.Tensor]:
        return [self._zero.engine(self._packed(groups)).logprobs for groups in batch.sequences]

    def _packed(self, groups: Sequence[EncodedGroup]) -> PackedSequence:
        return self._zero.packed([group.branches for group in groups])

    def _accumulate(self, batch: _MiniBatch, sums: "_Sums") -> None:
        """Accumulate the gradients of a mini-batch."""
        for i, groups in enumerate(batch.sequences):
            packed = self._packed(groups)
            scores = self._zero.engine(packed)
            tokens = Tokens(
                logprobs=scores.logprobs,
                entropy=scores.entropy,
                old_logprobs=scores.logprobs.detach() if batch.old is None else batch.old[i],
                engine_logprobs=self._joined([group.engine_logprobs for group in groups]),
                advantages=self._joined([group.advantages for group in groups]),
                answer=packed.branch,
                reference_logprobs=None if batch.reference is None else batch.reference[i],
            )
            losses = self._losses(tokens, self._config.objective)
            weights = self._joined([group.weights for group in groups])
            self._zero.backward((losses.loss * weights).sum(), last=i == len(batch.sequences) - 1)
            sums.add(tokens, losses, weights)

    def _joined(self, values: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat(list(values)).to(self._zero.device)


class _Sums:
    """The figures of an update's report, summed over the tokens in the loss; in float64, as millions are added up. They
    stay on the rank's device until `check` or `means` asks for them: reading one back for each micro-batch would make
    the host wait for the GPU, and the GPU then for the host."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        # The loss, the number of tokens, and a sum for each diagnostic.
        self._sums = torch.zeros(9, dtype=torch.float64, device=ranks.device)

    def add(self, tokens: Tokens, losses: TokenLosses, weights: torch.Tensor) -> None:
        """Add a micro-batch of this rank."""
        log_ratio = tokens.old_logprobs - tokens.engine_logprobs
        diagnostics = (
            torch.ones_like(weights),
            losses.kl,
            losses.clipped,
            tokens.entropy.detach(),
            log_ratio.abs(),
            log_ratio.exp() - log_ratio - 1,  # the k3 estimator of KL(engine ‖ learner)
            losses.truncated,
            losses.correction,
        )
        self._sums[0] += (losses.loss.detach() * weights).double().sum()
        self._sums[1:] += torch.stack(diagnostics).double() @ (weights > 0).double()

    def check(self) -> None:
        """Raise FloatingPointError, on all ranks alike, if the loss of one is not finite; all ranks."""
        if not torch.isfinite(self._ranks.total(self._sums[0])):
            raise FloatingPointError("the loss is no longer finite; lower learner.lr")

    def means(self) -> dict[str, float]:
        """The loss, and the mean of each diagnostic, over all ranks; all ranks."""
        loss, count, *sums = self._ranks.total(self._sums).tolist()
        names = ("kl", "clip_fraction", "entropy", "engine_gap", "engine_kl", "truncated_fraction", "correction")
        return {"loss": loss, **{name: value / max(1.0, count) for name, value in zip(names, sums, strict=True)}}
