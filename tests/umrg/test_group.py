"""Ids and seeds of groups and their answers."""

from itertools import pairwise

from umrg.group import Group
from umrg.sample import Sample

SAMPLE = Sample(
    id="a",
    query="Which organ filters blood?",
    image_bytes=b"",
    mask_bytes=(),
    box=(0, 0, 9, 9),
    points=((2, 2), (7, 7)),
    supercategory="abdomen",
    category="kidney",
    modality="ct",
)


def group(step: int = 3, index: int = 5) -> Group:
    return Group(run="demo", step=step, index=index, sample=SAMPLE)


def test_ids_name_run_step_index_and_answer() -> None:
    assert (group().id, group().answer_id(2)) == ("demo/3/5", "demo/3/5/2")


def test_seeds_are_the_same_on_every_machine() -> None:
    # From sha256 of "0/3/5/0", so that a run can be repeated elsewhere and later.
    assert [group().seed(0), group(step=0, index=0).seed(7)] == [1125738151, 685507834]


def test_seeds_differ_over_runs_steps_and_groups() -> None:
    seeds = [group(step, index).seed(run) for run in range(4) for step in range(16) for index in range(32)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_an_engine_that_counts_up_from_a_groups_seed_meets_no_other_group() -> None:
    first = sorted(group(step, index).seed(0) for step in range(10) for index in range(128))
    assert min(b - a for a, b in pairwise(first)) > 64
