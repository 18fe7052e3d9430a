"""The shared-prefix forward: a prompt goes through the model once, however many answers it has.

One group is one sequence: the prefix (the prompt), then the branches (the answers) one after another.

    tokens     p p p p | a a a | b b
    positions  0 1 2 3 | 4 5 6 | 4 5        each branch goes on where the prompt ended
    sees       the prompt and its own branch, causally

so the hidden state of a branch's token equals what a sequence of its own would give, to rounding. Groups lie one after
another in one row, without padding, and see nothing of each other (`learner.attention`). The log-prob of a branch's
first token comes from the prefix's last hidden state.
In supervised training several queries may ask about one image: then the prefix ends with the image, and each branch
is the rest of a prompt, which is not scored, and its answer, which is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, Self, TypeVar

import torch
from torch.utils.checkpoint import checkpoint

from learner.attention import Layout, Span
from reasoner.prompter import EncodedPrompt

LOGITS_BYTES = 256 << 20
"""Largest block of logits [tokens, vocabulary] in float32 that is made at a time."""


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

    def split(self, max_tokens: int) -> list[Self]:
        """Parts of at most so many tokens, each with the prefix. Raises ValueError where a branch is too long."""
        parts = cut(len(self.prefix.token_ids), list(map(len, self.branches)), max_tokens)
        return [
            replace(self, branches=[self.branches[i] for i in part], unscored=[self.skips[i] for i in part])
            for part in parts
        ]

    @property
    def scored(self) -> list[torch.Tensor]:
        """The scored tokens of each branch."""
        return [branch[skip:] for branch, skip in zip(self.branches, self.skips, strict=True)]

    @property
    def skips(self) -> Sequence[int]:
        return self.unscored or [0] * len(self.branches)


@dataclass(frozen=True, kw_only=True)
class PackedSequence:
    """Groups in one row of length S as one model input, with T scored tokens altogether.

    token_ids: [1, S] int64. position_ids: [3, 1, S] m-rope. layout: where each group and its branches lie.
    pixel_values: [patches, features]. grid_thw: [groups, 3].
    sources: [T] column of the hidden state that predicts each scored token. targets: [T] token ids.
    branch: [T] index of the branch, counted through all groups.
    """

    token_ids: torch.Tensor
    position_ids: torch.Tensor
    layout: Layout
    pixel_values: torch.Tensor
    grid_thw: torch.Tensor
    sources: torch.Tensor
    targets: torch.Tensor
    branch: torch.Tensor

    def to(self, device: str) -> "PackedSequence":
        """The same on another device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **moved)  # type: ignore[arg-type]


def pack(groups: Sequence[Branches], model: Any) -> PackedSequence:
    """Lay out groups for one forward. `model` gives the prompts' m-rope positions (transformers' Qwen-VL)."""
    spans: list[Span] = []
    for group in groups:
        start = spans[-1].end if spans else 0
        spans.append(Span(start=start, prefix=len(group.prefix.token_ids), branches=tuple(map(len, group.branches))))
    scored = [tokens for group in groups for tokens in group.scored]
    return PackedSequence(
        token_ids=torch.cat([tokens for group in groups for tokens in (group.prefix.token_ids, *group.branches)])[None],
        position_ids=torch.cat([_positions(group, model) for group in groups], dim=1)[:, None],
        layout=Layout(tuple(spans)),
        pixel_values=torch.cat([group.prefix.image.pixel_values for group in groups]),
        grid_thw=torch.cat([group.prefix.image.grid_thw for group in groups]),
        sources=torch.cat([_sources(span, group.skips) for span, group in zip(spans, groups, strict=True)]),
        targets=torch.cat(scored),
        branch=torch.repeat_interleave(torch.arange(len(scored)), torch.tensor(list(map(len, scored)))),
    )


class Splittable(Protocol):
    """What micro-batches are made of: a prefix and its branches, and whatever hangs on them."""

    def __len__(self) -> int:
        """Tokens."""
        ...

    def split(self, max_tokens: int) -> Sequence[Self]: ...


G = TypeVar("G", bound=Splittable)


