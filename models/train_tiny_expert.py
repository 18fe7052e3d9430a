"""Train the tiny expert from scratch on phantoms: `python -m models.train_tiny_expert --minutes 20`.

Each image is embedded once and decoded for one prompt of each kind in `PROMPT_KINDS`. No phantom is used twice.
"""

import math
import tempfile
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
from torch import Tensor, distributed
from torch.multiprocessing.spawn import spawn
from torch.nn import functional

from actors.experts.protocol import Expert
from actors.experts.registry import TINY_FOLDER, load_expert
from actors.experts.sam import build_sam
from actors.experts.sam_config import SamConfig, config_json
from actors.experts.weights import save_weights
from phantoms import MODALITIES, Phantom, draw
from umrg.atomic import write_text
from umrg.frames import Size, rescale
from umrg.keypoints import reference_points, tight_box
from umrg.metrics import mask_dice

TINY = SamConfig(
    image_side=224,
    patch=14,
    window=8,
    encoder_dim=128,
    encoder_depth=4,
    encoder_heads=2,
    global_layers=(2,),
    prompt_dim=128,
    decoder_heads=4,
    decoder_mlp_dim=256,
    multimask_outputs=0,
)
PHANTOM_SIDE = 224
TRAINING, HELD_OUT = 0, 1
"""Random streams, which never share a phantom."""


@dataclass(frozen=True, kw_only=True)
class PromptKind:
    """The composition of a prompt: with or without a box, and the number of points."""

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
    """Hyperparameters of a training run."""

    minutes: float
    """Time budget; the learning-rate schedule follows the clock."""
    seed: int = 0
    processes: int = 2
    batch: int = 4
    """Images per step and process."""
    lr: float = 1e-3
    warmup: float = 0.03
    """Fraction of the time budget."""
    weight_decay: float = 0.01


def loosened(box: tuple[int, int, int, int], rng: np.random.Generator) -> NDArray[np.float64]:
    """An inaccurate box, like those of annotators and reasoners: each edge is moved by a random distance between 5 % of
    the side inward and 25 % outward."""
    x1, y1, x2, y2 = box
    sides = np.array([x1 - x2, y1 - y2, x2 - x1, y2 - y1]) + np.array([-1, -1, 1, 1])
    moved = np.array(box) + sides * rng.uniform(-0.05, 0.25, size=4)
    clipped: NDArray[np.float64] = np.clip(moved, 0, PHANTOM_SIDE - 1)
    return clipped


def two_points(mask: NDArray[np.bool_], rng: np.random.Generator) -> NDArray[np.float64]:
    """Two points in the mask, [2, 2] XY in random order: with probability 0.5 the reference points, else any pixels."""
    if rng.random() < 0.5:
        points = np.array(reference_points(mask))
    else:
        rows, columns = np.nonzero(mask)
        pixels = rng.integers(len(rows), size=2)
        points = np.stack([columns[pixels], rows[pixels]], axis=1)
    return rng.permutation(points).astype(np.float64)


def example(phantom: Phantom, rng: np.random.Generator) -> dict[str, Tensor]:
    """An image with one prompt of each kind, each about one of its targets; coordinates are in the expert frame.

    Returns `image`, uint8 [side, side, 3]; `boxes`, [kinds, 4]; `points`, [kinds, 2, 2]; and `masks`, float
    [kinds, h, w] on the grid of the logits, the fraction of each cell that the mask covers.
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


def phantoms(seed: int, stream: int, rank: int = 0) -> Iterator[tuple[Phantom, np.random.Generator]]:
    """Endless phantoms of alternating modalities; streams and ranks never share a phantom."""
    rng = np.random.default_rng([seed, stream, rank])
    while True:
        for modality in rng.permutation(MODALITIES):
            yield draw(str(modality), rng, size=PHANTOM_SIDE), rng


def batches(recipe: Recipe, rank: int) -> Iterator[dict[str, Tensor]]:
    """Endless training batches, drawn on demand; ranks never share a phantom."""
    stream = phantoms(recipe.seed, TRAINING, rank)
    while True:
        examples = [example(*next(stream)) for _ in range(recipe.batch)]
        yield {field: torch.stack([each[field] for each in examples]) for field in examples[0]}


def fresh_sam(seed: int) -> Sam:
    """A model of the tiny sizes with random weights, except for its positional embedding.

    segment-anything initialises the encoder's positional embedding with zeros. Initialised with the positional encoding
    of prompts, the decoder learns to relate prompts to image positions much sooner.
    """
    torch.manual_seed(seed)
    sam = build_sam(TINY)
    with torch.no_grad():
        sam.image_encoder.pos_embed.copy_(sam.prompt_encoder.get_dense_pe().permute(0, 2, 3, 1))
    return sam


def decode_kind(sam: Sam, features: Tensor, kind: PromptKind, boxes: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B, h, w] and predicted IoU [B] for one prompt per image."""
    given = (points[:, : kind.points], torch.ones(len(points), kind.points)) if kind.points else None
    sparse, dense = sam.prompt_encoder(points=given, boxes=boxes if kind.box else None, masks=None)
    # The decoder repeats a single image for all prompts. As it adds the dense prompts to the image, a batch of
    # different images can be passed through them.
    logits, scores = sam.mask_decoder(
        image_embeddings=torch.zeros_like(features[:1]),
        image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense + features,
        multimask_output=False,
    )
    return logits[:, 0], scores[:, 0]


