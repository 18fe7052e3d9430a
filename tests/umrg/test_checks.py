"""Every check fires on a planted fault, and is silent on clean rows."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import phantoms
from phantoms.scenes import STRUCTURES
from umrg import checks
from umrg.checks import CHECKS, CheckedRow, DuplicateIndex, Finding, Severity, check_row
from umrg.dataset import Dataset, write_rows
from umrg.images import decode_image, encode_png
from umrg.keypoints import reference_points, tight_box
from umrg.prompts import clean_query
from umrg.row_groups import Damage
from umrg.rows import RowInfo

FILE = Path("rows.parquet")
Row = dict[str, Any]
Mask = NDArray[np.bool_]

QUESTION = "Which of these stores sugar?"

# A busy machine is slow without being wrong.
steady = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def checked(*rows: Any, file: Path = FILE, duplicates: DuplicateIndex | None = None) -> list[CheckedRow]:
    duplicates = duplicates or DuplicateIndex()
    return [check_row(row, file, number, duplicates) for number, row in enumerate(rows)]


def names(findings: list[Finding]) -> list[str]:
    return [finding.check.name for finding in findings]


@pytest.fixture(scope="module")
def clean() -> Row:
    """A phantom's row: a liver, in one piece."""
    rows = phantoms.rows(40, seed=3, size=112, modalities=["CT"])
    return next(row for row in rows if row["extra_info"]["category"] == "liver")  # type: ignore[index]


def test_phantoms_are_clean_but_for_masks_that_are_in_parts() -> None:
    for row in checked(*phantoms.rows(400, seed=11)):
        assert set(names(row.findings)) <= {"several_parts"}
        assert row.mask is not None and row.pixels is not None


@pytest.mark.parametrize("annotation", ["exact", "coarse"])
def test_only_the_boxes_and_points_of_coarse_phantoms_are_found(annotation: Any) -> None:
    rows = list(phantoms.rows(60, seed=5, size=112, annotation=annotation))
    found = {name for row in checked(*rows) for name in names(row.findings)} - {"several_parts"}
    assert found == ({"loose_box", "point_off_mask"} if annotation == "coarse" else set())


def truth(box: object, points: object) -> Callable[[Row], None]:
    text = json.dumps({"bbox_2d": box, "point_2d": points})
    return lambda row: row["reward_model"].update(ground_truth=text)


def ask(question: str) -> Callable[[Row], None]:
    return lambda row: row["prompt"][0].update(content=question)


def say(*turns: tuple[str, str]) -> Callable[[Row], None]:
    return lambda row: row.update(prompt=[{"role": role, "content": content} for role, content in turns])


def reason(text: str) -> Callable[[Row], None]:
    return lambda row: row["extra_info"].update(reasoning=text)


def paint(**regions: tuple[slice, slice]) -> Callable[[Row], None]:
    """A mask of these regions, with its own tight box and key points."""

    def plant(row: Row) -> None:
        mask = np.zeros((112, 112), dtype=np.bool_)
        for region in regions.values():
            mask[region] = True
        row["masks"] = [{"bytes": encode_png(mask), "path": ""}]
        if mask.any():
            truth(tight_box(mask), reference_points(mask))(row)

    return plant


def square(x: int, y: int, side: int) -> tuple[slice, slice]:
    return slice(y, y + side), slice(x, x + side)


