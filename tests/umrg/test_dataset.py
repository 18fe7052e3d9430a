import json
import pickle
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import phantoms
from umrg.dataset import Cursor, Dataset, batches, parse_ground_truth, write_rows
from umrg.images import encode_png

# A busy machine is slow without being wrong.
steady = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

REAL = Path(__file__).parents[2].parent / "shared" / "data" / "umrg_real_sample.parquet"
Row = dict[str, Any]

needs_real_rows = pytest.mark.skipif(not REAL.exists(), reason="the released rows are not here")


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return list(phantoms.rows(24, seed=3, size=112, modalities=["CT", "fundus"]))


@pytest.fixture(scope="module")
def file(rows: list[Row], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "phantoms.parquet"
    write_rows(path, rows, rows_per_group=5)
    return path


@needs_real_rows
def test_the_released_rows_read() -> None:
    dataset = Dataset.open(REAL)
    assert len(dataset) == 42
    for sample in dataset:
        assert sample.image().shape == (sample.size.height, sample.size.width, 3)
        assert sample.mask().any()
    assert {info.category for info in dataset.infos} >= {"pubic symphysis", "COVID-19 infection", "liver"}
    assert len(Dataset.open(REAL, modality="mri")) == 10


def test_a_sample_is_what_was_written(rows: list[Row], file: Path) -> None:
    dataset = Dataset.open(file)
    assert [info.id for info in dataset.infos] == [row["extra_info"]["id"] for row in rows]
    for i in (0, 11, 23):
        sample, row = dataset[i], rows[i]
        assert sample.image_bytes == row["images"][0]["bytes"]
        assert sample.mask_bytes == (row["masks"][0]["bytes"],)
        assert sample.query == row["prompt"][0]["content"] == dataset.info(i).query
        assert list(sample.box) == json.loads(row["reward_model"]["ground_truth"])["bbox_2d"]
        assert sample.reasoning == row["extra_info"]["reasoning"]
        assert sample.extra["phrasing"] == "seen"
        assert (dataset.info(i).file, dataset.info(i).row) == (file, i)


def test_rows_pass_by_without_their_masks(file: Path) -> None:
    dataset = Dataset.open(file, modality="CT")
    expected = [replace(sample, mask_bytes=()) for sample in dataset]
    assert list(dataset.unmasked()) == expected and 0 < len(expected) < 24
    assert list(dataset.only([1, 3]).unmasked()) == [expected[1], expected[3]]


def test_several_masks_are_one_target(rows: list[Row], tmp_path: Path) -> None:
    first, second = rows[0], rows[1]
    both = first | {"masks": first["masks"] + second["masks"]}
    write_rows(tmp_path / "one.parquet", [both])
    write_rows(tmp_path / "parts.parquet", [first, second])
    parts = [sample.mask() for sample in Dataset.open(tmp_path / "parts.parquet")]
    assert (Dataset.open(tmp_path / "one.parquet")[0].mask() == (parts[0] | parts[1])).all()


def test_several_files_with_varying_extra_info_are_one_dataset(rows: list[Row], tmp_path: Path) -> None:
    write_rows(tmp_path / "a.parquet", rows[:3])
    names = ("id", "supercategory", "category")
    bare = [
        row | {"extra_info": {name: row["extra_info"][name] for name in names} | {"note": "x"}} for row in rows[3:6]
    ]
    pq.write_table(pa.Table.from_pylist(bare), tmp_path / "b.parquet")
    dataset = Dataset.open([tmp_path / "a.parquet", tmp_path / "b.parquet"])
    assert [info.modality for info in dataset.infos] == ["CT"] * 3 + ["unknown"] * 3
    assert dataset[4].reasoning is None
    assert dataset[4].extra == {"note": "x"}
    fields = {field.name for field in dataset.schema.field("extra_info").type}
    assert fields >= {"note", "modality", "phrasing"}


def test_filters_take_any_spelling_and_several_names(file: Path) -> None:
    every = Dataset.open(file)
    assert {info.modality for info in Dataset.open(file, modality="ct").infos} == {"CT"}
    assert len(Dataset.open(file, modality=["CT", "Fundus"])) == len(every)
    category = every.info(0).category
    chosen = Dataset.open(file, category=category.upper())
    assert len(chosen) == sum(info.category == category for info in every.infos)
    assert chosen[0].category == category


def test_a_filter_that_no_row_passes_names_the_nearest(file: Path) -> None:
    with pytest.raises(ValueError, match=r"modality 'fundos'; did you mean 'fundus'\?"):
        Dataset.open(file, modality="fundos")
    supercategory = Dataset.open(file, modality="fundus").info(0).supercategory
    with pytest.raises(ValueError, match="passes all filters"):
        Dataset.open(file, modality="CT", supercategory=supercategory)


def test_opening_reads_no_image(rows: list[Row], tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    marked = deepcopy(rows[:4])
    for row in marked:
        row["images"][0]["bytes"] = b"IMAGE" * 2000
    pq.write_table(pa.Table.from_pylist(marked), path, compression="none", use_dictionary=False)
    content = path.read_bytes()
    start = content.index(b"IMAGEIMAGE") - 40
    # The images' page is overwritten, its header included: whoever reads it fails.
    path.write_bytes(content[:start] + b"\xff" * 39_000 + content[start + 39_000 :])
    dataset = Dataset.open(path)
    assert len(dataset) == 4
    with pytest.raises(ValueError, match=r"row 0 of .*rows\.parquet cannot be read: its row group is damaged"):
        dataset[0]


@given(order=st.permutations(range(24)), memory=st.sampled_from([1, 40_000, 1 << 28]))
@settings(steady, max_examples=15)
def test_any_order_and_any_memory_give_the_same_rows(
    rows: list[Row], file: Path, order: list[int], memory: int
) -> None:
    dataset = Dataset.open(file, memory=memory)
    assert [sample.id for sample in dataset.samples(order)] == [rows[i]["extra_info"]["id"] for i in order]
    assert [dataset[i].id for i in order[:6]] == [rows[i]["extra_info"]["id"] for i in order[:6]]


def test_a_dataset_can_be_sent_to_another_process(file: Path) -> None:
    dataset = Dataset.open(file, memory=1)
    assert dataset[7].id == pickle.loads(pickle.dumps(dataset))[7].id


def test_an_id_that_occurs_twice_is_refused_naming_both_files(rows: list[Row], tmp_path: Path) -> None:
    write_rows(tmp_path / "a.parquet", rows[:2])
    write_rows(tmp_path / "b.parquet", rows[1:3])
    with pytest.raises(ValueError, match=rf"{rows[1]['extra_info']['id']}.*a\.parquet.*b\.parquet"):
        Dataset.open([tmp_path / "a.parquet", tmp_path / "b.parquet"])
    write_rows(tmp_path / "c.parquet", [rows[0], rows[0]])
    with pytest.raises(ValueError, match=r"occurs twice: in row 0 .* and row 1"):
        Dataset.open(tmp_path / "c.parquet")


def test_files_that_are_no_dataset_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.parquet").write_text("no parquet at all")
    pq.write_table(pa.table({"prompt": ["q"], "images": [b"i"]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match=r"gone\.parquet does not exist"):
        Dataset.open(tmp_path / "gone.parquet")
    with pytest.raises(ValueError, match=r"text\.parquet is not a readable parquet file"):
        Dataset.open(tmp_path / "text.parquet")
    (tmp_path / "pointer.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n")
    with pytest.raises(ValueError, match=r"pointer\.parquet is a Git LFS pointer"):
        Dataset.open(tmp_path / "pointer.parquet")
    with pytest.raises(ValueError, match="is a folder"):
        Dataset.open(tmp_path)
    with pytest.raises(ValueError, match=r"lacks masks\.bytes, .*extra_info\.category; "):
        Dataset.open(tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="no dataset file"):
        Dataset.open([])


def truth(text: str) -> Callable[[Row], None]:
    return lambda row: row["reward_model"].update(ground_truth=text)


def boxed(*box: float) -> Callable[[Row], None]:
    return truth(json.dumps({"bbox_2d": box, "point_2d": [[1, 1], [2, 2]]}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truth("{bbox"), "not JSON"),
        (truth("[1, 2]"), "without a usable bbox_2d"),
        (truth('{"point_2d": [[1, 1], [2, 2]]}'), "without a usable bbox_2d"),
        (truth('{"bbox_2d": [1, 1, 9, 9]}'), "bbox_2d and point_2d"),
        (truth('{"bbox_2d": [1, 1, 9, NaN], "point_2d": [[1, 1], [2, 2]]}'), "without a usable bbox_2d"),
        (
            truth('{"bbox_2d": [1, 1, 9, 9], "point_2d": [[1, 1], [2, 199]]}'),
            r"point \[2, 199\] outside its image",
        ),
        (boxed(9, 1, 2, 5), r"inverted box \[9, 1, 2, 5\]"),
        (boxed(1, 1, 113, 5), r"box \[1, 1, 113, 5\] outside its image of 112x112"),
        (boxed(-1, 1, 5, 5), "outside its image"),
        (lambda row: row["images"][0].update(bytes=b"no image"), "cannot be decoded"),
        (lambda row: row.update(images=[]), "has 0 images"),
        (lambda row: row.update(masks=[]), "image without mask"),
    ],
)
def test_a_row_that_is_not_sound_is_refused_naming_file_and_row(
    rows: list[Row], tmp_path: Path, damage: Callable[[Row], None], message: str
) -> None:
    row = deepcopy(rows[2])
    damage(row)
    write_rows(tmp_path / "rows.parquet", [*rows[:2], row])
    dataset = Dataset.open(tmp_path / "rows.parquet")
    assert dataset[1].id == rows[1]["extra_info"]["id"]
    with pytest.raises(ValueError, match=message) as caught:
        dataset[2]
    assert row["extra_info"]["id"] in str(caught.value)
    assert "rows.parquet" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "wrapped", [lambda truth: truth, json.dumps, lambda truth: {"ground_truth": json.dumps(truth)}]
)
def test_a_ground_truth_may_be_an_object_or_its_text(wrapped: Callable[[object], object]) -> None:
    truth = {"bbox_2d": [1, 2, 30, 40], "point_2d": [[5, 6], [7.5, 8]]}
    assert parse_ground_truth(wrapped(truth), "line 3") == ((1, 2, 30, 40), ((5, 6), (7.5, 8)))
    with pytest.raises(ValueError, match="line 3 has no ground_truth"):
        parse_ground_truth(None, "line 3")


@pytest.mark.parametrize("field", ["images", "masks"])
def test_a_picture_cut_short_is_refused_naming_file_and_row(rows: list[Row], tmp_path: Path, field: str) -> None:
    row = deepcopy(rows[0])
    row[field][0]["bytes"] = row[field][0]["bytes"][:-60]
    write_rows(tmp_path / "rows.parquet", [row])
    sample = Dataset.open(tmp_path / "rows.parquet")[0]
    with pytest.raises(ValueError, match=rf"{sample.id}.*rows\.parquet cannot be decoded"):
        sample.image() if field == "images" else sample.mask()


def test_an_empty_mask_is_refused_unless_declared(rows: list[Row], tmp_path: Path) -> None:
    empty = encode_png(np.zeros((112, 112), dtype=np.bool_))
    undeclared, declared = (row | {"masks": [{"bytes": empty, "path": ""}]} for row in deepcopy(rows[:2]))
    declared["extra_info"]["no_target"] = True
    write_rows(tmp_path / "rows.parquet", [undeclared, declared])
    dataset = Dataset.open(tmp_path / "rows.parquet")
    assert not dataset[1].mask().any()
    with pytest.raises(ValueError, match="is empty; mark the row `no_target`"):
        dataset[0].mask()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda row: row["extra_info"].update(id=None), r"row 1 of .*rows\.parquet has no extra_info\.id"),
        (lambda row: row.update(prompt=[]), r"row 1 of .*rows\.parquet has no question"),
    ],
)
def test_a_row_without_id_or_question_is_refused_on_opening(
    rows: list[Row], tmp_path: Path, damage: Callable[[Row], None], message: str
) -> None:
    row = deepcopy(rows[1])
    damage(row)
    write_rows(tmp_path / "rows.parquet", [rows[0], row])
    with pytest.raises(ValueError, match=message):
        Dataset.open(tmp_path / "rows.parquet")


