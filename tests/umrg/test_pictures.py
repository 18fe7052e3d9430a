import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from umrg.pictures import PREDICTION, REFERENCE, Picture, Tile, contact_sheet, heat_map, overlay

# A busy machine is slow without being wrong.
steady = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

GREY = np.full((100, 140, 3), 90, dtype=np.uint8)


def near(picture: Picture, colour: tuple[int, int, int]) -> np.ndarray:
    """Where the picture has almost this colour, bool [H, W]."""
    return np.abs(picture.astype(int) - colour).max(axis=-1) <= 20


def test_without_anything_to_draw_the_image_stays_as_it_is() -> None:
    assert (overlay(GREY) == GREY).all()
    assert (overlay(GREY, mask=np.zeros((100, 140), dtype=np.bool_)) == GREY).all()


def test_a_box_is_drawn_on_its_outermost_pixels_and_nowhere_else() -> None:
    drawn = near(overlay(GREY, box=(30, 20, 99, 69)), PREDICTION)
    ys, xs = np.nonzero(drawn)
    assert (xs.min(), xs.max(), ys.min(), ys.max()) == (30, 99, 20, 69)
    assert not drawn[30:60, 40:90].any()


def test_a_mask_is_tinted_and_outlined_at_its_border() -> None:
    mask = np.zeros((100, 140), dtype=np.bool_)
    mask[30:70, 40:100] = True
    picture = overlay(GREY, mask=mask)
    line = near(picture, PREDICTION)
    rows, columns = np.nonzero(line)
    assert abs(rows.min() - 30) <= 2 and abs(columns.max() - 99) <= 2
    assert not line[40:60, 50:90].any()
    assert (picture[50, 70] != GREY[50, 70]).any()
    assert (picture[10, 10] == GREY[10, 10]).all()


def test_points_mark_their_place_the_first_filled_the_second_open() -> None:
    picture = near(overlay(GREY, points=((30, 40), (100, 60)), long_side=560), PREDICTION)
    first, second = (int(40.5 * 4), int(30.5 * 4)), (int(60.5 * 4), int(100.5 * 4))
    assert picture[first] and not picture[second]
    assert picture[second[0], second[1] - 12 : second[1] + 12].any()


def test_the_reference_is_told_apart_by_colour_and_by_dashes() -> None:
    box = (30, 20, 99, 69)
    solid = near(overlay(GREY, box=box), PREDICTION)
    dashed = near(overlay(GREY, reference_box=box), REFERENCE)
    assert not near(overlay(GREY, reference_box=box), PREDICTION).any()
    assert 0.2 < dashed.sum() / solid.sum() < 0.8
    mask = np.zeros((100, 140), dtype=np.bool_)
    mask[30:70, 40:100] = True
    inside = overlay(GREY, reference_mask=mask)[50, 70]
    assert (inside == GREY[50, 70]).all()


@given(
    height=st.integers(1, 60),
    width=st.integers(1, 60),
    long_side=st.integers(1, 120),
    corners=st.lists(st.floats(-20, 80), min_size=4, max_size=4),
    seed=st.integers(0, 9),
)
@settings(steady, max_examples=40)
def test_whatever_is_drawn_the_picture_has_the_asked_size(
    height: int, width: int, long_side: int, corners: list[float], seed: int
) -> None:
    mask = np.random.default_rng(seed).random((height, width)) > 0.8
    a, b, c, d = corners
    picture = overlay(
        np.zeros((height, width, 3), dtype=np.uint8),
        mask=mask,
        box=(a, b, c, d),
        points=((a, b), (c, d)),
        reference_mask=~mask,
        long_side=long_side,
    )
    assert picture.dtype == np.uint8
    assert max(picture.shape[:2]) == long_side


def test_the_image_given_is_not_drawn_on() -> None:
    image = GREY.copy()
    overlay(image, box=(1, 1, 50, 50))
    assert (image == GREY).all()


def test_a_sheet_has_room_for_each_tile_and_its_caption() -> None:
    tiles = [Tile(picture=GREY, title=f"tile {k}", text="a question " * k) for k in range(5)]
    sheet = contact_sheet(tiles, 2, side=100, heading="five tiles")
    assert near(sheet, (90, 90, 90)).sum() >= 0.9 * 5 * 100 * 71
    assert contact_sheet(tiles[:1], 4, side=100).shape[1] < 150
    with pytest.raises(ValueError, match="at least one tile"):
        contact_sheet([], 3)


def test_a_heat_map_is_bright_where_the_density_is_highest() -> None:
    density = np.zeros((10, 10))
    density[2:4, 6:8] = 0.3
    picture = heat_map(density, 100).astype(int).sum(axis=-1)
    assert picture.shape == (100, 100)
    assert picture[30, 70] > 2 * picture[80, 20]
    assert (heat_map(np.zeros((4, 4)), 8) == heat_map(np.zeros((4, 4)), 8)[0, 0]).all()


def test_a_long_word_stays_under_its_picture():
    """A path in a caption, on a line that others follow."""
    picture = np.zeros((40, 40, 3), dtype=np.uint8)
    beside = Tile(picture=picture, title="b", text="words " * 40)
    long, short = (
        contact_sheet([Tile(picture=picture, title="a", text=f"of {text} and more"), beside], 2)
        for text in ("/" + 40 * "folder/", "short")
    )
    half = long.shape[1] // 2
    assert (long[:, half:] == short[:, half:]).all() and (long != short).any()
