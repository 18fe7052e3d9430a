"""Prompts are measured before the first step."""

from typing import Any

import numpy as np
import pytest

from cluster.config import SftConfig, load_config
from cluster.data import open_rows
from cluster.lengths import fitting
from cluster.run_folder import RunFolder
from cluster.sft import Images
from phantoms import rows
from reasoner.prompter import load_prompter
from tests.conftest import ROOT, TINY_REASONER
from umrg.dataset import Dataset
from umrg.dataset_writer import write_rows


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Six rows, of which the third and the fifth ask at length."""
    path = tmp_path_factory.mktemp("data") / "rows.parquet"
    drawn: list[Any] = list(rows(6, seed=3, modalities=["CT"], queries_per_image=1))
    for i in (2, 4):
        drawn[i]["prompt"][0]["content"] = "where " * 100 + "is it?"
    write_rows(path, drawn)
    return path


@pytest.fixture(scope="module")
def prompter():
    return load_prompter(TINY_REASONER)


def test_lengths_are_those_of_the_prompts(files, prompter):
    kept, found = fitting(Dataset.open(files), prompter, most=500, overlong="refuse", key="rollout.max_prompt_tokens")
    ids = [len(prompter.encode(s.query, prompter.encode_image(s.image())).token_ids) for s in kept]
    assert len(kept) == 6 and (found.shortest, found.longest) == (min(ids), max(ids))
    assert found.median == int(np.median(ids)) and found.left_out == 0
    assert str(found) == f"6 rows of {min(ids)} to {max(ids)} tokens"


def test_a_long_row_is_named_with_what_to_change(files, prompter):
    with pytest.raises(ValueError) as error:
        fitting(Dataset.open(files), prompter, most=150, overlong="refuse", key="rollout.max_prompt_tokens")
    third = Dataset.open(files)[2]
    tokens = prompter.prompt_tokens(third.query, third.size)
    assert str(error.value) == (
        f"{third.name} has {tokens} tokens, 64 of them for the image, and rollout.max_prompt_tokens allows 150, and 1 "
        "more of 6 rows are too long; raise it, lower max_pixels, or set data.overlong=leave_out"
    )


def test_long_rows_are_left_out_and_counted(files, prompter):
    everything = Dataset.open(files)
    kept, found = fitting(everything, prompter, most=150, overlong="leave_out", key="rollout.max_prompt_tokens")
    assert [sample.id for sample in kept] == [everything[i].id for i in (0, 1, 3, 5)]
    assert found.left_out == 2 and str(found).endswith("; 2 longer ones left out")


def test_nothing_left_is_refused(files, prompter):
    with pytest.raises(ValueError, match="allows 10, and 5 more of 6 rows are too long"):
        fitting(Dataset.open(files), prompter, most=10, overlong="leave_out", key="rollout.max_prompt_tokens")


def test_a_run_is_refused_before_anything_starts(files, demo_config, tmp_path):
    overrides = (f"data.train=[{files}]", f"data.eval=[{files}]", "rollout.max_prompt_tokens=150", f"runs={tmp_path}")
    config = demo_config(*overrides)
    with pytest.raises(ValueError, match=r"rollout.max_prompt_tokens allows 150"):
        open_rows(config, RunFolder(tmp_path / "a"))
    config = demo_config(*overrides, "data.overlong=leave_out")
    train, held_out, lengths = open_rows(config, RunFolder(tmp_path / "b"))
    assert len(train) == len(held_out) == 4 and lengths.left_out == 2


def test_fewer_pixels_make_a_prompt_fit(files, demo_config, tmp_path):
    overrides = (f"data.train=[{files}]", f"data.eval=[{files}]", f"runs={tmp_path}")
    _, _, whole = open_rows(demo_config(*overrides), RunFolder(tmp_path / "c"))
    _, _, small = open_rows(demo_config(*overrides, "max_pixels=12544"), RunFolder(tmp_path / "d"))
    assert whole.longest - small.longest == 64 - 16


def test_a_supervised_run_counts_the_answers_too(files):
    """Each row with its reference answer must fit into a packed sequence."""
    overrides = [f"model={TINY_REASONER}", f"data.train=[{files}]", "think=false", "learner.micro_batch_tokens=200"]
    config = load_config(SftConfig, ROOT / "configs" / "tiny_reasoner_sft.yaml", overrides)
    with pytest.raises(ValueError, match=r"64 of them for the image, and learner.micro_batch_tokens allows 200"):
        Images(config)
