"""The trained model as a module with one forward: a packed sequence in, scores of its tokens out."""

from collections.abc import Sequence
from typing import Any

import torch

from learner.attention import use_shared_prefix
from learner.config import Part
from learner.shared_prefix import PackedSequence, TokenScores, branch_scores


class Policy(torch.nn.Module):
    """A reasoner's model together with its sampling distribution.

    temperature: of sampling. forbidden: token ids that are never sampled, and so have probability 0. entropy_learns:
    the entropy has a gradient.

    DeepSpeed wraps this module rather than the model, so that one forward call is one micro-batch to its hooks.
    """

    def __init__(
        self, model: Any, *, temperature: float, forbidden: tuple[int, ...], entropy_learns: bool = False
    ) -> None:
        super().__init__()
        use_shared_prefix(model)
        self.model = model
        self.temperature, self.entropy_learns = temperature, entropy_learns
        # A buffer, so that it moves to the model's device; int64, which no cast to bfloat16 touches.
        self.register_buffer("forbidden", torch.tensor(forbidden, dtype=torch.int64), persistent=False)

    def forward(self, packed: PackedSequence) -> TokenScores:
        """Log-prob and entropy of each scored token."""
        assert isinstance(self.forbidden, torch.Tensor)
        return branch_scores(
            self.model,
            packed,
            temperature=self.temperature,
            forbidden=self.forbidden,
            entropy_learns=self.entropy_learns,
        )


def freeze(model: Any, parts: Sequence[Part]) -> None:
    """Freeze these parts of a Qwen-VL model, and let all others learn."""
    visual = model.model.visual.requires_grad_("vision_tower" not in parts)
    # The deepstack mergers of Qwen3-VL project features of inner vision layers to tokens, as the merger does.
    for merger in (visual.merger, *getattr(visual, "deepstack_merger_list", ())):
        merger.requires_grad_("merger" not in parts)
    for part in (model.model.language_model, model.lm_head):
        part.requires_grad_("language_model" not in parts)