def soft_overlap(probability: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Soft Dice [n] and IoU [n] of masks [n, h, w] with values in [0, 1]."""
    intersection = (probability * masks).sum((1, 2))
    total = probability.sum((1, 2)) + masks.sum((1, 2))
    return 2 * intersection / total.clamp(min=1e-6), intersection / (total - intersection).clamp(min=1e-6)


def mask_loss(logits: Tensor, scores: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, a mean over prompts of cross entropy + Dice loss + squared error of the predicted IoU; and the Dice [n]
    of the thresholded masks. Masks are the covered fractions of cells.

    SAM itself uses a focal loss of weight 20 in place of the cross entropy (Kirillov et al., 2023, appendix A). From
    random weights, that leads to empty masks for thousands of images.
    """
    entropy = functional.binary_cross_entropy_with_logits(logits, masks, reduction="none").mean((1, 2))
    soft_dice, _ = soft_overlap(logits.sigmoid(), masks)
    with torch.no_grad():
        dice, iou = soft_overlap((logits > 0).float(), (masks > 0.5).float())
    return (entropy + (1 - soft_dice) + (scores - iou) ** 2).mean(), dice


def step_loss(sam: Sam, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The loss of a batch, a mean over all kinds of prompts, and the Dice [kinds] of each."""
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
    """Linear warm-up and cosine decay to zero. progress: the fraction of the time budget that is spent."""
    warmed = min(1.0, progress / recipe.warmup)
    return recipe.lr * warmed * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def average_over_ranks(tensors: list[Tensor]) -> None:
    """Replace each tensor, in place, by its mean over all processes."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    distributed.all_reduce(flat)
    parts = (flat / distributed.get_world_size()).split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


def train(sam: Sam, recipe: Recipe, rank: int) -> None:
    """Train for the recipe's minutes as one of several processes. The first prints its progress every ten seconds."""
    parameters = [parameter for parameter in sam.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=recipe.weight_decay, betas=(0.9, 0.98))
    start, reported, running, spent = time.monotonic(), 0.0, torch.zeros(len(PROMPT_KINDS)), torch.zeros(())
    for step, batch in enumerate(batches(recipe, rank), start=1):
        loss, dices = step_loss(sam, batch)
        optimizer.zero_grad()
        loss.backward()
        spent.fill_(time.monotonic() - start)
        # The elapsed time is averaged together with the gradients, so that all processes stop at the same step.
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        average_over_ranks([*gradients, dices, spent])
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        progress = spent.item() / (60 * recipe.minutes)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, progress)
        optimizer.step()
        running.lerp_(dices, max(0.01, 1 / step))
        if rank == 0 and spent >= reported + 10:
            reported = spent.item()
            report_progress(recipe, step, reported, loss.item(), running)
        if progress >= 1:
            return


def report_progress(recipe: Recipe, step: int, seconds: float, loss: float, dices: Tensor) -> None:
    rate = step * recipe.batch * recipe.processes / seconds
    dice = ", ".join(f"{kind.name} {dice:.3f}" for kind, dice in zip(PROMPT_KINDS, dices, strict=True))
    print(f"{seconds:5.0f} s, {rate:4.1f} images/s, loss {loss:.3f}, Dice: {dice}", flush=True)


def train_process(rank: int, recipe: Recipe, meeting: str, out: Path) -> None:
    """Run one training process, of which the first writes the expert into `out`. Each uses a single thread: on few
    cores, several such processes are faster than one with several threads, and other load does not stall them."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=recipe.processes)
    sam = fresh_sam(recipe.seed)
    train(sam, recipe, rank)
    distributed.destroy_process_group()
    if rank == 0:
        save_weights(sam.state_dict(), out / "model.safetensors", metadata={"name": "tiny"})
        write_text(out / "config.json", config_json(TINY))


def held_out(count: int, seed: int = 0) -> list[Phantom]:
    """Phantoms that are never drawn in training."""
    stream = phantoms(seed, HELD_OUT)
    return [next(stream)[0] for _ in range(count)]


def dice_by_prompt(expert: Expert, images: list[Phantom]) -> dict[str, float]:
    """Mean Dice over all targets of the images, by kind of prompt: parts of the reference, and looser boxes."""
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
    out: Annotated[Path, typer.Option(help="Folder for config.json and model.safetensors.")] = TINY_FOLDER,
    processes: Annotated[int, typer.Option(help="Training processes, each with one thread.")] = 2,
) -> None:
    """Train the tiny expert, write it, and print its Dice on held-out phantoms."""
    recipe = Recipe(minutes=minutes, seed=seed, processes=processes)
    with tempfile.TemporaryDirectory() as folder:
        spawn(train_process, args=(recipe, f"{folder}/meeting", out), nprocs=processes)
    parameters = sum(parameter.numel() for parameter in build_sam(TINY).parameters())
    print(f"{out}: {parameters / 1e6:.2f} M parameters")
    torch.set_num_threads(1)
    for name, dice in dice_by_prompt(load_expert(str(out)), held_out(64)).items():
        print(f"{name}: Dice {dice:.3f}")


if __name__ == "__main__":
    typer.run(main)
