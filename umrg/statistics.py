"""Statistics of a dataset: how many rows of what, and how large and where their targets are."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from umrg.dataset import Dataset, RowInfo
from umrg.names import modality_family
from umrg.pictures import Picture, Tile, contact_sheet, heat_map, overlay
from umrg.sample import Sample

MEASURES = ("area", "centre_x", "centre_y", "width", "height")
GROUPINGS = ("modality", "supercategory", "category")
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_GRID = 96


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One row's target, relative to its image.

    area: the mask's share of the image. centre_x, centre_y: the box's centre; width, height: the box's sides;
    all as shares of the image's sides, in [0, 1]. image_size: "WIDTHxHEIGHT" in pixels.
    """

    modality: str
    supercategory: str
    category: str
    image_size: str
    area: float
    centre_x: float
    centre_y: float
    width: float
    height: float


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What a pass over a dataset found.

    measurements: one a row. occupancy: per super-category, float64 [96, 96] over the image's extent, the
    share of its masks that cover each place.
    """

    measurements: Sequence[Measurement]
    occupancy: Mapping[str, NDArray[np.float64]]


def survey(dataset: Dataset, progress: Callable[[int], object] = lambda done: None) -> Survey:
    """Measure every row, in file order. `progress` is told the number of rows done.

    Raises ValueError for the first row that is not sound.
    """
    measurements = []
    occupancy: dict[str, NDArray[np.float64]] = defaultdict(lambda: np.zeros((_GRID, _GRID)))
    for done, sample in enumerate(dataset, start=1):
        mask = sample.mask()
        measurements.append(measure(sample, mask))
        occupancy[sample.supercategory] += _coarse(mask)
        progress(done)
    counts = Counter(m.supercategory for m in measurements)
    return Survey(
        measurements=measurements, occupancy={name: total / counts[name] for name, total in occupancy.items()}
    )


def measure(sample: Sample, mask: NDArray[np.bool_]) -> Measurement:
    """Measure one row with its mask, bool [H, W]. A box's inclusive maximum counts as a whole pixel."""
    x1, y1, x2, y2 = sample.box
    width, height = sample.size.width, sample.size.height
    return Measurement(
        modality=sample.modality,
        supercategory=sample.supercategory,
        category=sample.category,
        image_size=f"{width}x{height}",
        area=float(mask.mean()),
        centre_x=min(1.0, (x1 + x2 + 1) / 2 / width),
        centre_y=min(1.0, (y1 + y2 + 1) / 2 / height),
        width=min(1.0, (x2 - x1 + 1) / width),
        height=min(1.0, (y2 - y1 + 1) / height),
    )


def summary(measurements: Sequence[Measurement]) -> dict[str, object]:
    """Counts, means and quantiles as plain data for JSON: overall, and by each of `GROUPINGS`."""
    return {
        "rows": len(measurements),
        "image_sizes": dict(Counter(m.image_size for m in measurements).most_common()),
        "all": _distribution(measurements),
        **{grouping: _by(measurements, grouping) for grouping in GROUPINGS},
    }


def _by(measurements: Sequence[Measurement], grouping: str) -> dict[str, object]:
    groups: dict[str, list[Measurement]] = defaultdict(list)
    for measurement in measurements:
        groups[getattr(measurement, grouping)].append(measurement)
    by_size = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    return {name: _distribution(members) for name, members in by_size}


def _distribution(measurements: Sequence[Measurement]) -> dict[str, object]:
    table = np.array([[getattr(m, name) for name in MEASURES] for m in measurements])
    quantiles = np.quantile(table, QUANTILES, axis=0)
    figures = {
        name: {"mean": _figure(table[:, k].mean())}
        | {f"q{100 * q:02.0f}": _figure(quantiles[j, k]) for j, q in enumerate(QUANTILES)}
        for k, name in enumerate(MEASURES)
    }
    return {"rows": len(measurements), **figures}


def _figure(value: float) -> float:
    return round(float(value), 5)


def _coarse(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    small = Image.fromarray(mask.astype(np.float32)).resize((_GRID, _GRID), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float64)


def spread(infos: Sequence[RowInfo], count: int, seed: int = 0) -> list[int]:
    """Up to `count` rows, sorted, of as many modalities, and within each of as many categories, as can be."""
    order = np.random.default_rng(seed).permutation(len(infos)).tolist()
    by_modality: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for i in order:
        by_modality[modality_family(infos[i].modality)][infos[i].category].append(i)
    turns = _in_turns(list(_in_turns(categories.values())) for categories in by_modality.values())
    return sorted(turns[:count], key=lambda i: (infos[i].modality.casefold(), infos[i].category, i))


def _in_turns(queues: Iterable[Sequence[int]]) -> list[int]:
    """The first of each queue, then the second of each, and so on."""
    waiting = [list(queue) for queue in queues]
    longest = max(map(len, waiting), default=0)
    return [queue[turn] for turn in range(longest) for queue in waiting if turn < len(queue)]


def sample_sheet(dataset: Dataset, count: int, *, columns: int = 7, side: int = 280, seed: int = 0) -> Picture:
    """A contact sheet of rows spread over modalities and categories, with masks, boxes and points."""
    rows = spread(dataset.infos, count, seed)
    tiles = [_tile(sample, side) for sample in dataset.samples(rows)]
    heading = f"{len(tiles)} of {len(dataset)} rows · tinted: mask · rectangle: box · disc and ring: key points"
    return contact_sheet(tiles, columns, side=side, heading=heading)


def occupancy_sheet(found: Survey, *, columns: int = 6, side: int = 200) -> Picture:
    """Where each super-category's masks lie: heat maps, each from 0 (dark) to its own maximum (bright)."""
    counts = Counter(m.supercategory for m in found.measurements)
    tiles = [
        Tile(
            picture=heat_map(found.occupancy[name], side),
            title=name,
            text=f"{rows} rows; brightest place in {100 * found.occupancy[name].max():.0f} % of them",
        )
        for name, rows in counts.most_common()
    ]
    return contact_sheet(tiles, columns, side=side, heading="Where the masks lie, by super-category")


def _tile(sample: Sample, side: int) -> Tile:
    picture = overlay(sample.image(), mask=sample.mask(), box=sample.box, points=sample.points, long_side=side)
    return Tile(picture=picture, title=f"{sample.modality} · {sample.category}", text=sample.query)
