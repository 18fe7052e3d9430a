"""The trained model as a module with one forward: packed groups in, scores of their answers' tokens out."""

from collections.abc import Sequence
from typing import Any

import torch

from learner.attention import use_shared_prefix
from learner.config import Part
from learner.shared_prefix import PackedSequence, TokenScores, branch_scores


class Policy(torch.nn.Module):
    """A reasoner's model under the distribution that its answers are sampled from.

    temperature: of sampling. forbidden: token ids that are never sampled, and so have no probability.
    DeepSpeed wraps this, so that its hooks see one call a micro-batch.
    """

    def __init__(
        self, model: Any, *, temperature: float, forbidden: tuple[int, ...], entropy_learns: bool = False
    ) -> None:
        super().__init__()
        use_shared_prefix(model)
        self.model = model
        self.temperature, self.entropy_learns = temperature, entropy_learns
        self.register_buffer("forbidden", torch.tensor(forbidden, dtype=torch.int64), persistent=False)

    def forward(self, packed: PackedSequence) -> TokenScores:
        """Of the scored tokens."""
        assert isinstance(self.forbidden, torch.Tensor)
        return branch_scores(
            self.model,
            packed,
            temperature=self.temperature,
            forbidden=self.forbidden,
            entropy_learns=self.entropy_learns,
        )


def freeze(model: Any, parts: Sequence[Part]) -> None:
    """Let these parts of a Qwen-VL model stand still, and the others learn."""
    visual = model.model.visual.requires_grad_("vision_tower" not in parts)
    # Those of Qwen3-VL's deepstack turn features of inner layers into tokens.
    for merger in (visual.merger, *getattr(visual, "deepstack_merger_list", ())):
        merger.requires_grad_("merger" not in parts)
    for part in (model.model.language_model, model.lm_head):
        part.requires_grad_("language_model" not in parts)
