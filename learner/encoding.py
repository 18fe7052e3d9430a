"""A scored group as tensors: its prompt, its answers' tokens, and what the loss needs of each token."""

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
    """A group as the loss takes it, with T answer tokens altogether, in the order of the branches."""

    branches: Branches
    """The prompt and its answers."""
    engine_logprobs: torch.Tensor
    """[T], of each token, as the rollout engine told them."""
    advantages: torch.Tensor
    """[T], of the answer that each token belongs to."""
    weights: torch.Tensor
    """[T], of each token's loss; 0 where it does not count."""

    def __len__(self) -> int:
        return len(self.branches)

    def split(self, max_tokens: int) -> list[Self]:
        """As `Branches.split`."""
        parts = self.branches.split(max_tokens)
        lengths = [sum(map(len, part.branches)) for part in parts]
        tensors = (each.split(lengths) for each in (self.engine_logprobs, self.advantages, self.weights))
        return [
            replace(self, branches=part, engine_logprobs=engine, advantages=worth, weights=weights)
            for part, engine, worth, weights in zip(parts, *tensors, strict=True)
        ]


class PromptMismatch(RuntimeError):
    """The rollout engine and the learner made different token ids of the same prompt: their processors differ."""


def counts(answer: Completion, objective: ObjectiveConfig) -> bool:
    """Whether an answer's tokens count in the loss."""
    return answer.finished or objective.unfinished == "keep"


def encode_group(reasoner: Reasoner, group: ScoredGroup, objective: ObjectiveConfig, totals: Totals) -> EncodedGroup:
    """Encode a group whose row has its image. totals: of the mini-batch. Raises PromptMismatch where the engine saw
    another prompt than this reasoner makes."""
    sample, samples = group.group.sample, group.samples
    prompt = reasoner.encode(sample.query, reasoner.encode_image(sample.image()))
    if tuple(prompt.token_ids.tolist()) != samples.prompt_ids:
        raise PromptMismatch(
            f"group {group.group.id}: the rollout engine's prompt has {len(samples.prompt_ids)} tokens, the learner's "
            f"{len(prompt.token_ids)}, and they differ; do both load the same folder and versions?"
        )
    answers = samples.completions
    lengths = torch.tensor([len(answer.token_ids) for answer in answers])
    worth = advantages(torch.tensor(group.rewards, dtype=torch.float32), objective.advantage)
    counted = torch.tensor([float(counts(answer, objective)) for answer in answers])
    weights = aggregation_weights(lengths, objective.aggregation, totals)
    return EncodedGroup(
        branches=Branches(prefix=prompt, branches=[torch.tensor(answer.token_ids) for answer in answers]),
        engine_logprobs=torch.tensor([value for answer in answers for value in answer.logprobs]),
        advantages=torch.repeat_interleave(worth, lengths),
        weights=weights * torch.repeat_interleave(counted, lengths),
    )
