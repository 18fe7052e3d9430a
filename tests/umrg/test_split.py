import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import phantoms
from umrg.dataset import Dataset, RowInfo, write_rows
from umrg.names import modality_family
from umrg.split import SplitBy, plan_split, write_split

# A busy machine is slow without being wrong.
steady = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

CATEGORIES = ("liver", "kidney", "left kidney", "spleen")
MODALITIES = ("CT", "MRI", "MRI-FLAIR", "X-ray")


def info(number: int, query: str, category: str, modality: str, phrasing: str | None) -> RowInfo:
    return RowInfo(
        id=str(number),
        query=query,
        supercategory="organ",
        category=category,
        modality=modality,
        phrasing=phrasing,
        file=Path("rows.parquet"),
        row=number,
    )


@st.composite
def infos(draw: st.DrawFn) -> list[RowInfo]:
    """Rows whose queries recur within and across categories, in varying case."""
    rows = st.tuples(
        st.sampled_from(["Where is bile made?", "where is  bile made?", "What filters blood?", "What is big?", "Why?"]),
        st.sampled_from(CATEGORIES),
        st.sampled_from(MODALITIES),
        st.sampled_from([None, "seen", "held_out"]) if draw(st.booleans()) else st.none(),
    )
    return [info(i, *row) for i, row in enumerate(draw(st.lists(rows, min_size=1, max_size=30)))]


def key(by: SplitBy, row: RowInfo) -> str:
    if by is SplitBy.PHRASING:
        return " ".join(row.query.casefold().split())
    return modality_family(row.modality) if by is SplitBy.MODALITY else str(getattr(row, by.value))


@given(rows=infos(), by=st.sampled_from(SplitBy), share=st.floats(0.05, 0.95), seed=st.integers(0, 99))
@steady
def test_nothing_that_is_held_out_is_on_both_sides(
    rows: Sequence[RowInfo], by: SplitBy, share: float, seed: int
) -> None:
    try:
        split = plan_split(rows, by, share=share, seed=seed)
    except ValueError as error:
        assert "held out" in str(error)
        return
    train, held_out = ({key(by, rows[i]) for i in side} for side in (split.train, split.held_out))
    assert train and held_out and not train & held_out
    assert sorted(split.train + split.held_out) == list(range(len(rows)))
    assert split == plan_split(rows, by, share=share, seed=seed)


@pytest.mark.parametrize(("share", "count"), [(0.01, 1), (0.25, 1), (0.5, 2), (0.99, 3)])
def test_by_name_a_share_of_the_names_is_held_out_but_never_all(share: float, count: int) -> None:
    rows = [info(i, "?", CATEGORIES[i % 4], "CT", None) for i in range(20)]
    split = plan_split(rows, SplitBy.CATEGORY, share=share)
    assert len(split.held_names) == count
    assert {rows[i].category for i in split.held_out} == set(split.held_names)


def test_phrasings_that_are_marked_are_held_out_and_the_seen_ones_stay() -> None:
    rows = [
        info(0, "Where is bile made?", "liver", "CT", "seen"),
        info(1, "What fails in cirrhosis?", "liver", "CT", "held_out"),
        info(2, "What filters blood?", "kidney", "CT", "seen"),
        info(3, "Where is urine made?", "kidney", "CT", "seen"),
    ]
    split = plan_split(rows, SplitBy.PHRASING)
    assert split.held_out == (1,)
    assert split.held_names == ("What fails in cirrhosis?",)


def test_without_marks_every_category_with_two_queries_gives_some() -> None:
    rows = [info(10 * k + j, f"{name} {j}?", name, "CT", None) for k, name in enumerate(CATEGORIES) for j in range(10)]
    split = plan_split([*rows, info(99, "only one", "aorta", "CT", None)], SplitBy.PHRASING, share=0.3)
    assert [sum(rows[i].category == name for i in split.held_out) for name in CATEGORIES] == [3, 3, 3, 3]
    assert len(split.train) == 29