FAULTS: list[tuple[str, Callable[[Row], None], str]] = [
    ("schema", lambda row: row["extra_info"].update(id=None), "has no extra_info.id"),
    ("schema", lambda row: row.update(prompt=[]), "has no question"),
    ("schema", ask(" <image> "), "no words of its own"),
    ("schema", lambda row: row.update(images=[]), "has 0 images"),
    ("schema", lambda row: row.update(masks=[]), "without mask"),
    ("schema", lambda row: row["reward_model"].update(ground_truth="{bbox"), "not JSON"),
    ("schema", truth([1, 2, float("nan"), 4], [[1, 1], [2, 2]]), "must read"),
    ("unreadable_image", lambda row: row["images"][0].update(bytes=b"no image"), "cannot be decoded"),
    ("unreadable_image", lambda row: row["images"][0].update(bytes=row["images"][0]["bytes"][:-60]), "cut short"),
    ("unreadable_mask", lambda row: row["masks"][0].update(bytes=row["masks"][0]["bytes"][:-60]), "cut short"),
    ("unreadable_mask", lambda row: row["masks"].append({"bytes": row["images"][0]["bytes"][:9]}), "cannot be decoded"),
    ("unreadable_mask", lambda row: row["masks"][0].update(bytes=encode_png(np.ones((9, 9), bool))), "is 9x9 px"),
    ("empty_mask", paint(), "no pixel of the mask is 128 or more"),
    ("box_outside", truth([9, 1, 2, 5], [[1, 1], [2, 2]]), "inverted box [9, 1, 2, 5]"),
    ("box_outside", truth([1, 1, 113, 5], [[1, 1], [2, 2]]), "outside its image of 112x112 px"),
    ("point_outside", truth([1, 1, 9, 9], [[1, -1], [2, 2]]), "point [1, -1] outside its image of 112x112 px"),
    ("loose_box", truth([0, 0, 111, 111], [[56, 56], [57, 57]]), "off the mask's tight box ["),
    ("point_off_mask", truth([0, 0, 111, 111], [[0, 0], [57, 57]]), "the point [0, 0] lies "),
    ("tiny_mask", paint(only=square(50, 50, 3)), "the mask has 9 px, 0.072 % of its image"),
    ("several_parts", paint(a=square(9, 9, 8), b=square(40, 9, 6)), "2 parts (64, 36 px)"),
    ("names_category", ask("Which of these is the LIVER?"), "names its category 'liver'"),
    (
        "special_tokens",
        ask("Which organ <|image_pad|> stores glycogen <image>?"),
        "holds <|image_pad|>, <image>, which",
    ),
    ("schema", say(("assistant", "It is the liver.")), "no question, only turns of assistant"),
    ("schema", say(("system", "You are careful."), ("user", "")), "only turns of system"),
    ("unseen_turns", say(("system", "You are careful."), ("user", QUESTION)), "several turns (system, user)"),
    ("unseen_turns", say(("user", "Which view?"), ("gpt", "Axial."), ("Human", QUESTION)), "(user, gpt, user)"),
    ("unseen_turns", say(("user", QUESTION), ("assistant", "The large one.")), "several turns (user, assistant)"),
    ("bad_reasoning", reason("<think>It is large.</think>"), "<think>, </think> in its"),
    ("bad_reasoning", reason("Is it < Answer >this one?"), "< Answer > in its"),
    ("bad_reasoning", reason("It is large.<|im_end|>"), "<|im_end|> in its"),
    ("bad_reasoning", reason(" \n"), "a blank extra_info.reasoning"),
    ("schema", lambda row: row["images"][0].update(bytes=None), "in its images and does not hold it"),
    ("schema", lambda row: row["masks"].append({"bytes": None, "path": "b.png"}), "names 'b.png' in its masks"),
    ("unnamed", lambda row: row["extra_info"].update(category=None), "fill in extra_info.category"),
]


@pytest.mark.parametrize(("check", "plant", "message"), FAULTS)
def test_a_planted_fault_is_found(
    clean: Row, tmp_path: Path, check: str, plant: Callable[[Row], None], message: str
) -> None:
    row = deepcopy(clean)
    plant(row)
    (unplanted,), (found,) = checked(clean), checked(row)
    assert unplanted.findings == []
    (finding,) = (finding for finding in found.findings if finding.check.name == check and message in finding.message)
    assert "\n" not in finding.message and FILE.name not in finding.message
    assert found.usable == readable(row, tmp_path) == (finding.check.severity is Severity.WARNING)


def readable(row: Row, folder: Path) -> bool:
    """Whether training would get through with the row."""
    write_rows(folder / "one.parquet", [row])
    try:
        sample = Dataset.open(folder / "one.parquet")[0]
        return bool(sample.image().any() and sample.mask().any() and clean_query(sample.query))
    except ValueError:
        return False


