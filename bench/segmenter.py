"""An image's answers through our expert, and through segment-anything's SamPredictor once per answer, as the published
evaluation uses it: `python -m bench.segmenter`.

16 answers, a box and two points each, about an 840x840 image. The predictor's path embeds the image, predicts, takes
the mask of highest score and compares it with a reference, for each answer anew. Ours embeds once and decodes all
answers together. Both have the same modules and weights: those of `--shape vit_b` are random, those of `tiny` (the
bundled expert, seconds instead of minutes) are trained.

first_touch_ratio: cost of the predictor's path, divided by that of ours where the image is new.
cached_ratio: the same where the embedding is in memory. disk_ratio: where it is read from disk, in float16.
decoder_ratio: of segment-anything's decoder and ours, alone, both with all prompts at once.
embed_per_read: cost of a fresh embedding, divided by that of one from disk.
dice_equal: how many of the answers have exactly the predictor's Dice. pixels_unlike: pixels, of all masks, that are not
    the predictor's; largest_logit: the largest |logit| among them, beside logit_spread, the standard deviation of all.
batch_dice_equal: the same of the predictor's own batch of all answers, whose sums are rounded otherwise too.
disk_dice_shift: the largest difference of Dice that float16 on the disk makes.

Costs are seconds of one core (CPU time with one thread), so that other load on the machine matters little; the median
of the rounds, in which both sides take turns. The predictor's path is not run 16 times: the cost of embedding the image
is multiplied by the number of answers, and those of prediction and Dice are added up over all answers. A read from disk
is one from the page cache: of waiting for the disk itself nothing is counted.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from segment_anything import SamPredictor
from segment_anything.modeling import Sam

from actors.experts.cache import EmbeddingCache
from actors.experts.measuring import overlaps
from actors.experts.protocol import Embedding
from actors.experts.registry import TINY_FOLDER
from actors.experts.sam import SamExpert, build_sam, mask_decoder
from actors.experts.sam_config import VIT_B, read_config
from actors.experts.store import EmbeddingStore
from actors.experts.weights import load_into
from bench.expert_shapes import SIDE, Asked, asked, random_model
from bench.machine import processor
from bench.rewards import table
from umrg.frames import rescale
from umrg.metrics import mask_dice

ANSWERS = 16
SHAPES = ("vit_b", "tiny")


class Costs:
    """Seconds of one core of everything that was done, by its name."""

    def __init__(self) -> None:
        self._rounds: dict[str, list[float]] = {}

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        start = time.process_time()
        yield
        self._rounds.setdefault(name, []).append(time.process_time() - start)

    def __getitem__(self, name: str) -> float:
        return statistics.median(self._rounds[name])


class Predictor:
    """segment-anything's path, one answer after another."""

    def __init__(self, sam: Sam, work: Asked, *, multimask: bool) -> None:
        self._predictor, self._work, self._multimask = SamPredictor(sam), work, multimask

    def set_image(self) -> None:
        self._predictor.set_image(self._work.image)

    def best(self, i: int, *, logits: bool = False) -> NDArray[Any]:
        """[H, W], the mask of highest score for one answer, or its logits."""
        masks, scores, _ = self._predictor.predict(
            point_coords=self._work.points[i],
            point_labels=np.ones(len(self._work.points[i])),
            box=self._work.boxes[i],
            multimask_output=self._multimask,
            return_logits=logits,
        )
        best: NDArray[Any] = masks[int(scores.argmax())]
        return best

    def together(self) -> NDArray[np.bool_]:
        """[n, H, W], the masks of all answers by its own batch."""
        transform, size = self._predictor.transform, self._work.image.shape[:2]
        points = torch.from_numpy(transform.apply_coords(self._work.points, size)).float()
        boxes = torch.from_numpy(transform.apply_boxes(self._work.boxes, size)).float()
        masks, scores, _ = self._predictor.predict_torch(
            points, torch.ones(points.shape[:2]), boxes, multimask_output=self._multimask
        )
        best: NDArray[np.bool_] = masks[torch.arange(len(masks)), scores.argmax(1)].numpy()
        return best


class Decoders:
    """segment-anything's decoder and ours, of the same weights, about the same prompts in one batch."""

    def __init__(self, sam: Sam, work: Asked, embedding: Embedding, *, multimask: bool) -> None:
        boxes, points = (
            torch.from_numpy(rescale(each, embedding.original, embedding.content)).float()
            for each in (work.boxes, work.points)
        )
        self._sam, self._multimask, self._image = sam, multimask, embedding.features[0]
        self._positions = sam.prompt_encoder.get_dense_pe()
        labels = torch.ones(points.shape[:2])
        self._sparse, self._dense = sam.prompt_encoder(points=(points, labels), boxes=boxes, masks=None)
        self._ours = mask_decoder(
            sam.mask_decoder, self._positions.flatten(2)[0].mT.contiguous(), alternatives=multimask
        )

    def ours(self) -> None:
        self._ours(self._image + self._dense[:1], (), self._sparse)

    def theirs(self) -> None:
        self._sam.mask_decoder(
            image_embeddings=self._image,
            image_pe=self._positions,
            sparse_prompt_embeddings=self._sparse,
            dense_prompt_embeddings=self._dense,
            multimask_output=self._multimask,
        )


def load(shape: str) -> tuple[Sam, SamExpert]:
    """A model, and the expert made of it."""
    if shape == "vit_b":
        sam, config = random_model("vit_b"), VIT_B
    else:
        config = read_config(TINY_FOLDER / "config.json")
        sam = build_sam(config)
        load_into(sam, TINY_FOLDER / "model.safetensors", name=shape)
    assert isinstance(sam, Sam)
    return sam, SamExpert(sam, config, name=shape)


