"""Phantoms as dataset rows in the schema of the published dataset."""

import io
import json
from collections.abc import Iterator, Sequence
from itertools import count as count_from
from itertools import islice
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from phantoms.coarse import jitter_points, loosen_box
from phantoms.reasoning import place_of, trace
from phantoms.scenes import MODALITIES, Phantom, draw
from umrg.keypoints import reference_points, tight_box
from umrg.mistake import Mistake

Phrasing = Literal["seen", "held_out"]
Annotation = Literal["exact", "coarse"]


def rows(
    count: int,
    *,
    seed: int,
    size: int = 224,
    modalities: Sequence[str] = MODALITIES,
    phrasings: Phrasing = "seen",
    annotation: Annotation = "exact",
    queries_per_image: int = 4,
) -> Iterator[dict[str, object]]:
    """Yield `count` rows; each image has up to `queries_per_image` rows, each about a different target.

    Image k is drawn from (seed, k), and modalities alternate, so a longer dataset begins with the rows of a shorter
    one. Phrasing and annotation change neither the images nor the masks. Boxes and points are in original pixels;
    masks are always exact.
    Raises ValueError for an unknown modality or none at all, and for fewer than one query per image.
    """
    if not modalities or (unknown := [name for name in modalities if name not in MODALITIES]):
        given = ", ".join(unknown) if modalities else "none"
        raise Mistake(f"modalities must be among {', '.join(MODALITIES)}; given: {given}")
    if queries_per_image < 1:
        raise Mistake(f"queries_per_image must be at least 1, not {queries_per_image}")
    return islice(_all_rows(seed, size, modalities, phrasings, annotation, queries_per_image), count)


def _all_rows(
    seed: int, size: int, modalities: Sequence[str], phrasings: Phrasing, annotation: Annotation, queries: int
) -> Iterator[dict[str, object]]:
    for index in count_from():
        rng = np.random.default_rng([seed, index])
        phantom = draw(modalities[index % len(modalities)], rng, size=size)
        image_id = f"phantom-{seed}-{index:06d}-{phantom.modality.lower()}"
        image: dict[str, object] = {"bytes": _png(phantom.image), "path": f"{image_id}.png"}
        for k in rng.permutation(len(phantom.targets))[:queries].tolist():
            # Each row has its own random stream, so that its phrasing and annotation do not affect the next row.
            row_rng = np.random.default_rng([seed, index, 1 + k])
            yield _row(phantom, k, image_id, image, phrasings, annotation, row_rng)


def _row(
    phantom: Phantom,
    k: int,
    image_id: str,
    image: dict[str, object],
    phrasings: Phrasing,
    annotation: Annotation,
    rng: np.random.Generator,
) -> dict[str, object]:
    target, (height, width) = phantom.targets[k], phantom.targets[k].mask.shape
    structure = target.structure
    row_id = f"{image_id}-{structure.name.replace(' ', '_')}"
    choices = structure.queries if phrasings == "seen" else structure.held_out_queries
    phrasing = int(rng.integers(len(choices)))
    reasoning = trace(structure, place_of(tight_box(target.mask), width, height), phrasing)
    return {
        "data_source": "umrg",
        "prompt": [{"role": "user", "content": choices[phrasing]}],
        "images": [image],
        "masks": [{"bytes": _png(target.mask.astype(np.uint8) * 255), "path": f"{row_id}-mask.png"}],
        "ability": "medical_grounding",
        "reward_model": {"ground_truth": _reference(target.mask, annotation, rng), "style": "rule"},
        "extra_info": {
            "id": row_id,
            "supercategory": structure.supercategory,
            "category": structure.name,
            "modality": phantom.modality,
            "reasoning": reasoning,
            "phrasing": phrasings,
        },
    }


def _reference(mask: NDArray[np.bool_], annotation: Annotation, rng: np.random.Generator) -> str:
    height, width = mask.shape
    exact = tight_box(mask)
    box, points = exact, reference_points(mask)
    if annotation == "coarse":
        box = loosen_box(exact, width, height, rng)
        first, second = jitter_points(points, exact, width, height, rng)
        points = (first, second)
    return json.dumps({"bbox_2d": box, "point_2d": points})


def _png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
