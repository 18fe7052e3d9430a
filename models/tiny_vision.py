"""First stage of training the tiny reasoner: its vision tower learns to locate structures from coarse boxes alone.

A language-model loss is a weak signal for a vision tower with random weights. Here a linear head on each image token
predicts, for every category, which of the token's 4×4 cells (7×7 px each) lie within the category's coarse box. The
loss covers only categories that a row asks about, because the positions of others are unknown. The head is discarded.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from torch.nn import functional

from reasoner.model import Reasoner
from reasoner.prompter import EncodedImage
from umrg.dataset import Dataset
from umrg.frames import Box, Frame, Frames
from umrg.sample import Sample
from umrg.shuffling import Cursor, batches

CELLS = 4  # along each side of an image token
TOKEN_SCALE = 0.15  # root mean square of the image features after this stage; see `_quieten`
FEWEST_STEPS = 4  # so that the learning-rate schedule works with very few images too


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """Hyperparameters of this stage."""

    passes: float = 3.0
    """Epochs over the images."""
    batch: int = 32
    """Images per step."""
    lr: float = 1e-3
    weight_decay: float = 0.05
    seed: int = 0


def pretrain_vision(reasoner: Reasoner, dataset: Dataset, recipe: Pretraining) -> list[float]:
    """Train the vision tower in place. Returns the loss of each step, in nats per cell."""
    categories = {name: i for i, name in enumerate(sorted({info.category for info in dataset.infos}))}
    visual = reasoner.model.model.visual.train()
    head = torch.nn.Linear(reasoner.model.config.text_config.hidden_size, len(categories) * CELLS**2)
    parameters = [*visual.parameters(), *head.parameters()]
    adam = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    steps = max(FEWEST_STEPS, int(recipe.passes * len(dataset.rows_by_image()) / recipe.batch))
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, recipe.lr, total_steps=steps, pct_start=0.05)
    losses = []
    for images in track(_image_batches(dataset, recipe, steps), "vision", total=steps):
        loss = _loss(reasoner, head, images, categories)
        adam.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        schedule.step()
        losses.append(loss.item())
        if len(losses) % 50 == 0:
            print(f"step {len(losses)}/{steps}  loss {np.mean(losses[-50:]):.4f}", flush=True)
    _quieten(reasoner, dataset)
    return losses


def _quieten(reasoner: Reasoner, dataset: Dataset) -> None:
    """Scale the tower's output to a root mean square of `TOKEN_SCALE`.

    After training with the head it is 20 times as large as the updates that the language model's layers add to a token.
    Image tokens could then not take up their position, which only those layers know.
    """
    image = reasoner.encode_image(dataset[0].image())
    with torch.no_grad():
        tokens = reasoner.model.model.visual(image.pixel_values, image.grid_thw).pooler_output
        last = reasoner.model.model.visual.merger.mlp[-1]
        scale = TOKEN_SCALE / tokens.pow(2).mean().sqrt()
        last.weight.mul_(scale)
        last.bias.mul_(scale)


def _image_batches(dataset: Dataset, recipe: Pretraining, steps: int) -> Iterator[list[list[Sample]]]:
    images = dataset.rows_by_image()
    for _, (chosen, _) in zip(range(steps), batches(images, recipe.batch, Cursor(seed=recipe.seed)), strict=False):
        yield [dataset.samples(images[image]) for image in chosen]


def _loss(
    reasoner: Reasoner, head: torch.nn.Linear, images: Sequence[Sequence[Sample]], categories: dict[str, int]
) -> torch.Tensor:
    encoded = [reasoner.encode_image(samples[0].image()) for samples in images]
    tokens = reasoner.model.model.visual(
        torch.cat([image.pixel_values for image in encoded]), torch.cat([image.grid_thw for image in encoded])
    ).pooler_output
    logits = head(tokens).split([image.tokens for image in encoded])
    scored, targets = [], []
    for image, samples, own in zip(encoded, images, logits, strict=True):
        cells = own.view(image.tokens, len(categories), CELLS**2)
        for sample in samples:
            scored.append(cells[:, categories[sample.category]].flatten())
            targets.append(torch.from_numpy(covered_cells(image, sample.box)).flatten())
    return functional.binary_cross_entropy_with_logits(torch.cat(scored), torch.cat(targets))


def covered_cells(image: EncodedImage, box: Box) -> NDArray[np.float32]:
    """The fraction of each cell that a box (XYXY, original pixels) covers, [tokens, CELLS²], with tokens and the cells
    of each token in row-major order."""
    frames: Frames = image.frames
    left, top, right, bottom = frames.box(box, Frame.ORIGINAL, Frame.MODEL)
    # An image token merges 2×2 patches.
    _, rows, columns = (int(n) // 2 for n in image.grid_thw[0])
    across = _overlap(left, right + 1, columns * CELLS, frames.model.width)
    down = _overlap(top, bottom + 1, rows * CELLS, frames.model.height)
    grid = np.outer(down, across).reshape(rows, CELLS, columns, CELLS)
    return grid.transpose(0, 2, 1, 3).reshape(rows * columns, CELLS**2).astype(np.float32)


def _overlap(start: float, end: float, cells: int, extent: int) -> NDArray[np.float64]:
    edges = np.linspace(0, extent, cells + 1)
    covered: NDArray[np.float64] = np.minimum(edges[1:], end) - np.maximum(edges[:-1], start)
    return np.maximum(covered, 0) / (extent / cells)
