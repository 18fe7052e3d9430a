"""Second stage of training the tiny reasoner: its first layers learn to encode the position of each image token.

The model knows positions only through its rotary embedding, as differences; an image token's features do not contain
its position. A linear head predicts row and column from each image token's state after `LAYERS` layers. The vision
tower is frozen, so its features are computed once. The head is discarded. After this stage the model can read a
position off a token that it attends to; without it, supervised fine-tuning takes thousands of rows until the model
attends to the image at all.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from reasoner.model import Reasoner
from reasoner.prompter import EncodedImage
from umrg.dataset import Dataset

LAYERS = 2  # of the four, so that later layers can use the positions


@dataclass(frozen=True, kw_only=True)
class PositionRecipe:
    """Hyperparameters of this stage."""

    steps: int = 250
    images: int = 640
    """How many images are used, all of the same size."""
    batch: int = 24
    """Images per step."""
    lr: float = 1e-3
    seed: int = 0


def learn_positions(reasoner: Reasoner, dataset: Dataset, recipe: PositionRecipe) -> float:
    """Train the first layers in place. Returns the fraction of the last batch's image tokens whose row and column were
    both predicted correctly. All images must have the same size."""
    images = _encoded_images(reasoner, dataset, recipe)
    visual, text = reasoner.model.model.visual, reasoner.model.model.language_model
    with torch.no_grad():
        tokens = torch.stack([visual(image.pixel_values, image.grid_thw).pooler_output for image in images])
    prompt = _prompt_to_image(reasoner, images[0])
    places = _places(images[0])
    sizes = (places.max(dim=1).values + 1).tolist()
    head = torch.nn.Linear(tokens.shape[-1], sum(sizes))
    parameters = [*text.layers[:LAYERS].parameters(), *text.embed_tokens.parameters(), *head.parameters()]
    adam = torch.optim.AdamW(parameters, lr=recipe.lr, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, recipe.lr, total_steps=recipe.steps, pct_start=0.1)
    rng = np.random.default_rng(recipe.seed)
    right = 0.0
    for _ in range(recipe.steps):
        batch = tokens[torch.from_numpy(rng.integers(len(tokens), size=recipe.batch))]
        read = head(_early_states(reasoner.model, prompt, batch)).split(sizes, dim=-1)
        loss = torch.stack([_cross_entropy(logits, place) for logits, place in zip(read, places, strict=True)]).sum()
        adam.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        schedule.step()
        hits = [logits.argmax(-1) == place for logits, place in zip(read, places, strict=True)]
        right = torch.stack(hits).all(dim=0).float().mean().item()
    return right


@dataclass(frozen=True, kw_only=True)
class _Prompt:
    """A prompt up to its last image token."""

    token_ids: torch.Tensor
    """int64 [P]."""
    position_ids: torch.Tensor
    """M-RoPE positions [3, 1, P]."""


def _encoded_images(reasoner: Reasoner, dataset: Dataset, recipe: PositionRecipe) -> list[EncodedImage]:
    images = dataset.rows_by_image()
    order = np.random.default_rng(recipe.seed).permutation(len(images))[: recipe.images]
    return [reasoner.encode_image(dataset[images[i][0]].image()) for i in order]


def _prompt_to_image(reasoner: Reasoner, image: EncodedImage) -> _Prompt:
    ids = reasoner.encode("", image).token_ids
    is_image = ids == reasoner.model.config.image_token_id
    ids = ids[: int(is_image.nonzero().max()) + 1]
    positions, _ = reasoner.model.model.get_rope_index(
        ids[None], mm_token_type_ids=is_image[None, : len(ids)].int(), image_grid_thw=image.grid_thw
    )
    return _Prompt(token_ids=ids, position_ids=positions)


def _places(image: EncodedImage) -> torch.Tensor:
    """Row and column [2, n] of each image token."""
    # An image token merges 2×2 patches.
    _, rows, columns = (int(side) // 2 for side in image.grid_thw[0])
    return torch.stack([torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)])


def _early_states(model: Any, prompt: _Prompt, tokens: torch.Tensor) -> torch.Tensor:
    """States [B, n, d] of image tokens [B, n, d] after `LAYERS` layers, normalised as at the next layer's input."""
    text, (images, count, width) = model.model.language_model, tokens.shape
    start = text.embed_tokens(prompt.token_ids[:-count]).expand(images, -1, -1)
    states = text(
        inputs_embeds=torch.cat([start, tokens], dim=1),
        position_ids=prompt.position_ids.expand(-1, images, -1),
        output_hidden_states=True,
        use_cache=False,
    ).hidden_states[LAYERS]
    return functional.rms_norm(states[:, -count:], (width,))


def _cross_entropy(logits: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), place.repeat(len(logits)))
