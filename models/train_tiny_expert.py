"""Train the tiny expert from nothing on phantoms: `python -m models.train_tiny_expert --minutes 20`.

Each image is embedded once and decoded for one prompt of each kind in `PROMPT_KINDS`, as a group of answers
is in training. Phantoms are drawn in a worker process and never seen twice.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from segment_anything.modeling import Sam
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from actors.experts.config import SamConfig, config_json
from actors.experts.protocol import Expert
from actors.experts.sam import SamExpert, build_sam
from actors.experts.weights import save_weights, written_aside
from umrg.frames import Size, rescale
from umrg.keypoints import reference_points, tight_box
from umrg.metrics import mask_dice
from umrg.phantoms import MODALITIES, Phantom, draw

TINY = SamConfig(
    image_side=224,
    patch=8,
    window=7,
    encoder_dim=128,
    encoder_depth=4,
    encoder_heads=2,
    global_layers=(2,),
    prompt_dim=64,
    decoder_mlp_dim=256,
    multimask_outputs=0,
)
PHANTOM_SIDE = 224
TRAINING, HELD_OUT = 0, 1


@dataclass(frozen=True, kw_only=True)
class PromptKind:
    """What a prompt is made of: a box or none, and how many points."""

    name: str
    box: bool
    points: int


PROMPT_KINDS = (
    PromptKind(name="box and points", box=True, points=2),
    PromptKind(name="box", box=True, points=0),
    PromptKind(name="two points", box=False, points=2),
    PromptKind(name="one point", box=False, points=1),
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of a training run. `minutes` is the whole budget: the learning rate follows the clock."""

    minutes: float
    seed: int = 0
    batch: int = 16
    lr: float = 1e-3
    warmup: float = 0.03
    weight_decay: float = 0.01


def loosened(box: tuple[int, int, int, int], rng: np.random.Generator) -> NDArray[np.float64]:
    """A box as an annotator or a reasoner would draw it: each edge from 5 % of the side inward to 25 % outward."""
    x1, y1, x2, y2 = box
    sides = np.array([x1 - x2, y1 - y2, x2 - x1, y2 - y1]) + np.array([-1, -1, 1, 1])
    moved = np.array(box) + sides * rng.uniform(-0.05, 0.25, size=4)
    return np.clip(moved, 0, PHANTOM_SIDE - 1)


def two_points(mask: NDArray[np.bool_], rng: np.random.Generator) -> NDArray[np.float64]:
    """Two points in the mask, [2, 2] XY in random order: the reference ones half of the time, else any two."""
    if rng.random() < 0.5:
        points = np.array(reference_points(mask))
    else:
        rows, columns = np.nonzero(mask)
        pixels = rng.integers(len(rows), size=2)
        points = np.stack([columns[pixels], rows[pixels]], axis=1)
    return rng.permutation(points).astype(np.float64)


def example(phantom: Phantom, rng: np.random.Generator) -> dict[str, Tensor]:
    """An image with one prompt of each kind, each about one of its targets; coordinates in the expert frame.

    image: uint8 [side, side, 3]. boxes: [kinds, 4]. points: [kinds, 2, 2]. masks: float [kinds, h, w] on the
    grid of the logits, the share of each cell that the mask covers.
    """
    order = rng.permutation(len(phantom.targets))
    masks = [phantom.targets[order[i % len(order)]].mask for i in range(len(PROMPT_KINDS))]
    boxes = np.stack([loosened(tight_box(mask), rng) for mask in masks])
    points = np.stack([two_points(mask, rng) for mask in masks])
    original, content = Size(PHANTOM_SIDE, PHANTOM_SIDE), Size(TINY.image_side, TINY.image_side)
    covered = functional.adaptive_avg_pool2d(torch.from_numpy(np.stack(masks)).float(), 4 * TINY.grid)
    return {
        "image": torch.from_numpy(ResizeLongestSide(TINY.image_side).apply_image(phantom.image)),
        "boxes": torch.from_numpy(rescale(boxes, original, content)).float(),
        "points": torch.from_numpy(rescale(points, original, content)).float(),
        "masks": covered,
    }


def phantoms(seed: int, stream: int, worker: int = 0) -> Iterator[tuple[Phantom, np.random.Generator]]:
    """Phantoms without end, all modalities in turn; streams and workers never share one."""
    rng = np.random.default_rng([seed, stream, worker])
    while True:
        for modality in rng.permutation(MODALITIES):
            yield draw(str(modality), rng, size=PHANTOM_SIDE), rng


class Examples(IterableDataset[dict[str, Tensor]]):
    """Training examples without end, drawn as they are asked for."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = get_worker_info()
        for phantom, rng in phantoms(self.seed, TRAINING, worker.id if worker else 0):
            yield example(phantom, rng)


def decode_kind(sam: Sam, features: Tensor, kind: PromptKind, boxes: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B, h, w] and predicted IoU [B] of one prompt an image."""
    given = (points[:, : kind.points], torch.ones(len(points), kind.points)) if kind.points else None
    sparse, dense = sam.prompt_encoder(points=given, boxes=boxes if kind.box else None, masks=None)
    # the decoder repeats one image for its prompts; images that differ enter through the dense prompt, as a sum
    logits, scores = sam.mask_decoder(
        image_embeddings=torch.zeros_like(features[:1]),
        image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense + features,
        multimask_output=False,
    )
    return logits[:, 0], scores[:, 0]


