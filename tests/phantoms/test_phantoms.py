import io
import json
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from phantoms import MODALITIES, STRUCTURES, draw, rows
from phantoms.coarse import BOUNDS, DISPLACEMENT, JITTER, LOOSENING
from phantoms.reasoning import TEMPLATES, place_of
from phantoms.scenes import SMALLEST_AREA, SMALLEST_SIDE
from umrg.keypoints import reference_points, tight_box

RELEASED_SAMPLE = Path(__file__).parents[2].parent / "shared" / "data" / "umrg_real_sample.parquet"

Row = dict[str, Any]


def make(count: int, **options: Any) -> list[Row]:
    return list(rows(count, **options))


def decode(row: Row, key: str) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(row[key][0]["bytes"])))


def reference(row: Row) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(row["reward_model"]["ground_truth"])
    return parsed


def words(texts: Iterable[str]) -> list[str]:
    return re.findall(r"[a-z]+", " ".join(texts).lower())


def test_ten_modalities_and_at_least_thirty_structures_in_fifteen_supercategories() -> None:
    assert len(MODALITIES) == 10
    assert len(STRUCTURES) == len({structure.name for structure in STRUCTURES}) >= 30
    assert len({structure.supercategory for structure in STRUCTURES}) == 15
    assert {modality for structure in STRUCTURES for modality in structure.modalities} == set(MODALITIES)


def test_queries_are_implicit_distinct_and_plain() -> None:
    every = [query for structure in STRUCTURES for query in (*structure.queries, *structure.held_out_queries)]
    assert len(set(every)) == len(every)
    for structure in STRUCTURES:
        queries = (*structure.queries, *structure.held_out_queries)
        assert len(queries) >= 6
        assert len(structure.held_out_queries) == 2
        assert not set(words(queries)) & set(words([structure.name])), structure.name
        assert not any(structure.supercategory in query.lower() for query in queries)
        assert " ".join((*queries, *structure.reasons)).isascii()


def test_held_out_phrasings_use_words_seen_in_training() -> None:
    seen = set(words(text for structure in STRUCTURES for text in (*structure.queries, *structure.reasons)))
    held_out = words(query for structure in STRUCTURES for query in structure.held_out_queries)
    assert np.mean([word in seen for word in held_out]) > 0.98


def test_reasoning_never_exceeds_25_words() -> None:
    for structure in STRUCTURES:
        for clue in structure.reasons:
            for template in TEMPLATES:
                trace = template.format(clue=clue, name=structure.name, place="in the lower middle")
                assert len(trace.split()) <= 25, trace


@pytest.mark.parametrize("modality", MODALITIES)
def test_a_phantom_shows_several_structures_of_its_modality(modality: str) -> None:
    for seed in range(8):
        phantom = draw(modality, np.random.default_rng(seed))
        assert phantom.image.shape == (224, 224, 3)
        assert phantom.image.dtype == np.uint8
        assert phantom.image.std() > 10
        assert 2 <= len(phantom.targets) <= 6
        assert len({target.structure.name for target in phantom.targets}) == len(phantom.targets)
        for target in phantom.targets:
            assert modality in target.structure.modalities
            left, top, right, bottom = tight_box(target.mask)
            assert target.mask.sum() >= SMALLEST_AREA
            assert min(right - left, bottom - top) + 1 >= SMALLEST_SIDE


@pytest.mark.parametrize("size", [112, 300])
@pytest.mark.parametrize("modality", MODALITIES)
def test_any_size_from_112_works(modality: str, size: int) -> None:
    phantom = draw(modality, np.random.default_rng(3), size=size)
    assert phantom.image.shape == (size, size, 3)
    assert all(target.mask.shape == (size, size) for target in phantom.targets)


def test_every_structure_is_asked_for() -> None:
    asked = {row["extra_info"]["category"] for row in make(900, seed=11, size=112, queries_per_image=6)}
    assert asked == {structure.name for structure in STRUCTURES}


def test_what_is_painted_over_leaves_the_mask() -> None:
    for seed in range(6):
        targets = {t.structure.name: t.mask for t in draw("X-ray", np.random.default_rng(seed)).targets}
        for lung in ("left lung", "right lung"):
            if "heart" in targets and lung in targets:
                assert not (targets["heart"] & targets[lung]).any()


def test_rows_hold_the_exact_reference() -> None:
    for row in make(24, seed=5):
        mask = decode(row, "masks")
        assert set(np.unique(mask)) == {0, 255}
        assert decode(row, "images").shape == (*mask.shape, 3)
        box = tight_box(mask > 0)
        assert reference(row) == {
            "bbox_2d": list(box),
            "point_2d": [list(point) for point in reference_points(mask > 0)],
        }
        assert row["extra_info"]["reasoning"].rstrip(".").endswith(place_of(box, 224, 224))


