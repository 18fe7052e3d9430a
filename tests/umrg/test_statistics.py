from pathlib import Path
from typing import Any

import numpy as np
import pytest

import phantoms
from umrg.dataset import Dataset, write_rows
from umrg.images import encode_png
from umrg.sample import Sample
from umrg.statistics import Measurement, measure, occupancy_sheet, sample_sheet, spread, summary, survey


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    path = tmp_path_factory.mktemp("data") / "phantoms.parquet"
    write_rows(path, phantoms.rows(24, seed=2, size=112, modalities=["CT", "fundus", "X-ray"]))
    return Dataset.open(path)


def test_a_target_is_measured_relative_to_its_image() -> None:
    mask = np.zeros((50, 100), dtype=np.bool_)
    mask[10:20, 20:60] = True
    sample = Sample(
        id="a",
        query="?",
        image_bytes=encode_png(np.zeros((50, 100, 3), dtype=np.uint8)),
        mask_bytes=(encode_png(mask),),
        box=(20, 10, 59, 19),
        points=((30, 15), (50, 15)),
        supercategory="organ",
        category="liver",
        modality="CT",
    )
    assert measure(sample, mask) == Measurement(
        modality="CT",
        supercategory="organ",
        category="liver",
        image_size="100x50",
        area=400 / 5000,
        centre_x=0.4,
        centre_y=0.3,
        width=0.4,
        height=0.2,
    )


def test_a_summary_counts_every_row_in_each_grouping_and_orders_by_size() -> None:
    def found(modality: str, area: float) -> Measurement:
        return Measurement(
            modality=modality,
            supercategory="organ",
            category="liver",
            image_size="8x8",
            area=area,
            centre_x=0.5,
            centre_y=0.5,
            width=0.1,
            height=0.1,
        )

    figures: Any = summary([found("CT", 0.1), found("MRI", 0.2), found("MRI", 0.4)])
    assert figures["rows"] == 3
    assert figures["image_sizes"] == {"8x8": 3}
    assert list(figures["modality"]) == ["MRI", "CT"]
    assert figures["modality"]["MRI"]["rows"] == 2
    assert figures["modality"]["MRI"]["area"] == {
        "mean": 0.3, "q05": 0.21, "q25": 0.25, "q50": 0.3, "q75": 0.35, "q95": 0.39,
    }  # fmt: skip
    assert figures["all"]["area"]["q50"] == 0.2
    assert figures["category"]["liver"]["rows"] == 3


def test_a_survey_measures_every_row_and_tells_its_progress(dataset: Dataset) -> None:
    told: list[int] = []
    found = survey(dataset, told.append)
    assert told == list(range(1, 25))
    assert [m.category for m in found.measurements] == [info.category for info in dataset.infos]
    for name, density in found.occupancy.items():
        areas = [m.area for m in found.measurements if m.supercategory == name]
        assert density.mean() == pytest.approx(np.mean(areas), rel=0.02)
        assert density.max() <= 1 + 1e-6


def test_samples_are_spread_over_modalities_and_categories(dataset: Dataset) -> None:
    assert {dataset.info(i).modality for i in spread(dataset.infos, 3)} == {"CT", "fundus", "X-ray"}
    chosen = [dataset.info(i) for i in spread(dataset.infos, 9)]
    assert len({(info.modality, info.category) for info in chosen}) == 9
    assert sorted(spread(dataset.infos, 99)) == list(range(24))


def test_sheets_hold_their_tiles(dataset: Dataset, tmp_path: Path) -> None:
    sheet = sample_sheet(dataset, 6, columns=3, side=80)
    assert sheet.dtype == np.uint8 and sheet.shape[1] > 3 * 80 and sheet.shape[0] > 2 * 80
    assert occupancy_sheet(survey(dataset), columns=3, side=80).shape[1] == sheet.shape[1]
