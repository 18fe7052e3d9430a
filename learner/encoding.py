"""A scored group as tensors: its prompt, its completions' tokens, and the per-token inputs of the loss."""

from dataclasses import dataclass, replace
from typing import Self

import torch

from learner.config import ObjectiveConfig
from learner.objective import Totals, advantages, aggregation_weights
from learner.shared_prefix import Branches
from reasoner.model import Reasoner
from rewards.scored import ScoredGroup
from umrg.group import Completion


@dataclass(frozen=True, kw_only=True)
class EncodedGroup:
    """A group with T completion tokens in total, in the order of the branches."""

    branches: Branches
    """The prompt and its completions."""
    engine_logprobs: torch.Tensor
    """[T], log-prob of each token as the rollout engine reported it."""
    advantages: torch.Tensor
    """[T], advantage of the completion that each token belongs to."""
    weights: torch.Tensor
    """[T], weight of each token's loss; 0 for tokens that are left out."""

    def __len__(self) -> int:
        return len(self.branches)

    def split(self, max_tokens: int) -> list[Self]:
        """As `Branches.split`, with the tensors split alike."""
        parts = self.branches.split(max_tokens)
        lengths = [sum(map(len, part.branches)) for part in parts]
        tensors = (each.split(lengths) for each in (self.engine_logprobs, self.advantages, self.weights))
        return [
            replace(self, branches=part, engine_logprobs=engine, advantages=advantage, weights=weights)
            for part, engine, advantage, weights in zip(parts, *tensors, strict=True)
        ]

    def idle(self, max_tokens: int) -> Self:
        """A part of it, of at most `max_tokens`, whose loss has the weight 0."""
        return replace(self, weights=torch.zeros_like(self.weights)).split(max_tokens)[0]


class PromptMismatch(RuntimeError):
    """The rollout engine and the learner encode the same prompt to different token ids: their processors differ."""


def in_loss(completion: Completion, objective: ObjectiveConfig) -> bool:
    """Whether a completion's tokens are part of the loss; truncated ones may be left out (overlong filtering)."""
    return completion.finished or objective.unfinished == "keep"


def encode_group(reasoner: Reasoner, group: ScoredGroup, objective: ObjectiveConfig, totals: Totals) -> EncodedGroup:
    """Encode a group that has its image. totals: of the mini-batch. Raises PromptMismatch if the engine's prompt is not
    the one that this reasoner makes."""
    sample, samples = group.group.sample, group.samples
    prompt = reasoner.encode(sample.query, reasoner.encode_image(sample.image()))
    if tuple(prompt.token_ids.tolist()) != samples.prompt_ids:
        raise PromptMismatch(
            f"group {group.group.id}: the rollout engine's prompt has {len(samples.prompt_ids)} tokens, the learner's "
            f"{len(prompt.token_ids)}, and they differ; do both load the same folder and versions?"
        )
    completions = samples.completions
    lengths = torch.tensor([len(each.token_ids) for each in completions])
    advantage = advantages(torch.tensor(group.rewards, dtype=torch.float32), objective.advantage)
    included = torch.tensor([float(in_loss(each, objective)) for each in completions])
    weights = aggregation_weights(lengths, objective.aggregation, totals)
    return EncodedGroup(
        branches=Branches(prefix=prompt, branches=[torch.tensor(each.token_ids) for each in completions]),
        engine_logprobs=torch.tensor([value for each in completions for value in each.logprobs]),
        advantages=torch.repeat_interleave(advantage, lengths),
        weights=weights * torch.repeat_interleave(included, lengths),
    )