def test_a_longer_data_set_begins_with_the_shorter_one() -> None:
    assert make(7, seed=2) == make(19, seed=2)[:7]


def test_other_seeds_give_other_images_and_ids() -> None:
    first, second = make(30, seed=1), make(30, seed=2)
    for key in ("images", "masks"):
        contents = [{row[key][0]["bytes"] for row in data} for data in (first, second)]
        assert not contents[0] & contents[1]
    ids = [row["extra_info"]["id"] for row in first + second]
    assert len(set(ids)) == 60


def test_coarse_annotation_loosens_and_moves_boxes_and_points_only() -> None:
    shares, shifts = [], []
    for exact, coarse in zip(make(120, seed=9), make(120, seed=9, annotation="coarse"), strict=True):
        for key in ("images", "masks", "prompt", "extra_info"):
            assert exact[key] == coarse[key]
        tight, loose = np.array(reference(exact)["bbox_2d"]), np.array(reference(coarse)["bbox_2d"])
        sides = np.tile(tight[2:] - tight[:2] + 1, 2)
        outward = (loose - tight) * (-1, -1, 1, 1) / sides
        shares.append(np.where((loose > 0) & (loose < 223), outward, np.nan))
        shifts.append(np.subtract(reference(coarse)["point_2d"], reference(exact)["point_2d"]) / sides[:2])
        assert (loose >= 0).all() and (loose <= 223).all() and (loose[:2] < loose[2:]).all()
    assert np.nanmean(shares) == pytest.approx(LOOSENING, abs=0.04)
    assert np.nanmax(shares) <= BOUNDS[1] + 2 * DISPLACEMENT + 0.05
    assert np.mean(shifts) == pytest.approx(0, abs=0.03)
    assert np.std(shifts) == pytest.approx(JITTER, rel=0.25)


def test_phrasings_are_kept_apart() -> None:
    by_name = {structure.name: structure for structure in STRUCTURES}
    for seen, held_out in zip(make(20, seed=4), make(20, seed=4, phrasings="held_out"), strict=True):
        structure = by_name[seen["extra_info"]["category"]]
        assert seen["prompt"][0]["content"] in structure.queries
        assert held_out["prompt"][0]["content"] in structure.held_out_queries
        assert held_out["extra_info"]["phrasing"] == "held_out"
        assert held_out["images"] == seen["images"]


def test_one_image_is_asked_about_up_to_so_many_times() -> None:
    names = [row["images"][0]["path"] for row in make(40, seed=6, queries_per_image=3)]
    assert max(names.count(name) for name in names) == 3


def test_the_mean_box_of_a_structure_is_a_poor_answer() -> None:
    boxes = defaultdict(list)
    for row in make(600, seed=8, size=112, queries_per_image=6):
        boxes[row["extra_info"]["category"]].append(reference(row)["bbox_2d"])
    overlaps = [iou_with_mean(np.array(found, dtype=float)) for found in boxes.values()]
    assert np.mean(overlaps) < 0.35


def iou_with_mean(boxes: NDArray[np.float64]) -> float:
    mean = boxes.mean(axis=0)
    inner = np.minimum(boxes, mean)[:, 2:] - np.maximum(boxes, mean)[:, :2]
    shared = np.clip(inner, 0, None).prod(axis=1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    return float((shared / (areas + (mean[2:] - mean[:2]).prod() - shared)).mean())


@pytest.mark.skipif(not RELEASED_SAMPLE.exists(), reason="the released sample is not here")
def test_rows_fit_the_released_schema() -> None:
    pyarrow = pytest.importorskip("pyarrow")
    released = pytest.importorskip("pyarrow.parquet").read_schema(RELEASED_SAMPLE)
    ours = pyarrow.Table.from_pylist(make(4, seed=0)).schema
    assert set(ours.names) == set(released.names)
    for name in ("data_source", "prompt", "images", "masks", "ability"):
        assert ours.field(name).type == released.field(name).type, name
    for name in ("ground_truth", "style"):
        assert ours.field("reward_model").type.field(name) == released.field("reward_model").type.field(name)
    for name in ("id", "supercategory", "category", "modality"):
        assert ours.field("extra_info").type.field(name) == released.field("extra_info").type.field(name)


def test_mistakes_get_one_clear_sentence() -> None:
    with pytest.raises(ValueError, match="unknown modality 'PET': choose one of CT"):
        draw("PET", np.random.default_rng(0))
    with pytest.raises(ValueError, match="ask for 112 or more"):
        draw("CT", np.random.default_rng(0), size=64)
    with pytest.raises(ValueError, match="given: PET"):
        make(1, seed=0, modalities=["CT", "PET"])
    with pytest.raises(ValueError, match="given: none"):
        make(1, seed=0, modalities=[])
    with pytest.raises(ValueError, match="at least 1"):
        make(1, seed=0, queries_per_image=0)
