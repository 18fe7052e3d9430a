"""Dataset statistics: row counts by modality and category, and sizes and positions of the targets."""

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
# Side of the occupancy maps: fine enough for a heat map, and small to accumulate.
_GRID = 96


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Size and position of one row's target, relative to its image."""

    modality: str
    supercategory: str
    category: str
    image_size: str
    """"WIDTHxHEIGHT" in pixels."""
    area: float
    """Fraction of the image covered by the mask."""
    centre_x: float
    """Centre of the box as a fraction of the image's width."""
    centre_y: float
    """Centre of the box as a fraction of the image's height."""
    width: float
    """Width of the box as a fraction of the image's width."""
    height: float
    """Height of the box as a fraction of the image's height."""


@dataclass(frozen=True, kw_only=True)
class Survey:
    """Measurements and occupancy maps of a whole dataset."""

    measurements: Sequence[Measurement]
    """One measurement per row."""
    occupancy: Mapping[str, NDArray[np.float64]]
    """For each super-category, the fraction of its masks that cover each place of the image, float64 [96, 96]."""


def survey(dataset: Dataset, progress: Callable[[int], object] = lambda done: None) -> Survey:
    """Measure every row in file order. `progress` is called with the number of rows done.

    Raises ValueError at the first invalid row.
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
    """Measure one row's target. `mask` is the sample's mask, bool [H, W]."""
    # The box's maximum is inclusive, hence + 1. A box may end at the image's edge, hence the limit of 1.
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
    """Counts, means and quantiles as JSON-serialisable data, overall and for each of `GROUPINGS`."""
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
    """Choose up to `count` random rows that cover as many modalities, and within each as many categories, as possible.

    The row numbers are sorted by modality and category.
    """
    order = np.random.default_rng(seed).permutation(len(infos)).tolist()
    by_modality: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for i in order:
        by_modality[modality_family(infos[i].modality)][infos[i].category].append(i)
    turns = _in_turns(list(_in_turns(categories.values())) for categories in by_modality.values())
    return sorted(turns[:count], key=lambda i: (infos[i].modality.casefold(), infos[i].category, i))


def _in_turns(queues: Iterable[Sequence[int]]) -> list[int]:
    """Round-robin order: the first item of each queue, then the second of each, and so on."""
    waiting = [list(queue) for queue in queues]
    longest = max(map(len, waiting), default=0)
    return [queue[turn] for turn in range(longest) for queue in waiting if turn < len(queue)]


def sample_sheet(dataset: Dataset, count: int, *, columns: int = 7, side: int = 280, seed: int = 0) -> Picture:
    """A contact sheet of rows from many modalities and categories, with masks, boxes and points drawn in."""
    rows = spread(dataset.infos, count, seed)
    tiles = [_tile(sample, side) for sample in dataset.samples(rows)]
    heading = f"{len(tiles)} of {len(dataset)} rows · tinted: mask · rectangle: box · disc and ring: key points"
    return contact_sheet(tiles, columns, side=side, heading=heading)


def occupancy_sheet(found: Survey, *, columns: int = 6, side: int = 200) -> Picture:
    """Heat maps of mask positions by super-category, each scaled from 0 (dark) to its own maximum (bright)."""
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
