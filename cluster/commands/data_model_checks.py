"""Checks of rows against the models that will use them: a reasoner's limits, and an expert's ceiling."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from actors.experts.drawing import reference_mask
from actors.experts.protocol import Embedding, Expert
from actors.experts.registry import load_expert
from cluster.lengths import RowLimit
from reasoner.prompter import Prompter, load_prompter
from umrg.checks import IMAGE_SHRUNK, LOW_CEILING, OVER_LIMIT, CheckedRow, Finding
from umrg.config import model_folder
from umrg.metrics import mask_dice
from umrg.prompts import ReasonerConfig
from umrg.sample import Sample

CEILING = 0.6
"""The least Dice that an expert should reach with the reference box and points."""


class PromptLimits:
    """Checks the length of prompts against a model's context length and a run's `rollout.max_prompt_tokens`, and
    whether images must be shrunk."""

    def __init__(self, prompter: Prompter, max_tokens: int) -> None:
        self._prompter, self._limit = prompter, RowLimit(prompter, max_tokens, "rollout.max_prompt_tokens")

    def __call__(self, checked: CheckedRow) -> Iterator[Finding]:
        sample = checked.sample
        if sample is None or checked.pixels is None:
            return
        tokens, fault = self._limit.measure(sample)
        if fault:
            yield Finding(check=OVER_LIMIT, message=f"the row {fault}", degree=tokens)
        if tokens:
            yield from self._shrunk(sample)

    def _shrunk(self, sample: Sample) -> Iterator[Finding]:
        own = sample.size
        if own.width * own.height <= self._prompter.resize.max_pixels:
            return
        model = self._prompter.frames(own).model
        scale = model.long_side / own.long_side
        # A box that ends on the image's far edge is a pixel wider than the image.
        width, height = (
            min(side, round(scale * (sample.box[i + 2] - sample.box[i] + 1)))
            for i, side in enumerate((model.width, model.height))
        )
        message = (
            f"the image of {own.width}x{own.height} px becomes {model.width}x{model.height} for the model, its target "
            f"{width}x{height}; crop it, or raise max_pixels"
        )
        yield Finding(check=IMAGE_SHRUNK, message=message, degree=1 / scale)


class Oracle:
    """Checks the Dice that an expert reaches with the reference box and points, the ceiling of any answer. Consecutive
    rows of one image share its embedding."""

    def __init__(self, expert: Expert) -> None:
        self._expert = expert
        self._embedded: tuple[bytes | None, Embedding | None] = (None, None)

    def __call__(self, checked: CheckedRow) -> Iterator[Finding]:
        sample, mask = checked.sample, checked.mask
        if not checked.usable or sample is None or mask is None or not mask.any():
            return
        dice = mask_dice(self.mask(sample, checked.pixels), mask)
        if dice < CEILING:
            message = (
                f"the expert {self._expert.name} reaches Dice {dice:.2f}, under {CEILING:g}, from the reference box "
                "and points; check them and the mask, or take another expert"
            )
            yield Finding(check=LOW_CEILING, message=message, degree=1 - dice)

    def mask(self, sample: Sample, pixels: bytes | None = None) -> NDArray[np.bool_]:
        """The expert's mask, bool [H, W]. pixels: digest of the image, by which its embedding is found again."""
        known, embedding = self._embedded
        if embedding is None or pixels is None or pixels != known:
            embedding = self._expert.embed(sample.image())
            self._embedded = (pixels, embedding)
        return reference_mask(self._expert, embedding, sample.box, sample.points)


def prompt_limits(model: Path, max_tokens: int, max_pixels: int | None = None) -> PromptLimits:
    """The check against a model folder. max_pixels: as in a run's configuration. Raises ValueError where it is none."""
    spec = ReasonerConfig(model=model, max_pixels=max_pixels).spec()
    return PromptLimits(load_prompter(model_folder(model), spec), max_tokens)


def load_oracle(expert: str) -> Oracle:
    """The check with the expert of that name, on a GPU where there is one. Raises ValueError for an unknown name."""
    return Oracle(load_expert(expert, device="cuda" if torch.cuda.is_available() else "cpu"))
