"""The pages' drawings: true to the masks, and light."""

import base64
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from cluster.report.evaluation import chosen
from cluster.report.pages import as_data_url, outline, shapes
from cluster.report.training import LAG, all_charts
from umrg.metrics import mask_dice


def painted(path: str, shape: tuple[int, int], zoom: int = 8) -> np.ndarray:
    """An SVG path of polygons, filled by the even-odd rule, at the pixels of the mask it came from."""
    inside = np.zeros((shape[0] * zoom, shape[1] * zoom), dtype=bool)
    for part in filter(None, path.split("M")):
        corners = [tuple(float(v) * zoom for v in corner.split()) for corner in part.rstrip("Z").split("L")]
        layer = Image.new("1", (inside.shape[1], inside.shape[0]))
        ImageDraw.Draw(layer).polygon(corners, fill=1)
        inside ^= np.asarray(layer)
    return inside[zoom // 2 :: zoom, zoom // 2 :: zoom]


def disc(size, x, y, radius):
    ys, xs = np.mgrid[:size, :size]
    return (xs - x) ** 2 + (ys - y) ** 2 <= radius**2


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 223), st.integers(0, 223), st.integers(6, 90), st.integers(0, 5))
def test_an_outline_is_true_to_its_mask(x, y, radius, hole):
    mask = disc(224, x, y, radius) & ~disc(224, x, y, hole)
    assert mask_dice(painted(outline(mask), mask.shape), mask) > 0.93


def test_an_outline_of_nothing_is_nothing():
    assert outline(np.zeros((5, 5), dtype=bool)) == ""


def test_a_box_covers_its_last_pixel_and_points_lie_in_the_middle_of_theirs():
    found = shapes(None, (2, 3, 5, 7), ((2, 3), (5, 7)))
    assert found["box"] == (2, 3, 4, 5)
    assert found["points"] == [(2.5, 3.5), (5.5, 7.5)]


def test_pictures_are_small():
    noise = np.random.default_rng(0).integers(0, 256, (840, 840, 3), dtype=np.uint8)
    assert len(as_data_url(noise)) < 60_000, "500 of them must stay under 30 MB"


@pytest.mark.parametrize(("count", "limit", "shown"), [(10, 20, 10), (100, 20, 20), (21, 20, 20)])
def test_a_gallery_has_the_worst_and_others_spread_evenly(count, limit, shown):
    greedy = {str(i): {"metrics": {"dice": i / count}} for i in range(count)}
    found = [int(row) for row in chosen(greedy, limit)]
    assert len(set(found)) == shown and found == sorted(found)
    assert found[: shown // 2] == list(range(shown // 2))
    if count > limit:
        assert max(found) >= 0.85 * count


def test_a_data_url_is_a_picture():
    url = as_data_url(np.zeros((600, 300, 3), dtype=np.uint8))
    assert Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).size == (150, 300)


@pytest.mark.parametrize(("lag", "shown"), [(0.0, 0), (1.0, 1)])
def test_lag_and_its_correction_are_shown_where_steps_overlapped(lag, shown):
    line = {"reward/total": 0.5, "policy/lag": lag, "learner/correction": 0.99, "learner/truncated_fraction": 0.01}
    charts = "".join(all_charts([{"step": 1, **line, "policy/lag": 0.0}, {"step": 2, **line}]))
    for title in LAG:
        assert charts.count(f">{title}<") == shown, title
