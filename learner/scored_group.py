"""What the learner is given: a group's prompt, its sampled answers and their rewards."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch

from learner.config import ObjectiveConfig
from learner.objective import Totals, advantages, aggregation_weights
from learner.reasoner import Reasoner
from learner.shared_prefix import Branches
from umrg.group import Completion
from umrg.sample import Sample


@dataclass(frozen=True, kw_only=True)
class ScoredGroup:
    """One group, sampled and scored.

    id: of the group. prompt_ids: as the rollout engine saw the prompt. rewards: total reward of each completion.
    Answers that could not be scored are left out of both, so that the group's mean and spread are those of the rest.
    """

    id: str
    sample: Sample
    prompt_ids: tuple[int, ...]
    completions: Sequence[Completion]
    rewards: Sequence[float]

    @property
    def tokens(self) -> int:
        """Of all answers."""
        return sum(len(completion.token_ids) for completion in self.completions)


@dataclass(frozen=True, kw_only=True)
class LearnerGroup:
    """A group as the loss takes it, T answer tokens altogether.

    branches: the prompt and its answers. engine_logprobs, advantages, weights: [T], in the branches' order; weights: of
    each token's loss, 0 where it does not count.
    """

    branches: Branches
    engine_logprobs: torch.Tensor
    advantages: torch.Tensor
    weights: torch.Tensor

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


def encode_group(reasoner: Reasoner, group: ScoredGroup, objective: ObjectiveConfig, totals: Totals) -> LearnerGroup:
    """totals: of the mini-batch. Raises PromptMismatch where the engine saw another prompt than this reasoner makes."""
    prompt = reasoner.encode(group.sample.query, reasoner.encode_image(group.sample.image()))
    if tuple(prompt.token_ids.tolist()) != group.prompt_ids:
        raise PromptMismatch(
            f"group {group.id}: the rollout engine's prompt has {len(group.prompt_ids)} tokens, the learner's "
            f"{len(prompt.token_ids)}, and they differ; do both load the same folder and versions?"
        )
    answers = group.completions
    lengths = torch.tensor([len(answer.token_ids) for answer in answers])
    worth = advantages(torch.tensor(group.rewards, dtype=torch.float32), objective.advantage)
    counted = torch.tensor([float(counts(answer, objective)) for answer in answers])
    weights = aggregation_weights(lengths, objective.aggregation, totals)
    return LearnerGroup(
        branches=Branches(prefix=prompt, branches=[torch.tensor(answer.token_ids) for answer in answers]),
        engine_logprobs=torch.tensor([value for answer in answers for value in answer.logprobs]),
        advantages=torch.repeat_interleave(worth, lengths),
        weights=weights * torch.repeat_interleave(counted, lengths),
    )
