"""The consensus of several samples."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.consensus import Vote, vote
from umrg.metrics import mask_dice

SIDE = 4
MASK = st.integers(0, 2 ** (SIDE * SIDE) - 1).map(
    lambda bits: np.array([bits >> bit & 1 for bit in range(SIDE * SIDE)], dtype=bool).reshape(SIDE, SIDE)
)
SAMPLES = st.lists(st.none() | MASK, min_size=1, max_size=7)


def row(text: str):
    return np.array([[letter == "#" for letter in text]])


def voted(*masks) -> Vote:
    found = vote(masks)
    assert found is not None
    return found


def test_a_pixel_needs_more_than_half_of_the_samples():
    found = voted(row("##.."), row("###."), row(".##."))
    assert found.mask.tolist() == row("###.").tolist() and found.chosen == 1
    found = voted(row("##.."), row(".##."))
    assert found.mask.tolist() == row(".#..").tolist()


def test_the_first_of_those_that_agree_alike_is_chosen():
    assert voted(row("#..."), row("##.."), row("##..")).chosen == 1


def test_a_sample_without_a_mask_votes_for_no_pixel_and_agrees_with_nothing():
    found = voted(None, row("##.."), row("##.."))
    assert found.mask.tolist() == row("##..").tolist() and found.chosen == 1
    assert found.confidence == pytest.approx(2 / 3)


def test_without_any_majority_the_mask_that_agrees_best_with_the_others_stands():
    found = voted(row("#....."), row("..##.."), row("...##."), None)
    assert found.mask.tolist() == row("..##..").tolist() and found.chosen == 1
    assert found.confidence == pytest.approx(0.5 / 3)
    apart = voted(row("#..."), row(".#.."), row("..#."))
    assert apart.chosen == 0 and apart.confidence == 0
    assert voted(None, row("#..."), None).confidence == 0


def test_where_most_samples_draw_nothing_nothing_is_the_consensus():
    found = voted(row("##.."), row("...."), row("...."))
    assert not found.mask.any() and found.chosen == 1


def test_a_single_sample_stands_for_itself():
    found = voted(row("##.."))
    assert found.mask.tolist() == row("##..").tolist() and found.chosen == 0 and found.confidence is None


def test_there_is_no_consensus_of_no_masks():
    assert vote([]) is vote([None]) is vote([None, None]) is None


def test_masks_of_different_images_have_none_either():
    with pytest.raises(ValueError, match="shape"):
        voted(row("#"), row("##"))


@given(MASK, st.integers(2, 5), st.integers(0, 4))
def test_samples_that_agree_are_certain(mask, agreeing, missing):
    found = voted(*[mask] * agreeing, *[None] * missing)
    assert found.chosen == 0 and np.array_equal(found.mask, mask)
    if not missing:
        assert found.confidence == 1


@given(SAMPLES)
def test_the_consensus_is_one_of_masks_that_were_drawn(masks):
    drawn = [mask for mask in masks if mask is not None]
    found = vote(masks)
    if found is None:
        assert not drawn
        return
    assert masks[found.chosen] is not None
    votes = np.sum(drawn, axis=0)
    if len(masks) > 1 and (votes > len(masks) / 2).any():
        assert np.array_equal(found.mask, votes > len(masks) / 2)
    else:
        assert any(np.array_equal(found.mask, mask) for mask in drawn)
    assert found.confidence is None or 0 <= found.confidence <= 1
    assert (found.confidence is None) == (len(masks) == 1)
    dice = [-1.0 if mask is None else mask_dice(mask, found.mask) for mask in masks]
    assert found.chosen == dice.index(max(dice))


@given(SAMPLES.filter(lambda masks: len(masks) > 1), st.randoms())
def test_the_order_of_samples_matters_only_between_equals(masks, chance):
    shuffled = masks.copy()
    chance.shuffle(shuffled)
    first, second = vote(masks), vote(shuffled)
    assert (first is None) == (second is None)
    if first is not None and second is not None:
        assert first.confidence == pytest.approx(second.confidence)
