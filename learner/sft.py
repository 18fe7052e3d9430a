"""Supervised fine-tuning on one rank: the reference answer's tokens made likely, through the learner's own forward."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import distributed

from learner.shared_prefix import Branches, micro_batches
from learner.update_report import SftReport
from learner.zero import ZeroRank
from reasoner.model import Reasoner
from reasoner.prompter import EncodedPrompt
from umrg.answers import format_answer
from umrg.frames import Frame, Frames
from umrg.rows import reasoning_fault
from umrg.sample import Sample

Image = Sequence[Sample]
"""The samples that ask about one image."""


@dataclass(frozen=True, kw_only=True)
class _Share:
    """This rank's part of a batch. rows: as many as every rank has, the last ones idle. weights: of each row, 0 where
    it is idle. tokens: that are scored, of all ranks."""

    rows: list[list[Branches]]
    weights: list[float]
    tokens: int


class SftRank:
    """All ranks call each method, given all images and taking their own."""

    def __init__(self, zero: ZeroRank) -> None:
        self._zero = zero

    def update(self, images: Sequence[Image]) -> SftReport:
        """One update. Raises FloatingPointError where the loss is no longer finite, before the weights take it in."""
        share = self._share(images)
        summed = torch.zeros((), dtype=torch.float64)
        for i, (row, weight) in enumerate(zip(share.rows, share.weights, strict=True)):
            loss = -weight * self._zero.scores(row).logprobs.sum() / share.tokens
            self._zero.backward(loss, last=i == len(share.rows) - 1)
            summed += loss.item()
        distributed.all_reduce(summed)
        if not torch.isfinite(summed):
            raise FloatingPointError(f"the loss is {summed.item()}; lower learner.lr")
        norm = self._zero.step()
        return SftReport(loss=summed.item(), grad_norm=norm, lr=self._zero.lr, tokens=share.tokens)

    @torch.no_grad()
    def loss(self, images: Sequence[Image]) -> tuple[float, int]:
        """Sum of the negative log-likelihoods of the images' answers, in nats, and how many tokens these are."""
        share = self._share(images)
        scored = zip(share.rows, share.weights, strict=True)
        summed = torch.tensor(
            sum(-weight * self._zero.scores(row).logprobs.double().sum().item() for row, weight in scored),
            dtype=torch.float64,
        )
        distributed.all_reduce(summed)
        return summed.item(), share.tokens

    def _share(self, images: Sequence[Image]) -> _Share:
        rank, ranks = distributed.get_rank(), distributed.get_world_size()
        own = [reference_branches(self._zero.reasoner, samples) for samples in images[rank::ranks]]
        rows = micro_batches(own, self._zero.config.micro_batch_tokens)
        rounds, tokens = torch.tensor(len(rows)), torch.tensor(sum(len(t) for group in own for t in group.scored))
        distributed.all_reduce(rounds, op=distributed.ReduceOp.MAX)
        distributed.all_reduce(tokens)
        idle = int(rounds) - len(rows)
        weights = [1.0] * len(rows) + [0.0] * idle
        return _Share(rows=rows + [self._filler(images[0])] * idle, weights=weights, tokens=int(tokens))

    def _filler(self, image: Image) -> list[Branches]:
        group = reference_branches(self._zero.reasoner, image)
        return [replace(group, branches=group.branches[:1], unscored=group.unscored[:1])]


def reference_branches(reasoner: Reasoner, samples: Sequence[Sample]) -> Branches:
    """The samples of one image as one group: what their prompts share is the prefix, and each branch is the rest of
    a prompt, unscored, and its reference answer in the frame that the reasoner speaks."""
    image = reasoner.encode_image(samples[0].image())
    prompts = [reasoner.encode(sample.query, image).token_ids for sample in samples]
    shared = _shared_length(prompts)
    answers = [reasoner.completion_ids(_reference_answer(reasoner, sample, image.frames)) for sample in samples]
    return Branches(
        prefix=EncodedPrompt(token_ids=prompts[0][:shared], image=image),
        branches=[torch.cat([prompt[shared:], answer]) for prompt, answer in zip(prompts, answers, strict=True)],
        unscored=[len(prompt) - shared for prompt in prompts],
    )


def _shared_length(prompts: Sequence[torch.Tensor]) -> int:
    shortest = min(map(len, prompts))
    first = prompts[0][:shortest]
    agree = torch.stack([prompt[:shortest] == first for prompt in prompts]).all(dim=0)
    return int(agree.long().cumprod(0).sum())


def _reference_answer(reasoner: Reasoner, sample: Sample, frames: Frames) -> str:
    frame = reasoner.prompt.frame
    return format_answer(
        box=frames.box(sample.box, Frame.ORIGINAL, frame),
        points=frames.points(sample.points, Frame.ORIGINAL, frame),
        think=_reasoning(sample) if reasoner.prompt.think else None,
    )


def _reasoning(sample: Sample) -> str:
    if fault := reasoning_fault(sample.reasoning):
        raise ValueError(f"{sample.name} has {fault}")
    assert sample.reasoning is not None
    return sample.reasoning