@pytest.mark.parametrize(
    ("side", "said"),
    [
        (1, "1 px, 100 % of its image"),
        (3, "1 px, 11 % of its"),
        (100, "1 px, 0.01 % of its"),
        (7000, "1 px, 0.000002 % of"),
    ],
)
def test_shares_and_lengths_are_written_as_people_write_them(side: int, said: str) -> None:
    mask = np.zeros((side, side), dtype=np.bool_)
    mask[0, 0] = True
    (finding,) = checks.check_shape(mask)
    assert said in finding.message
    (off,) = checks.check_tightness((0, 0, 2_345_678, 0), mask)
    assert "[0, 0, 2345678, 0] is up to 2345678 px off" in off.message


def test_a_row_of_a_damaged_file_is_named() -> None:
    (found,) = checked(Damage(reason="its row group, rows 0 to 63, is damaged (oops)"))
    assert names(found.findings) == ["damaged_row"] and not found.usable
    assert "rows 0 to 63" in found.findings[0].message


def test_an_empty_mask_of_a_row_that_declares_no_target_is_clean(clean: Row) -> None:
    row = deepcopy(clean)
    paint()(row)
    row["extra_info"]["no_target"] = True
    assert checked(row)[0].findings == []


def test_a_repeated_id_is_found_in_the_later_row(clean: Row) -> None:
    other = deepcopy(clean)
    ask("Which organ makes bile?")(other)
    first, second = checked(clean, other)
    assert first.findings == []
    assert names(second.findings) == ["repeated_id"]
    assert "is that of row 0; ids must be unique" in second.findings[0].message


def renamed(row: Row, row_id: str, image: str, question: str) -> Row:
    """The row with another id, image name and question; the image's pixels are the same, its bytes are not."""
    other = deepcopy(row)
    pixels = decode_image(other["images"][0]["bytes"], "")
    other["images"][0] = {"bytes": encode_png(pixels), "path": image}
    other["extra_info"]["id"] = row_id
    ask(question)(other)
    return other


def test_an_image_under_two_names_is_found_and_rows_that_share_one_are_not(clean: Row) -> None:
    name = clean["images"][0]["path"]
    shared = renamed(clean, "b", name, "Which organ makes bile?")
    twice = renamed(clean, "c", name, "  which ORGAN makes bile?")
    called = renamed(clean, "d", "other.png", "What swells in hepatitis?")
    found = checked(clean, shared, twice, called)
    assert [names(row.findings) for row in found] == [[], [], ["duplicated_image"], ["duplicated_image"]]
    assert "asks the question of row 1" in found[2].findings[0].message
    assert "'other.png' is that of row 0" in found[3].findings[0].message


def test_an_image_in_two_files_is_found(clean: Row) -> None:
    duplicates = DuplicateIndex()
    checked(clean, duplicates=duplicates)
    other = renamed(clean, "b", clean["images"][0]["path"], "Which organ makes bile?")
    (found,) = checked(other, file=Path("held_out.parquet"), duplicates=duplicates)
    assert names(found.findings) == ["duplicated_image"]
    assert "row 0 of rows.parquet" in found.findings[0].message


def test_a_mask_that_stands_for_two_categories_is_found(clean: Row) -> None:
    other = renamed(clean, "b", clean["images"][0]["path"], "Which organ clears old red cells?")
    other["extra_info"]["category"] = "spleen"
    found = checked(clean, other)
    assert names(found[1].findings) == ["shared_mask"]
    assert "there for 'liver', here for 'spleen'" in found[1].findings[0].message


@st.composite
def blobs(draw: st.DrawFn) -> Mask:
    """A mask of one ellipse of at least 16 pixels, cut off by the image where it leaves it."""
    height, width = draw(st.integers(12, 80)), draw(st.integers(12, 80))
    x, y = draw(st.floats(0, width - 1)), draw(st.floats(0, height - 1))
    rows, columns = np.ogrid[:height, :width]
    mask = ((columns - x) / draw(st.floats(6, 40))) ** 2 + ((rows - y) / draw(st.floats(6, 40))) ** 2 <= 1
    return np.asarray(mask)


@given(mask=blobs())
@steady
def test_the_tight_box_and_key_points_of_a_mask_are_clean(mask: Mask) -> None:
    assert [*checks.check_tightness(tight_box(mask), mask)] == []
    assert [*checks.check_points(reference_points(mask), mask)] == []
    assert [*checks.check_shape(mask)] == []