def soft_overlap(probability: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Dice and IoU, [n] each, of masks in [0, 1], [n, h, w]."""
    intersection = (probability * masks).sum((1, 2))
    total = probability.sum((1, 2)) + masks.sum((1, 2))
    return 2 * intersection / total.clamp(min=1e-6), intersection / (total - intersection).clamp(min=1e-6)


def mask_loss(logits: Tensor, scores: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """SAM's loss, 20 focal + Dice + squared error of the predicted IoU (Kirillov et al., 2023, appendix A), as
    a mean over prompts; and the Dice [n] of the thresholded masks. Masks may cover a cell partly."""
    probability = logits.sigmoid()
    entropy = functional.binary_cross_entropy_with_logits(logits, masks, reduction="none")
    focal = (entropy * (probability - masks) ** 2).mean((1, 2))
    soft_dice, _ = soft_overlap(probability, masks)
    with torch.no_grad():
        dice, iou = soft_overlap((logits > 0).float(), (masks > 0.5).float())
    return (20 * focal + (1 - soft_dice) + (scores - iou) ** 2).mean(), dice


def step_loss(sam: Sam, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Loss of a batch over all prompt kinds, and Dice [kinds] of each."""
    images = sam.preprocess(batch["image"].permute(0, 3, 1, 2))
    features = sam.image_encoder(images)
    losses, dices = [], []
    for i, kind in enumerate(PROMPT_KINDS):
        logits, scores = decode_kind(sam, features, kind, batch["boxes"][:, i], batch["points"][:, i])
        loss, dice = mask_loss(logits, scores, batch["masks"][:, i])
        losses.append(loss)
        dices.append(dice.mean())
    return torch.stack(losses).mean(), torch.stack(dices)


def learning_rate(recipe: Recipe, progress: float) -> float:
    """Linear warm-up, then a cosine to zero; `progress` is the share of the time budget that is spent."""
    warmed = min(1.0, progress / recipe.warmup)
    return recipe.lr * warmed * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def train(sam: Sam, recipe: Recipe) -> None:
    """Train for the recipe's minutes, with a line of progress every ten seconds."""
    optimizer = torch.optim.AdamW(sam.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay, betas=(0.9, 0.98))
    loader = DataLoader(Examples(recipe.seed), batch_size=recipe.batch, num_workers=1, prefetch_factor=4)
    sam.train()
    start = reported = time.monotonic()
    running: Tensor | None = None
    for step, batch in enumerate(loader, start=1):
        now = time.monotonic()
        progress = (now - start) / (60 * recipe.minutes)
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, progress)
        loss, dices = step_loss(sam, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(sam.parameters(), 1.0)
        optimizer.step()
        running = dices if running is None else running.lerp(dices, 0.05)
        if now - reported >= 10:
            reported = now
            rate = step * recipe.batch / (now - start)
            report = ", ".join(f"{kind.name} {dice:.3f}" for kind, dice in zip(PROMPT_KINDS, running, strict=True))
            print(
                f"{now - start:5.0f} s, {rate:4.1f} images/s, loss {loss.item():.3f}, Dice: {report}",
                flush=True,
            )


def held_out(count: int, seed: int = 0) -> list[Phantom]:
    """Phantoms that no training draws."""
    stream = phantoms(seed, HELD_OUT)
    return [next(stream)[0] for _ in range(count)]


def dice_by_prompt(expert: Expert, images: list[Phantom]) -> dict[str, float]:
    """Mean Dice over all targets of the images, by kind of prompt: reference box and points, less, and looser."""
    dices: dict[str, list[float]] = {}
    for phantom in images:
        embedding = expert.embed(phantom.image)
        masks = [target.mask for target in phantom.targets]
        tight = np.array([tight_box(mask) for mask in masks], dtype=np.float32)
        points = np.array([reference_points(mask) for mask in masks], dtype=np.float32)
        loose = _scaled(tight, 1.2)
        prompts = {
            "box and points": (tight, points),
            "box": (tight, None),
            "two points": (None, points),
            "one point": (None, points[:, :1]),
            "box 20 % too loose, and points": (loose, points),
            "box 20 % too loose": (loose, None),
        }
        for name, (boxes, given) in prompts.items():
            decoded = expert.decode(embedding, boxes=boxes, points=given)
            dices.setdefault(name, []).extend(map(mask_dice, decoded.masks, masks))
    return {name: float(np.mean(values)) for name, values in dices.items()}


def _scaled(boxes: NDArray[np.float32], factor: float) -> NDArray[np.float32]:
    centre, half = (boxes[:, 2:] + boxes[:, :2]) / 2, (boxes[:, 2:] - boxes[:, :2] + 1) / 2 * factor
    return np.clip(np.concatenate([centre - half, centre + half], axis=1), 0, PHANTOM_SIDE - 1)


def main(
    minutes: Annotated[float, typer.Option(help="Time budget of the training.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the weights and the phantoms.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for config.json and model.safetensors.")] = Path(
        "models/tiny-expert"
    ),
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 2,
) -> None:
    """Train the tiny expert, write it, and print its Dice on held-out phantoms."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    sam = build_sam(TINY)
    print(f"{sum(parameter.numel() for parameter in sam.parameters()) / 1e6:.2f} M parameters")
    train(sam, Recipe(minutes=minutes, seed=seed))
    save_weights(sam.state_dict(), out / "model.safetensors", metadata={"name": "tiny"})
    with written_aside(out / "config.json") as aside:
        aside.write_text(config_json(TINY))
    for name, dice in dice_by_prompt(SamExpert(sam, TINY, name="tiny"), held_out(64)).items():
        print(f"{name}: Dice {dice:.3f}")


if __name__ == "__main__":
    typer.run(main)
