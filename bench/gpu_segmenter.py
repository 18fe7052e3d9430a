"""Experts of the published sizes on a GPU: `python -m bench.gpu_segmenter [--shapes vit_b vit_h hiera_t]`.

SAM's ViT-B and ViT-H and SAM 2.1's Hiera-T (that of MedSAM2), with random weights, their encoders in float32, float16
and bfloat16; images of 840x840, and answers of a box and two points.

images_per_s: images embedded per second, by how many there are in a pass, preparing them (on the host) included.
prepare_ms: milliseconds of preparing one image. Where it is near 1000 / images_per_s, the host is what one waits for.
embed_gib: peak memory of a pass above that of the model, by images.
masks_per_s: masks of image size drawn per second, by prompts, of which 16 each are about one image. Prompts are decoded
    in float32 whatever the encoder's precision, so they are timed with that of float32 alone.
features_off: distance of the embedding from that of float32, relative to its norm. logits_off: mean |difference| of a
    mask's logits, divided by their standard deviation, the median over answers. pixels_off: share of a mask's pixels
    that differ, the median over answers. (With random weights several alternative masks have nearly the same score, and
    a rounding may choose another, which is why these are medians.)

Each is the fastest of several rounds after one that warms up, and the device is waited for before the clock is started
and before it is stopped. On a CPU, and with `--rehearse`, it is a rehearsal with small models of the same
architectures.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from actors.experts.promptable import Promptable
from actors.experts.protocol import Decoded, Embedding
from bench.expert_shapes import SHAPES, SIDE, SMALL, asked, random_expert
from bench.machine import processor
from bench.rewards import table

ANSWERS = 16
"""Of one image."""
HALVES = ("float16", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What is measured."""

    device: str
    side: int = SIDE
    """Of an image."""
    images: Sequence[int] = (1, 2, 4, 8)
    """In a pass of the encoder."""
    prompts: Sequence[int] = (1, 16, 32, 64, 128)
    """Decoded together."""
    rounds: int = 5


REHEARSAL = Scale(device="cpu", side=112, images=(1, 2), prompts=(1, 20), rounds=1)


def settle(device: str) -> None:
    """Wait for all that the device was given to do."""
    if device == "cuda":
        torch.cuda.synchronize()


def fastest(call: Callable[[], object], scale: Scale) -> float:
    """Seconds of the fastest round, the device's work included."""
    seconds = []
    for _ in range(scale.rounds + 1):
        settle(scale.device)
        start = time.perf_counter()
        call()
        settle(scale.device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def peak_gib(call: Callable[[], object], device: str) -> float:
    """GiB that a call takes at its peak above what is held before it; 0 where that is not counted."""
    if device != "cuda":
        return 0.0
    settle(device)
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    call()
    settle(device)
    return (torch.cuda.max_memory_allocated() - held) / 2**30


def embedding_figures(expert: Promptable, scale: Scale) -> dict[str, Any]:
    """Speed and memory of embedding, by images, and what of its time is preparing them."""
    images = [asked(1, side=scale.side, seed=i).image for i in range(max(scale.images))]
    found: dict[str, Any] = {"images_per_s": {}, "embed_gib": {}}
    for count in scale.images:
        call = partial(expert.embed_all, images[:count])
        found["embed_gib"][count] = peak_gib(call, scale.device)
        found["images_per_s"][count] = count / fastest(call, scale)
    return found | {"prepare_ms": 1000 * fastest(partial(expert._pixels, images[0]), scale)}


def decoding_figures(expert: Promptable, scale: Scale) -> dict[int, float]:
    """Masks per second, by the prompts that are decoded together."""
    found = {}
    for count in scale.prompts:
        sizes = [min(ANSWERS, count - start) for start in range(0, count, ANSWERS)]
        work = [asked(size, side=scale.side, seed=i) for i, size in enumerate(sizes)]
        requests = [each.prompts(expert.embed(each.image)) for each in work]
        found[count] = count / fastest(partial(expert.decode_all, requests), scale)
    return found


def drawn(expert: Promptable, scale: Scale) -> tuple[Embedding, Decoded]:
    """An image's embedding and the masks of its answers."""
    work = asked(ANSWERS, side=scale.side)
    embedding = expert.embed(work.image)
    (decoded,) = expert.decode_all([work.prompts(embedding)])
    return embedding, decoded


def off(exact: tuple[Embedding, Decoded], rounded: tuple[Embedding, Decoded]) -> dict[str, float]:
    """How far an embedding and what is decoded from it are from the exact ones."""
    features, others = (torch.cat([each.flatten() for each in found.features]) for found, _ in (exact, rounded))
    (_, masks), (_, other) = exact, rounded
    shift = np.abs(masks.logits - other.logits).mean((1, 2)) / masks.logits.std((1, 2))
    return {
        "features_off": float((features - others).norm() / features.norm()),
        "logits_off": float(np.median(shift)),
        "pixels_off": float(np.median((masks.masks != other.masks).mean((1, 2)))),
    }


def measured(shape: str, scale: Scale) -> dict[str, Any]:
    """The figures of a shape: masks per second, and the rest by the encoder's precision."""
    found: dict[str, Any] = {}
    for dtype in ("float32", *HALVES):
        expert = random_expert(shape, device=scale.device, dtype=dtype)
        if dtype == "float32":
            exact = drawn(expert, scale)
            found["masks_per_s"] = decoding_figures(expert, scale)
        found[dtype] = embedding_figures(expert, scale) | off(exact, drawn(expert, scale))
        del expert
        if scale.device == "cuda":
            torch.cuda.empty_cache()
    return found


def rows(shape: str, found: dict[str, Any]) -> list[tuple[str, ...]]:
    """A table's part for a shape."""
    lines = []
    for dtype in ("float32", *HALVES):
        here = found[dtype]
        speeds = " ".join(f"{value:.1f}" for value in here["images_per_s"].values())
        memory = " ".join(f"{value:.2f}" for value in here["embed_gib"].values())
        offs = [f"{here[name]:.1e}" for name in ("features_off", "logits_off", "pixels_off")]
        lines.append((shape, dtype, speeds, f"{here['prepare_ms']:.1f}", memory, *offs))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rehearse", action="store_true")
    given = parser.parse_args()
    rehearsal = given.rehearse or not torch.cuda.is_available()
    scale = REHEARSAL if rehearsal else Scale(device="cuda")
    found = {shape: measured(shape, scale) for shape in (SMALL if rehearsal else given.shapes)}
    print(f"images/s and GiB by images in a pass: {', '.join(map(str, scale.images))}")
    head = ("shape", "encoder", "images/s", "prepare ms", "GiB", "features off", "logits off", "pixels off")
    print(table([head, *(line for shape in found for line in rows(shape, found[shape]))]))
    prompts = [str(count) for count in scale.prompts]
    speeds = [(shape, *(f"{speed:,.0f}" for speed in here["masks_per_s"].values())) for shape, here in found.items()]
    print(table([("masks/s, by prompts", *prompts), *speeds]))
    card = torch.cuda.get_device_name() if scale.device == "cuda" else processor()
    print(card)
    print(json.dumps({"card": card, "rehearsal": rehearsal, **found}))


if __name__ == "__main__":
    main()