def test_names_to_hold_out_take_any_spelling_and_a_family_takes_its_sequences() -> None:
    rows = [info(i, "?", "liver", modality, None) for i, modality in enumerate(MODALITIES)]
    assert plan_split(rows, SplitBy.MODALITY, hold_out=["mri"]).held_out == (1, 2)
    assert plan_split(rows, SplitBy.MODALITY, hold_out=["MRI-flair"]).held_out == (2,)
    assert plan_split(rows, SplitBy.MODALITY, hold_out=["x ray"]).held_names == ("X-ray",)


@pytest.mark.parametrize(
    ("by", "hold_out", "share", "message"),
    [
        (SplitBy.CATEGORY, ["livre"], 0.2, "did you mean 'liver'"),
        (SplitBy.CATEGORY, ["liver", "spleen"], 0.2, "all rows would be held out"),
        (SplitBy.PHRASING, ["liver"], 0.2, "cannot be held out by phrasing"),
        (SplitBy.PHRASING, [], 0.2, "no category has two different queries"),
        (SplitBy.MODALITY, [], 0.2, "no second name exists"),
        (SplitBy.CATEGORY, [], 1.0, "between 0 and 1"),
    ],
)
def test_what_cannot_be_split_is_said(by: SplitBy, hold_out: list[str], share: float, message: str) -> None:
    rows = [info(0, "a", "liver", "CT", None), info(1, "b", "spleen", "CT", None)]
    with pytest.raises(ValueError, match=message):
        plan_split(rows, by, hold_out=hold_out, share=share)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    rows = list(phantoms.rows(12, seed=1, size=112, modalities=["CT", "fundus", "OCT"]))
    write_rows(tmp_path / "a.parquet", rows[:7])
    write_rows(tmp_path / "b.parquet", rows[7:])
    return Dataset.open([tmp_path / "a.parquet", tmp_path / "b.parquet"])


def test_the_files_of_a_split_hold_the_rows_unchanged(dataset: Dataset, tmp_path: Path) -> None:
    told: list[int] = []
    split = plan_split(dataset.infos, SplitBy.MODALITY, hold_out=["OCT"])
    report = write_split(dataset, split, tmp_path / "out", told.append)
    sides = {name: Dataset.open(tmp_path / "out" / f"{name}.parquet") for name in ("train", "held_out")}
    copied = {side.info(i).id: side.row(i) for side in sides.values() for i in range(len(side))}
    assert copied == {dataset.info(i).id: dataset.row(i) for i in range(len(dataset))}
    assert {row.modality for row in sides["held_out"].infos} == {"OCT"}
    assert report == json.loads((tmp_path / "out" / "split.json").read_text())
    assert report["rows"] == {"train": len(split.train), "held_out": len(split.held_out)}
    assert report["images_on_both_sides"] == 0
    assert told[-1] == 12 and all(a < b for a, b in pairwise(told))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "held_out.parquet",
        "split.json",
        "train.parquet",
    ]


def test_images_on_both_sides_are_counted(dataset: Dataset, tmp_path: Path) -> None:
    first = dataset.info(0)
    split = plan_split(dataset.infos, SplitBy.CATEGORY, hold_out=[first.category])
    assert any(dataset[i].image_bytes == dataset[0].image_bytes for i in split.train)
    assert write_split(dataset, split, tmp_path / "out")["images_on_both_sides"] == 1


def test_a_split_does_not_replace_its_own_source(dataset: Dataset, tmp_path: Path) -> None:
    source = tmp_path / "train.parquet"
    (tmp_path / "a.parquet").rename(source)
    own = Dataset.open(source)
    with pytest.raises(ValueError, match="a file of the dataset itself"):
        write_split(own, plan_split(own.infos, SplitBy.CATEGORY), tmp_path)
    assert pq.read_metadata(source).num_rows == 7
