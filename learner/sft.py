"""Supervised fine-tuning: the reference answer's tokens made likely, through the learner's own forward."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from learner.attention import use_shared_prefix
from learner.config import OptimizerConfig
from learner.reasoner import EncodedPrompt, Reasoner
from learner.schedule import lr_share
from learner.shared_prefix import Branches, branch_scores, micro_batches, pack_groups
from umrg.answers import format_answer
from umrg.frames import Frame, Frames
from umrg.sample import Sample


@dataclass(frozen=True, kw_only=True)
class SftStep:
    """What one step reports. loss: mean negative log-likelihood a token, in nats. grad_norm: before clipping."""

    step: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int


def train_sft(
    reasoner: Reasoner,
    batches: Iterable[Sequence[Sequence[Sample]]],
    steps: int,
    optimizer: OptimizerConfig,
    report: Callable[[SftStep], None],
) -> None:
    """Train in place, one step a batch. A batch is a list of images, each given as the samples that ask about it.
    Raises FloatingPointError where the loss is no longer finite, before the weights take it in."""
    model = reasoner.model.train()
    use_shared_prefix(model)
    adam = torch.optim.AdamW(
        model.parameters(),
        lr=optimizer.lr,
        weight_decay=optimizer.weight_decay,
        betas=optimizer.betas,
        eps=optimizer.eps,
        fused=True,
    )
    for step, images in zip(range(steps), batches, strict=False):
        lr = optimizer.lr * lr_share(step, steps, optimizer)
        for group in adam.param_groups:
            group["lr"] = lr
        adam.zero_grad(set_to_none=True)
        loss, tokens = _accumulate(reasoner, images, optimizer.micro_batch_tokens)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss of step {step} is {loss}; lower learner.lr")
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), optimizer.max_grad_norm)
        adam.step()
        report(SftStep(step=step, loss=loss, grad_norm=norm.item(), lr=lr, tokens=tokens))
    model.eval()


def _accumulate(reasoner: Reasoner, images: Sequence[Sequence[Sample]], max_tokens: int) -> tuple[float, int]:
    """Gradients of the mean loss over all scored tokens of a batch; that loss, and how many tokens."""
    groups = [reference_branches(reasoner, samples) for samples in images]
    total = sum(len(tokens) for group in groups for tokens in group.scored)
    summed = 0.0
    for batch in micro_batches(groups, max_tokens):
        loss = -branch_scores(reasoner.model, pack_groups(batch, reasoner.model)).logprobs.sum() / total
        loss.backward()
        summed += loss.item()
    return summed, total


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
    if not sample.reasoning:
        raise ValueError(f"sample {sample.id!r} has no extra_info.reasoning to learn from; set think=false or add it")
    return sample.reasoning