def micro_batches(groups: Sequence[G], max_tokens: int) -> list[list[G]]:
    """Groups in rows of at most `max_tokens`, in few rows: the longest first, each where it fits first. A group that is
    too long is split by its branches, and its prefix repeated. Raises ValueError where a single branch does not fit."""
    rows: list[list[G]] = []
    room: list[int] = []
    parts = [part for group in groups for part in (group.split(max_tokens) if len(group) > max_tokens else [group])]
    for part in sorted(parts, key=len, reverse=True):
        row = next((i for i, left in enumerate(room) if len(part) <= left), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(max_tokens)
        rows[row].append(part)
        room[row] -= len(part)
    return rows


def cut(prefix: int, branches: Sequence[int], max_tokens: int) -> list[range]:
    """Which branches of a group go together, in their order, so that each part fits with the prefix. Raises ValueError
    where a single one does not."""
    parts = [range(0)]
    for i, length in enumerate(branches):
        if prefix + length > max_tokens:
            raise ValueError(
                f"a prompt of {prefix} tokens and an answer of {length} do not fit into learner.micro_batch_tokens, "
                f"{max_tokens}; raise it"
            )
        if prefix + sum(branches[parts[-1].start : i + 1]) > max_tokens:
            parts.append(range(i, i))
        parts[-1] = range(parts[-1].start, i + 1)
    return parts


class TokenScores(NamedTuple):
    """Of every scored token, [T], under the sampling distribution: log-prob, and entropy in nats."""

    logprobs: torch.Tensor
    entropy: torch.Tensor


def branch_scores(
    model: Any,
    packed: PackedSequence,
    *,
    temperature: float = 1.0,
    forbidden: torch.Tensor | None = None,
    entropy_learns: bool = False,
) -> TokenScores:
    """Log-prob and entropy of every scored token under the sampling distribution, differentiable: temperature-scaled,
    and without the `forbidden` token ids, which are never sampled. `learner.attention.use_shared_prefix` must have been
    called on the model. Logits exist for `LOGITS_BYTES` at a time, and are made again for the backward pass.
    entropy_learns: the entropy has a gradient too."""

    def score(states: torch.Tensor, targets: torch.Tensor) -> TokenScores:
        logits = model.lm_head(states)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        if forbidden is not None:
            logits = logits.index_fill(1, forbidden, torch.finfo(logits.dtype).min)
        logprobs = -torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        with torch.set_grad_enabled(entropy_learns and torch.is_grad_enabled()):
            every = logits.log_softmax(dim=1)
            return TokenScores(logprobs, -(every.exp() * every).sum(dim=1))

    states = _states(model, packed)[packed.sources]
    chunk = max(1, LOGITS_BYTES // (4 * model.config.text_config.vocab_size))
    if len(states) <= chunk:
        return score(states, packed.targets)
    chunks = zip(states.split(chunk), packed.targets.split(chunk), strict=True)
    parts = [checkpoint(score, *part, use_reentrant=False) for part in chunks]
    return TokenScores(*map(torch.cat, zip(*parts, strict=True)))


def _states(model: Any, packed: PackedSequence) -> torch.Tensor:
    """The language model's last hidden states, [S, d]."""
    device = packed.token_ids.device
    states: torch.Tensor = model.model(
        input_ids=packed.token_ids,
        position_ids=packed.position_ids,
        shared_prefix=packed.layout if device.type == "cpu" else packed.layout.mask(device),
        pixel_values=packed.pixel_values,
        image_grid_thw=packed.grid_thw,
        use_cache=False,
    ).last_hidden_state
    return states[0]


def _positions(group: Branches, model: Any) -> torch.Tensor:
    ids = group.prefix.token_ids[None]
    types = (ids == model.config.image_token_id).int()
    prefix, _ = model.model.get_rope_index(ids, mm_token_type_ids=types, image_grid_thw=group.prefix.image.grid_thw)
    start = prefix.max() + 1
    branches = [(start + torch.arange(len(branch))).expand(3, -1) for branch in group.branches]
    return torch.cat([prefix[:, 0], *branches], dim=1)


def _sources(span: Span, skips: Sequence[int]) -> torch.Tensor:
    """Columns whose hidden states predict the scored tokens of each branch: a token's predecessor in its branch, or the
    prefix's last token for the first."""
    columns, start = [], span.start + span.prefix
    for length, skip in zip(span.branches, skips, strict=True):
        before = torch.arange(start - 1, start + length - 1)
        before[0] = span.start + span.prefix - 1
        columns.append(before[skip:])
        start += length
    return torch.cat(columns)
