"""Supervised fine-tuning on one rank: the likelihood of reference answers, through the learner's own forward.

The queries of one image share a prefix tree: what their prompts have in common is the prefix.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from learner.shared_prefix import Branches, micro_batches
from learner.update_report import SftReport
from learner.zero import ZeroRank
from reasoner.model import Reasoner
from reasoner.prompter import EncodedPrompt
from umrg.sample import Sample

Image = Sequence[Sample]
"""The samples that ask about one image."""

_Weighted = tuple[list[Branches], float]
"""A packed sequence and the weight of its loss: 1, or 0 if it is idle."""


class SftRank:
    """A rank that learns from reference answers. All ranks call each method with all images, and each takes its own
    share."""

    def __init__(self, zero: ZeroRank) -> None:
        self._zero = zero

    def update(self, images: Sequence[Image]) -> SftReport:
        """One update. Raises FloatingPointError if the loss is not finite, before the step applies it."""
        sequences, tokens = self._share(images)
        # On the rank's device, without a look at it before the step: reading makes the host wait for the GPU.
        summed = torch.zeros((), dtype=torch.float64, device=self._zero.device)
        for i, (trees, weight) in enumerate(sequences):
            loss = -weight * self._zero.scores(trees).logprobs.sum() / tokens
            self._zero.backward(loss, last=i == len(sequences) - 1)
            summed += loss.detach()
        total = self._zero.ranks.total(summed).item()
        if not math.isfinite(total):
            raise FloatingPointError(f"the loss is {total}; lower learner.lr")
        norm = self._zero.step()
        return SftReport(loss=total, grad_norm=norm, lr=self._zero.lr, tokens=tokens)

    @torch.no_grad()
    def loss(self, images: Sequence[Image]) -> tuple[float, int]:
        """Summed negative log-likelihood of the images' reference answers, in nats, and the number of their tokens."""
        sequences, tokens = self._share(images)
        losses = [-weight * self._zero.scores(trees).logprobs.double().sum() for trees, weight in sequences]
        return self._zero.ranks.total(torch.stack(losses).sum()).item(), tokens

    def _share(self, images: Sequence[Image]) -> tuple[list[_Weighted], int]:
        """This rank's packed sequences, as many as every rank has, and the number of scored tokens of all ranks. Images
        are dealt by number, because how many tokens one has is known only once it is encoded, which each rank does for
        its own."""
        ranks = self._zero.ranks
        own = [reference_branches(self._zero.reasoner, samples) for samples in images[ranks.rank :: ranks.count]]
        sequences = [(trees, 1.0) for trees in micro_batches(own, self._zero.config.micro_batch_tokens)]
        (tokens,) = ranks.summed(sum(len(answer) for tree in own for answer in tree.scored))
        return ranks.with_idle(sequences, lambda: ([self._first_query(images[0])], 0.0)), tokens

    def _first_query(self, image: Image) -> Branches:
        """The image's prefix tree with its first branch alone, which surely fits into a packed sequence."""
        tree = reference_branches(self._zero.reasoner, image)
        return replace(tree, branches=tree.branches[:1], unscored=tree.unscored[:1])


def reference_branches(reasoner: Reasoner, samples: Sequence[Sample]) -> Branches:
    """The samples of one image as a prefix tree. The prefix is the longest one that their prompts share; each branch is
    the rest of a prompt, unscored, followed by its reference answer in the reasoner's coordinate frame."""
    image = reasoner.encode_image(samples[0].image())
    prompts = [reasoner.encode(sample.query, image).token_ids for sample in samples]
    shared = _shared_length(prompts)
    answers = [reasoner.completion_ids(reasoner.reference_answer(sample)) for sample in samples]
    return Branches(
        prefix=EncodedPrompt(token_ids=prompts[0][:shared], image=image),
        branches=[torch.cat([prompt[shared:], answer]) for prompt, answer in zip(prompts, answers, strict=True)],
        unscored=[len(prompt) - shared for prompt in prompts],
    )


def _shared_length(prompts: Sequence[torch.Tensor]) -> int:
    """Length of the longest common prefix."""
    shortest = min(map(len, prompts))
    first = prompts[0][:shortest]
    agree = torch.stack([prompt[:shortest] == first for prompt in prompts]).all(dim=0)
    # The running product is 1 up to the first disagreement and 0 after it.
    return int(agree.long().cumprod(0).sum())