def dice_of(masks: Iterable[NDArray[np.bool_]], reference: NDArray[np.bool_]) -> list[float]:
    return [mask_dice(mask, reference) for mask in masks]


def difference(predictor: Predictor, slow: Sequence[NDArray[np.bool_]], fast: NDArray[np.bool_]) -> dict[str, float]:
    """How far our masks are from the predictor's."""
    count, largest, spread = 0, 0.0, 0.0
    for i, (theirs, ours) in enumerate(zip(slow, fast, strict=True)):
        unlike, logits = theirs != ours, predictor.best(i, logits=True)
        count += int(unlike.sum())
        largest = max(largest, float(np.abs(logits[unlike]).max(initial=0.0)))
        spread += float(logits.std()) / len(slow)
    return {"pixels_unlike": count, "largest_logit": largest, "logit_spread": spread}


def compare(shape: str, rounds: int, folder: Path) -> tuple[Costs, dict[str, float]]:
    """The cost of each part, and how far both sides' results are from each other. folder: where embeddings are
    stored."""
    (sam, expert), work, costs = load(shape), asked(ANSWERS), Costs()
    predictor = Predictor(sam, work, multimask=expert.multimask)
    store = EmbeddingStore(folder, limit=1 << 30, fingerprint=expert.fingerprint())
    memory, disk = EmbeddingCache(limit=1 << 30), EmbeddingCache(limit=0, store=store)
    for _ in range(rounds):
        with costs.of("set_image"):
            predictor.set_image()
        with costs.of("embed"):
            embedding = expert.embed(work.image)
    for cache in (memory, disk):
        cache.put("image", embedding)
    decoders = Decoders(sam, work, embedding, multimask=expert.multimask)
    dice: dict[str, list[float]] = {}
    for _ in range(rounds + 1):
        with costs.of("predict"):
            masks = [predictor.best(i) for i in range(ANSWERS)]
            dice["slow"] = dice_of(masks, work.reference)
        for name, cache in (("memory", memory), ("disk", disk)):
            with costs.of(f"get, {name}"):
                found = cache.get("image")
            assert found is not None
            with costs.of(f"decode, {name}"):
                (decoded,) = expert.decode_all([work.prompts(found)])
                dice[name] = [each.dice for each in overlaps(decoded.drawn, work.reference)]
            if name == "memory":
                drawn = decoded.masks
        with torch.inference_mode():
            with costs.of("decoder, theirs"):
                decoders.theirs()
            with costs.of("decoder, ours"):
                decoders.ours()
    slow, ours, stored = (np.array(dice[name]) for name in ("slow", "memory", "disk"))
    return costs, {
        "dice_equal": int((slow == ours).sum()),
        **difference(predictor, masks, drawn),
        "batch_dice_equal": int((slow == np.array(dice_of(predictor.together(), work.reference))).sum()),
        "disk_dice_shift": float(np.abs(slow - stored).max()),
    }


def figures(costs: Costs) -> dict[str, float]:
    """The ratios of the module's docstring."""
    predicted = ANSWERS * costs["set_image"] + costs["predict"]
    memory, disk = (costs[f"get, {name}"] + costs[f"decode, {name}"] for name in ("memory", "disk"))
    return {
        "predictor_s": predicted,
        "first_touch_s": costs["embed"] + costs["decode, memory"],
        "cached_s": memory,
        "disk_s": disk,
        "first_touch_ratio": predicted / (costs["embed"] + costs["decode, memory"]),
        "cached_ratio": predicted / memory,
        "disk_ratio": predicted / disk,
        "decoder_ratio": costs["decoder, theirs"] / costs["decoder, ours"],
        "embed_per_read": costs["embed"] / costs["get, disk"],
    }


def rows(costs: Costs, found: dict[str, float]) -> list[tuple[str, str, str, str]]:
    """The table."""

    def row(what: str, theirs: float, ours: float) -> tuple[str, str, str, str]:
        return what, f"{ours:,.4f}", f"{theirs:,.4f}", f"{theirs / ours:,.1f}x"

    slow = found["predictor_s"]
    return [
        ("seconds of one core", "ours", "SamPredictor", "ratio"),
        row(f"{ANSWERS} answers, the image is new", slow, found["first_touch_s"]),
        row(f"{ANSWERS} answers, embedding in memory", slow, found["cached_s"]),
        row(f"{ANSWERS} answers, embedding on disk", slow, found["disk_s"]),
        row("decoder alone, one batch", costs["decoder, theirs"], costs["decoder, ours"]),
        ("", "from disk", "anew", ""),
        row("an embedding", costs["embed"], costs["get, disk"]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="vit_b")
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        costs, unlike = compare(given.shape, given.rounds, Path(folder))
    found = figures(costs)
    print(table(rows(costs, found)))
    print(
        f"Dice is the predictor's for {unlike['dice_equal']} of {ANSWERS} answers (its own batch: "
        f"{unlike['batch_dice_equal']}); {unlike['pixels_unlike']} of "
        f"{ANSWERS * SIDE * SIDE:,} pixels differ, |logit| there at most {unlike['largest_logit']:.1e} (standard "
        f"deviation {unlike['logit_spread']:.1e}); float16 on disk shifts Dice by at most "
        f"{unlike['disk_dice_shift']:.1e}"
    )
    print(processor())
    rounded = {name: float(f"{value:.4g}") for name, value in (found | unlike).items()}
    print(json.dumps({"processor": processor(), "shape": given.shape, **rounded}))


if __name__ == "__main__":
    main()