@given(
    length=st.integers(1, 40),
    batch_size=st.integers(1, 50),
    seed=st.integers(0, 2**40),
    stop=st.integers(0, 12),
)
@steady
def test_continuing_from_a_saved_cursor_gives_what_an_uninterrupted_pass_gives(
    length: int, batch_size: int, seed: int, stop: int
) -> None:
    whole = batches(range(length), batch_size, Cursor(seed=seed))
    cursor = Cursor(seed=seed)
    for _ in range(stop):
        _, cursor = next(whole)
    saved = cursor.model_dump_json()
    resumed = batches(range(length), batch_size, Cursor.model_validate_json(saved))
    for _ in range(4):
        assert next(resumed) == next(whole)


@given(length=st.integers(1, 30), batch_size=st.integers(1, 40), seed=st.integers(0, 99))
@steady
def test_every_epoch_gives_each_row_once(length: int, batch_size: int, seed: int) -> None:
    stream = batches(range(length), batch_size, Cursor(seed=seed))
    rows: list[int] = []
    while len(rows) < 3 * length:
        batch, _ = next(stream)
        assert len(batch) == batch_size
        rows += batch
    for epoch in range(3):
        assert sorted(rows[epoch * length : (epoch + 1) * length]) == list(range(length))


def test_a_cursor_of_a_longer_dataset_is_refused() -> None:
    with pytest.raises(ValueError, match="belongs to another dataset"):
        batches(range(5), 2, Cursor(seed=0, position=9))


def test_writing_tells_its_progress_and_leaves_nothing_half_written(rows: list[Row], tmp_path: Path) -> None:
    told: list[int] = []
    assert write_rows(tmp_path / "all.parquet", rows[:7], rows_per_group=3, progress=told.append) == 7
    assert told == [3, 6, 7]
    assert pq.read_metadata(tmp_path / "all.parquet").num_row_groups == 3
    strange = rows[7] | {"extra_info": rows[7]["extra_info"] | {"colour": "red"}}
    with pytest.raises(ValueError, match="colour, which the schema lacks"):
        write_rows(tmp_path / "part.parquet", [*rows[:4], strange], rows_per_group=2)
    assert [path.name for path in tmp_path.iterdir()] == ["all.parquet"]