@given(mask=blobs(), edge=st.integers(0, 3), off=st.floats(-30, 30))
@steady
def test_an_edge_that_is_off_by_more_than_a_pixel_is_found(mask: Mask, edge: int, off: float) -> None:
    box = [float(v) for v in tight_box(mask)]
    box[edge] += off
    found = [*checks.check_tightness((box[0], box[1], box[2], box[3]), mask)]
    assert len(found) == (abs(box[edge] - tight_box(mask)[edge]) > 1)


def test_a_large_image_may_be_off_by_two_pixels_in_840() -> None:
    mask = np.zeros((1680, 840), dtype=np.bool_)
    mask[100:900, 100:500] = True
    assert [*checks.check_tightness((96, 100, 499, 903), mask)] == []
    assert names([*checks.check_tightness((95, 100, 499, 899), mask)]) == ["loose_box"]


@given(mask=blobs(), data=st.data())
@steady
def test_a_point_is_found_where_its_pixel_is_not_the_masks(mask: Mask, data: st.DataObject) -> None:
    height, width = mask.shape
    x, y = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    on = reference_points(mask)[0]
    found = [*checks.check_points((on, (x, y)), mask)]
    assert len(found) == (not mask[y, x])
    if found:
        rows, columns = np.nonzero(mask)
        nearest = np.hypot(rows - y, columns - x).min()
        assert found[0].degree == pytest.approx(nearest / max(mask.shape))


@given(sizes=st.lists(st.integers(4, 9), min_size=1, max_size=9))
@steady
def test_the_parts_of_a_mask_are_counted(sizes: list[int]) -> None:
    mask = np.zeros((30, 30), dtype=np.bool_)
    for k, size in enumerate(sizes):
        mask[square(k % 3 * 10, k // 3 * 10, size)] = True
    found = [*checks.check_shape(mask)]
    assert names(found) == (["several_parts"] if len(sizes) > 1 else [])
    if found:
        assert f"the mask has {len(sizes)} parts ({max(sizes) ** 2}, " in found[0].message


def test_pixels_that_touch_at_a_corner_are_one_part() -> None:
    assert [*checks.check_shape(np.eye(20, dtype=np.bool_))] == []


def asked(question: str, category: str) -> list[str]:
    info = RowInfo(
        id="a", query=question, supercategory="organ", category=category, modality="CT", phrasing=None, file=FILE, row=0
    )
    return names([*checks.check_words(info)])


@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda structure: structure.name)
def test_implicit_questions_are_clean_and_the_same_with_the_name_are_not(structure: Any) -> None:
    for question in structure.queries + structure.held_out_queries:
        assert asked(question, structure.name) == []
        assert asked(f"{question} Is it the {structure.name.upper()}?", structure.name) == ["names_category"]


@given(
    before=st.text(st.characters(blacklist_characters="<|>"), max_size=20),
    token=st.sampled_from(["<|image_pad|>", "<|im_end|>", "<image>", "<video>", "<|x|>"]),
)
@steady
def test_special_tokens_are_found_anywhere(before: str, token: str) -> None:
    assert "special_tokens" in asked(f"{before} organ {token}", "liver")
    assert "special_tokens" not in asked(f"{before} organ", "liver")


@given(image=st.binary(max_size=80), mask=st.binary(max_size=80), reference=st.text(max_size=60))
@steady
def test_any_bytes_whatever_give_findings(clean: Row, image: bytes, mask: bytes, reference: str) -> None:
    for field, content in (("images", image), ("masks", mask), ("reward_model", reference)):
        row = deepcopy(clean)
        if field == "reward_model":
            row[field]["ground_truth"] = content
        else:
            row[field][0]["bytes"] = content
        assert not checked(row)[0].usable


def test_checks_are_known_by_their_names() -> None:
    assert len({check.name for check in CHECKS}) == len(CHECKS)
    planted = {check for check, _, _ in FAULTS}
    elsewhere = {"damaged_row", "repeated_id", "duplicated_image", "shared_mask"}
    with_a_model = {"over_limit", "image_shrunk", "low_ceiling"}
    assert planted | elsewhere | with_a_model == {check.name for check in CHECKS}


def test_every_check_stands_in_the_documentation() -> None:
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    errors, warnings = text[text.index("An **error**") :].split("A **warning**")
    for check in CHECKS:
        assert f"| `{check.name}` |" in (errors if check.severity is Severity.ERROR else warnings)
