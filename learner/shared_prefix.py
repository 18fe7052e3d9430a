"""The shared-prefix forward: a prompt goes through the model once, however many answers it has.

One group is one sequence: the prefix (the prompt), then the branches (the answers) one after another.

    tokens     p p p p | a a a | b b
    positions  0 1 2 3 | 4 5 6 | 4 5        each branch goes on where the prompt ended
    sees       the prompt and its own branch, causally

so the hidden state of a branch's token equals what a sequence of its own would give, to rounding. Groups are padded
to one length and batched. The log-prob of a branch's first token comes from the prefix's last hidden state.
In supervised training several queries may ask about one image: then the prefix ends with the image, and each branch
is the rest of a prompt, which is not scored, and its answer, which is.
"""

from collections.abc import Sequence, Sized
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch

from learner.reasoner import EncodedPrompt

G = TypeVar("G", bound=Sized)


@dataclass(frozen=True, kw_only=True)
class Branches:
    """One prefix and its continuations.

    prefix: holds the image. branches: one [L_i] int64 tensor a continuation, end token included.
    unscored: how many tokens at each branch's start still belong to the prompt; () for none.
    """

    prefix: EncodedPrompt
    branches: Sequence[torch.Tensor]
    unscored: Sequence[int] = ()

    def __len__(self) -> int:
        return len(self.prefix.token_ids) + sum(map(len, self.branches))

    @property
    def scored(self) -> list[torch.Tensor]:
        """The scored tokens of each branch."""
        return [branch[skip:] for branch, skip in zip(self.branches, self.skips, strict=True)]

    @property
    def skips(self) -> Sequence[int]:
        return self.unscored or [0] * len(self.branches)


@dataclass(frozen=True, kw_only=True)
class PackedGroups:
    """B groups as one model input of length S, with T scored tokens altogether.

    token_ids: [B, S] int64, padded at the end. position_ids: [3, B, S] m-rope. mask: [B, 1, S, S] bool, true = sees.
    pixel_values: [patches, features]. grid_thw: [B, 3].
    sources: [2, T] row and column of the hidden state that predicts each scored token. targets: [T] token ids.
    branch: [T] index of the branch, counted through all groups.
    """

    token_ids: torch.Tensor
    position_ids: torch.Tensor
    mask: torch.Tensor
    pixel_values: torch.Tensor
    grid_thw: torch.Tensor
    sources: torch.Tensor
    targets: torch.Tensor
    branch: torch.Tensor

    def to(self, device: str) -> "PackedGroups":
        """The same on another device."""
        return PackedGroups(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


def pack_groups(groups: Sequence[Branches], model: Any) -> PackedGroups:
    """Lay out groups for one forward. `model` gives the prompts' m-rope positions (transformers' Qwen-VL)."""
    width = max(map(len, groups))
    token_ids = torch.zeros(len(groups), width, dtype=torch.int64)
    owner = torch.full((len(groups), width), -1)  # 0 the prefix, i the i-th branch, -1 padding
    position_ids = torch.zeros(3, len(groups), width, dtype=torch.int64)
    sources: list[torch.Tensor] = []
    for row, group in enumerate(groups):
        tokens = torch.cat([group.prefix.token_ids, *group.branches])
        token_ids[row, : len(tokens)] = tokens
        lengths = torch.tensor([len(group.prefix.token_ids), *map(len, group.branches)])
        owner[row, : len(tokens)] = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        position_ids[:, row, : len(tokens)] = _positions(group, model)
        sources.extend(
            torch.stack([torch.full_like(columns, row), columns]) for columns in _sources(lengths, group.skips)
        )
    scored = [tokens for group in groups for tokens in group.scored]
    return PackedGroups(
        token_ids=token_ids,
        position_ids=position_ids,
        mask=_visibility(owner)[:, None],
        pixel_values=torch.cat([group.prefix.image.pixel_values for group in groups]),
        grid_thw=torch.cat([group.prefix.image.grid_thw for group in groups]),
        sources=torch.cat(sources, dim=1),
        targets=torch.cat(scored),
        branch=torch.repeat_interleave(torch.arange(len(scored)), torch.tensor(list(map(len, scored)))),
    )


def micro_batches(groups: Sequence[G], max_tokens: int) -> list[list[G]]:
    """Groups of like length together, so that a padded batch holds at most `max_tokens`; a longer group is alone."""
    batches: list[list[G]] = []
    for group in sorted(groups, key=len):
        if batches and (len(batches[-1]) + 1) * len(group) <= max_tokens:
            batches[-1].append(group)
        else:
            batches.append([group])
    return batches


def branch_logprobs(
    model: Any, packed: PackedGroups, *, temperature: float = 1.0, forbidden: torch.Tensor | None = None
) -> torch.Tensor:
    """Log-probs [T] of every scored token under the sampling distribution, differentiable: temperature-scaled, and
    without the `forbidden` token ids, which are never sampled."""
    hidden = model.model(
        input_ids=packed.token_ids,
        position_ids=packed.position_ids,
        attention_mask={"full_attention": packed.mask},
        pixel_values=packed.pixel_values,
        image_grid_thw=packed.grid_thw,
        use_cache=False,
    ).last_hidden_state
    logits = model.lm_head(hidden[packed.sources[0], packed.sources[1]]).float() / temperature
    if forbidden is not None:
        logits = logits.index_fill(1, forbidden, -torch.inf)
    return -torch.nn.functional.cross_entropy(logits, packed.targets, reduction="none")


def _positions(group: Branches, model: Any) -> torch.Tensor:
    ids = group.prefix.token_ids[None]
    types = (ids == model.config.image_token_id).int()
    prefix, _ = model.model.get_rope_index(ids, mm_token_type_ids=types, image_grid_thw=group.prefix.image.grid_thw)
    start = prefix.max() + 1
    branches = [(start + torch.arange(len(branch))).expand(3, -1) for branch in group.branches]
    return torch.cat([prefix[:, 0], *branches], dim=1)


def _sources(lengths: torch.Tensor, skips: Sequence[int]) -> list[torch.Tensor]:
    """Columns whose hidden states predict each branch's scored tokens: a token's predecessor in its branch, or the
    prefix's last token for the first."""
    prefix_end = int(lengths[0]) - 1
    starts = torch.cumsum(lengths, 0)[:-1]
    return [
        torch.cat([torch.tensor([prefix_end]), torch.arange(start, start + length - 1)])[skip:]
        for start, length, skip in zip(starts.tolist(), lengths[1:].tolist(), skips, strict=True)
    ]


def _visibility(owner: torch.Tensor) -> torch.Tensor:
    """[B, S, S] bool: causal, within the prefix or the token's own branch. Padding sees itself, so that its
    softmax is defined; nothing sees padding."""
    width = owner.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    shared = (owner[:, None, :] == 0) & (owner[:, :, None] >= 0)
    own = owner[:, None, :] == owner[:, :, None]
    return (shared | own) & causal
