"""The shared-prefix forward: a prompt goes through the model once, however many completions it has.

A prompt and its completions are a prefix tree: the prefix, then its branches one after another.

    tokens     p p p p | a a a | b b
    positions  0 1 2 3 | 4 5 6 | 4 5        each branch continues where the prompt ended
    sees       the prompt and its own branch, causally

The hidden state of a branch's token therefore equals that of a sequence of its own, up to rounding. Several trees are
packed into one sequence, without padding, and see nothing of each other (`learner.attention`). The log-prob of a
branch's first token comes from the prefix's last hidden state.

In supervised training several queries may ask about one image. The prefix then ends where their prompts part, and a
branch is the rest of a prompt, which is not scored, followed by its reference answer, which is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, Self, TypeVar

import torch
from torch.utils.checkpoint import checkpoint

from learner.attention import Layout, Span
from reasoner.prompter import EncodedPrompt
from umrg.mistake import Mistake

LOGITS_BYTES = 256 << 20
"""Largest block of logits [tokens, vocabulary] in float32 that is held at a time. With a vocabulary of 150,000, those
of 4,096 tokens would take 2.5 GB."""


@dataclass(frozen=True, kw_only=True)
class Branches:
    """A prefix tree: one prefix, and the branches that continue it."""

    prefix: EncodedPrompt
    """The prompt, or the part that all prompts share; it contains the image."""
    branches: Sequence[torch.Tensor]
    """One [L_i] int64 per continuation, end token included."""
    unscored: Sequence[int] = ()
    """How many tokens at the start of each branch still belong to its prompt; () for none."""

    def __len__(self) -> int:
        return len(self.prefix.token_ids) + sum(map(len, self.branches))

    def split(self, max_tokens: int) -> list[Self]:
        """Parts of at most `max_tokens` tokens, each with the whole prefix. Raises ValueError if a single branch does
        not fit."""
        parts = _cut(len(self.prefix.token_ids), list(map(len, self.branches)), max_tokens)
        return [
            replace(self, branches=[self.branches[i] for i in part], unscored=[self.skips[i] for i in part])
            for part in parts
        ]

    @property
    def scored(self) -> list[torch.Tensor]:
        """The scored tokens of each branch: those after its share of the prompt."""
        return [branch[skip:] for branch, skip in zip(self.branches, self.skips, strict=True)]

    @property
    def skips(self) -> Sequence[int]:
        """`unscored`, one number per branch."""
        return self.unscored or [0] * len(self.branches)


@dataclass(frozen=True, kw_only=True)
class PackedSequence:
    """Prefix trees packed into one sequence of length S as one input of the model, with T scored tokens in total."""

    token_ids: torch.Tensor
    """[1, S] int64."""
    position_ids: torch.Tensor
    """[3, 1, S] int64, m-rope: time, height and width."""
    layout: Layout
    """Where each tree and its branches lie."""
    pixel_values: torch.Tensor
    """[patches, features] of all images."""
    grid_thw: torch.Tensor
    """[trees, 3] int64, patches of each image along time, height and width."""
    sources: torch.Tensor
    """[T] int64, position of the hidden state that predicts each scored token."""
    targets: torch.Tensor
    """[T] int64, token id of each scored token."""
    branch: torch.Tensor
    """[T] int64, branch of each scored token, counted through all trees."""

    def to(self, device: str) -> "PackedSequence":
        """The same, with all tensors on another device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **moved, layout=self.layout.to(device))


def pack(trees: Sequence[Branches], model: Any) -> PackedSequence:
    """Lay out prefix trees for one forward pass. model: a Qwen-VL model of transformers, which computes the m-rope
    positions of the prefixes."""
    spans: list[Span] = []
    for tree in trees:
        start = spans[-1].end if spans else 0
        spans.append(Span(start=start, prefix=len(tree.prefix.token_ids), branches=tuple(map(len, tree.branches))))
    scored = [tokens for tree in trees for tokens in tree.scored]
    return PackedSequence(
        token_ids=torch.cat([tokens for tree in trees for tokens in (tree.prefix.token_ids, *tree.branches)])[None],
        position_ids=torch.cat([_positions(tree, model) for tree in trees], dim=1)[:, None],
        layout=Layout.of(spans),
        pixel_values=torch.cat([tree.prefix.image.pixel_values for tree in trees]),
        grid_thw=torch.cat([tree.prefix.image.grid_thw for tree in trees]),
        sources=torch.cat([_sources(span, tree.skips) for span, tree in zip(spans, trees, strict=True)]),
        targets=torch.cat(scored),
        branch=torch.repeat_interleave(torch.arange(len(scored)), torch.tensor(list(map(len, scored)))),
    )


class Splittable(Protocol):
    """A prefix tree, alone or with tensors that belong to its tokens."""

    def __len__(self) -> int:
        """Tokens."""
        ...

    def split(self, max_tokens: int) -> Sequence[Self]: ...


T = TypeVar("T", bound=Splittable)


