"""Presets, weights, masks, and what a user may get wrong."""

from dataclasses import replace

import numpy as np
import pytest

from rewards.case import Drawn, Reference
from rewards.mask import MissingMask
from rewards.presets import PRESETS, TERMS
from rewards.scoring import Scorer
from umrg.answers import parse_answer
from umrg.frames import Size
from umrg.images import encode_png
from umrg.metrics import Overlap
from umrg.sample import Sample

PERFECT = parse_answer(
    '<think>It filters blood.</think><answer>{"bbox": [10, 20, 49, 59], "points_1": [20, 30], '
    '"points_2": [40, 50]}</answer>'
)
MALFORMED = parse_answer('<think>It filters blood.</think><answer>{"bbox": [10, 20, 49, 59]}</answer>')


def square(x: int, y: int) -> np.ndarray:
    mask = np.zeros((80, 100), dtype=np.bool_)
    mask[y : y + 40, x : x + 40] = True
    return mask


def drawn(mask: np.ndarray, reference: Reference | None = None) -> Drawn:
    return Drawn.of(mask, reference or REFERENCE)


REFERENCE = Reference(box=(10, 20, 49, 59), points=((20, 30), (40, 50)), size=Size(100, 80), mask=square(10, 20))


@pytest.mark.parametrize("name", PRESETS)
def test_a_perfect_answer_gets_the_maximum_of_every_preset(name: str) -> None:
    scorer = Scorer.of_preset(name)
    reward = scorer.score(PERFECT, REFERENCE, drawn(square(10, 20)))
    assert set(reward.parts.values()) == {1.0}
    assert reward.total == scorer.maximum


def test_the_total_is_the_weighted_sum_of_the_parts() -> None:
    scorer = Scorer.of_preset("mask")
    reward = scorer.score(PERFECT, REFERENCE, drawn(square(20, 20)))
    assert reward.parts["mask_dice"] == 0.75  # three quarters of each square are shared
    assert reward.total == scorer.maximum - 2.0 * 0.25


@pytest.mark.parametrize("name", PRESETS)
def test_published_presets_read_the_first_blocks_and_others_the_answer_after_the_thoughts(name: str) -> None:
    draft = PERFECT.text.replace("It filters", '<answer>{"bbox": [0, 0, 9, 9]}</answer> It filters')
    found = Scorer.of_preset(name).read(draft)
    assert (found.box == PERFECT.box) == (name == "mask")
    assert Scorer({"bbox_iou": 1.0}).read(draft).box == PERFECT.box


def test_a_term_of_weight_zero_is_reported_and_does_not_count() -> None:
    reward = Scorer({"bbox_iou": 1.0, "format_think": 0.0}).score(PERFECT, REFERENCE)
    assert (reward.total, reward.parts) == (1.0, {"bbox_iou": 1.0, "format_think": 1.0})


def test_a_prompt_without_thinking_is_not_rewarded_for_it() -> None:
    silent = replace(PERFECT, think=None)
    thinking, quiet = (Scorer.of_preset("soft", think=think) for think in (True, False))
    assert thinking.score(silent, REFERENCE).total == thinking.maximum - 1
    assert quiet.score(silent, REFERENCE).total == quiet.maximum == 3


def test_only_a_reward_with_a_mask_term_uses_masks() -> None:
    assert Scorer.of_preset("mask").uses_mask and not Scorer.of_preset("soft").uses_mask


@pytest.mark.parametrize("name", TERMS)
def test_a_term_says_whether_it_looks_at_masks(name: str) -> None:
    scorer = Scorer({name: 1.0})
    if scorer.uses_mask:
        with pytest.raises(MissingMask):
            scorer.score(PERFECT, REFERENCE)
    else:
        scorer.score(PERFECT, replace(REFERENCE, mask=None))


def test_a_malformed_answer_has_no_mask_reward() -> None:
    scorer = Scorer.of_preset("mask")
    assert scorer.score(MALFORMED, REFERENCE).parts["mask_dice"] == 0
    assert scorer.score(MALFORMED, REFERENCE, drawn(square(10, 20))).parts["mask_dice"] == 0


def test_a_missing_expert_mask_is_an_error_not_a_zero() -> None:
    with pytest.raises(MissingMask):
        Scorer.of_preset("mask").score(PERFECT, REFERENCE)


def test_an_empty_expert_mask_scores_zero() -> None:
    empty = np.zeros((80, 100), dtype=np.bool_)
    assert Scorer.of_preset("mask").score(PERFECT, REFERENCE, drawn(empty)).parts["mask_dice"] == 0


def test_masks_must_be_there_and_of_one_size() -> None:
    scorer = Scorer.of_preset("mask")
    with pytest.raises(ValueError, match="needs reference masks"):
        unmasked = replace(REFERENCE, mask=None)
        scorer.score(PERFECT, unmasked, drawn(square(10, 20), unmasked))
    with pytest.raises(ValueError, match="cannot be compared"):
        scorer.score(PERFECT, REFERENCE, drawn(square(10, 20).T))


def test_a_reference_is_read_from_a_sample() -> None:
    sample = Sample(
        id="a",
        query="Which organ filters blood?",
        image_bytes=encode_png(np.zeros((80, 100, 3), dtype=np.uint8)),
        mask_bytes=(encode_png(square(10, 20)),),
        box=(10, 20, 49, 59),
        points=((20, 30), (40, 50)),
        supercategory="abdomen",
        category="kidney",
        modality="ct",
    )
    reference = Reference.of_sample(sample, with_mask=True)
    assert (reference.box, reference.points, reference.size) == (sample.box, sample.points, Size(100, 80))
    assert reference.mask is not None and np.array_equal(reference.mask, square(10, 20))
    assert Reference.of_sample(sample, with_mask=False).mask is None


@pytest.mark.parametrize(("wrong", "right"), [("box_iou", "bbox_iou"), ("mask-dice", "mask_dice"), ("?", "")])
def test_an_unknown_term_names_the_nearest_right_one(wrong: str, right: str) -> None:
    with pytest.raises(ValueError, match=f"no reward term .* did you mean '{right}"):
        Scorer({wrong: 1.0})


def test_an_unknown_preset_names_the_nearest_right_one() -> None:
    with pytest.raises(ValueError, match="did you mean 'soft'"):
        Scorer.of_preset("sofd")


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_a_weight_is_a_finite_number_not_below_zero(weight: float) -> None:
    with pytest.raises(ValueError, match="weight of reward term 'bbox_iou'"):
        Scorer({"bbox_iou": weight})


@pytest.mark.parametrize("weights", [{}, {"bbox_iou": 0.0}])
def test_some_term_must_count(weights: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="at least one term"):
        Scorer(weights)


def test_a_mask_is_brought_here_once_and_only_for_terms_that_look_at_pixels() -> None:
    fetched = []

    def fetch() -> np.ndarray:
        fetched.append(1)
        return square(10, 20)

    mask = Drawn(fetch=fetch, compare=lambda: Overlap(both=1200, predicted=1600, reference=1600))
    reward = Scorer({"mask_dice": 1.0, "mask_iou": 1.0}).score(PERFECT, REFERENCE, mask)
    assert reward.parts == {"mask_dice": 0.75, "mask_iou": 0.6} and not fetched
    assert Scorer({"boundary": 1.0}).score(PERFECT, REFERENCE, mask).total == 1
    assert Scorer({"boundary": 1.0}).score(PERFECT, REFERENCE, mask).total == 1 and len(fetched) == 1
