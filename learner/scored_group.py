"""What the learner is given: a group's prompt, its sampled answers and their rewards."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch

from learner.grpo import group_advantages
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
        """Answer tokens, over which the loss is averaged."""
        return sum(len(completion.token_ids) for completion in self.completions)


@dataclass(frozen=True, kw_only=True)
class LearnerGroup:
    """A group as the loss takes it, T answer tokens altogether.

    branches: the prompt and its answers. old_logprobs, advantages: [T], in the branches' order.
    """

    branches: Branches
    old_logprobs: torch.Tensor
    advantages: torch.Tensor

    def __len__(self) -> int:
        return len(self.branches)

    def split(self, max_tokens: int) -> list[Self]:
        """As `Branches.split`."""
        parts = self.branches.split(max_tokens)
        lengths = [sum(map(len, part.branches)) for part in parts]
        each = zip(parts, self.old_logprobs.split(lengths), self.advantages.split(lengths), strict=True)
        return [replace(self, branches=part, old_logprobs=old, advantages=worth) for part, old, worth in each]


class PromptMismatch(RuntimeError):
    """The rollout engine and the learner made different token ids of the same prompt: their processors differ."""


def encode_group(reasoner: Reasoner, group: ScoredGroup) -> LearnerGroup:
    """Raises PromptMismatch where the engine saw another prompt than this reasoner makes."""
    prompt = reasoner.encode(group.sample.query, reasoner.encode_image(group.sample.image()))
    if tuple(prompt.token_ids.tolist()) != group.prompt_ids:
        raise PromptMismatch(
            f"group {group.id}: the rollout engine's prompt has {len(group.prompt_ids)} tokens, the learner's "
            f"{len(prompt.token_ids)}, and they differ; do both load the same folder and versions?"
        )
    advantages = group_advantages(torch.tensor(group.rewards, dtype=torch.float32))
    lengths = torch.tensor([len(completion.token_ids) for completion in group.completions])
    return LearnerGroup(
        branches=Branches(
            prefix=prompt, branches=[torch.tensor(completion.token_ids) for completion in group.completions]
        ),
        old_logprobs=torch.tensor([value for completion in group.completions for value in completion.logprobs]),
        advantages=torch.repeat_interleave(advantages, lengths),
    )