def micro_batches(trees: Sequence[T], max_tokens: int) -> list[list[T]]:
    """Distribute prefix trees over few packed sequences of at most `max_tokens`, a micro-batch each: first-fit
    decreasing, the usual bin-packing heuristic. A tree that is too long is split by its branches, its prefix repeated.
    Raises ValueError if a single branch does not fit."""
    sequences: list[list[T]] = []
    room: list[int] = []
    parts = [part for tree in trees for part in (tree.split(max_tokens) if len(tree) > max_tokens else [tree])]
    for part in sorted(parts, key=len, reverse=True):
        i = next((i for i, left in enumerate(room) if len(part) <= left), len(sequences))
        if i == len(sequences):
            sequences.append([])
            room.append(max_tokens)
        sequences[i].append(part)
        room[i] -= len(part)
    return sequences


def shares(work: Sequence[int], ranks: int) -> list[list[int]]:
    """Which groups each rank takes, so that all have about the same work: the largest first, each to the rank with the
    least so far (LPT scheduling, at most 4/3 of the optimum: Graham 1969). Groups without work are dealt by number.
    work: tokens of each group."""
    taken: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for i in sorted(range(len(work)), key=lambda i: -work[i]):
        least = min(range(ranks), key=lambda rank: (loads[rank], len(taken[rank])))
        taken[least].append(i)
        loads[least] += work[i]
    return [sorted(share) for share in taken]


def _cut(prefix: int, branches: Sequence[int], max_tokens: int) -> list[range]:
    """Which branches stay together, in order, so that each part fits with the prefix. prefix, branches: lengths in
    tokens. Raises ValueError if a single branch does not fit."""
    parts = [range(0)]
    for i, length in enumerate(branches):
        if prefix + length > max_tokens:
            raise Mistake(
                f"a prompt of {prefix} tokens and an answer of {length} do not fit into learner.micro_batch_tokens, "
                f"{max_tokens}; raise it"
            )
        if prefix + sum(branches[parts[-1].start : i + 1]) > max_tokens:
            parts.append(range(i, i))
        parts[-1] = range(parts[-1].start, i + 1)
    return parts


class TokenScores(NamedTuple):
    """Scores of the T scored tokens of a packed sequence, under the sampling distribution."""

    logprobs: torch.Tensor
    """[T], log-probability of each token."""
    entropy: torch.Tensor
    """[T], entropy in nats of the distribution that each token was drawn from."""


def branch_scores(
    model: Any,
    packed: PackedSequence,
    *,
    temperature: float = 1.0,
    forbidden: torch.Tensor | None = None,
    entropy_learns: bool = False,
) -> TokenScores:
    """Log-probs of the scored tokens, differentiable, and entropies.

    The sampling distribution is scaled by `temperature` and excludes the `forbidden` token ids, which are never
    sampled. entropy_learns: the entropies have a gradient too. `learner.attention.use_shared_prefix` must have been
    called on the model."""

    def score(states: torch.Tensor, targets: torch.Tensor) -> TokenScores:
        logits = model.lm_head(states)
        # The softmax over a large vocabulary loses too much in bfloat16; float64 stays what it is.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        if forbidden is not None:
            # Not -inf: its product with probability 0 in the entropy would be NaN.
            logits = logits.index_fill(1, forbidden, torch.finfo(logits.dtype).min)
        logprobs = -torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        with torch.set_grad_enabled(entropy_learns and torch.is_grad_enabled()):
            every = logits.log_softmax(dim=1)
            return TokenScores(logprobs, -(every.exp() * every).sum(dim=1))

    states = _states(model, packed)[packed.sources]
    chunk = max(1, LOGITS_BYTES // (4 * model.config.text_config.vocab_size))
    if len(states) <= chunk:
        return score(states, packed.targets)
    # Without checkpointing, autograd would keep every chunk's logits; so they are computed again in the backward pass.
    chunks = zip(states.split(chunk), packed.targets.split(chunk), strict=True)
    parts = [checkpoint(score, *part, use_reentrant=False) for part in chunks]
    return TokenScores(*map(torch.cat, zip(*parts, strict=True)))


def _states(model: Any, packed: PackedSequence) -> torch.Tensor:
    """The language model's last hidden states, [S, d]."""
    states: torch.Tensor = model.model(
        input_ids=packed.token_ids,
        position_ids=packed.position_ids,
        shared_prefix=packed.layout,
        pixel_values=packed.pixel_values,
        image_grid_thw=packed.grid_thw,
        use_cache=False,
    ).last_hidden_state
    return states[0]


def _positions(tree: Branches, model: Any) -> torch.Tensor:
    """m-rope positions [3, S] of one tree."""
    ids = tree.prefix.token_ids[None]
    types = (ids == model.config.image_token_id).int()
    prefix, _ = model.model.get_rope_index(ids, mm_token_type_ids=types, image_grid_thw=tree.prefix.image.grid_thw)
    # m-rope counts an image's tokens along three axes, so the largest position is not the number of tokens before.
    start = prefix.max() + 1
    branches = [(start + torch.arange(len(branch))).expand(3, -1) for branch in tree.branches]
    return torch.cat([prefix[:, 0], *branches], dim=1)


def _sources(span: Span, skips: Sequence[int]) -> torch.Tensor:
    """Positions of the hidden states that predict the scored tokens of each branch: of the token before it in its
    branch or, for a branch's first token, of the prefix's last."""
    positions, start = [], span.start + span.prefix
    for length, skip in zip(span.branches, skips, strict=True):
        before = torch.arange(start - 1, start + length - 1)
        before[0] = span.start + span.prefix - 1
        positions.append(before[skip:])
        start += length
    return torch.cat(positions)
