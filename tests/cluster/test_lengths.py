"""Rows are measured before the first step."""

import io
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from cluster.checkpoints import Checkpoint, RunState
from cluster.config import SftConfig, load_config
from cluster.data import open_rows, prompt_limit
from cluster.lengths import RowLimit, fitting
from cluster.loop import refuse_other_rows
from cluster.run_folder import RunFolder
from cluster.sft import Images
from learner.sft import reference_branches
from phantoms import rows
from reasoner.prompter import load_prompter
from tests.conftest import ROOT, TINY_REASONER
from umrg.dataset import Dataset
from umrg.dataset_writer import write_rows
from umrg.images import encode_png
from umrg.shuffling import Cursor

KEY = "rollout.max_prompt_tokens"


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
    kept, found = fitting(Dataset.open(files), RowLimit(prompter, 500, KEY), "refuse")
    ids = [len(prompter.encode(s.query, prompter.encode_image(s.image())).token_ids) for s in kept]
    assert len(kept) == 6 and (found.shortest, found.longest) == (min(ids), max(ids))
    assert found.median == round(np.median(ids)) and found.left_out == 0
    assert str(found) == f"6 rows of {min(ids)} to {max(ids)} tokens, median {found.median}"


def test_a_row_as_long_as_the_limit_is_taken(files, prompter):
    first = Dataset.open(files)[0]
    tokens, _ = RowLimit(prompter, 500, KEY).measure(first)
    assert RowLimit(prompter, tokens, KEY).measure(first) == (tokens, None)
    assert RowLimit(prompter, tokens - 1, KEY).measure(first)[1]


def test_a_long_row_is_named_with_what_to_change(files, prompter):
    with pytest.raises(ValueError) as error:
        fitting(Dataset.open(files), RowLimit(prompter, 150, KEY), "refuse")
    third = Dataset.open(files)[2]
    tokens = prompter.prompt_tokens(third.query, third.size)
    assert str(error.value) == (
        f"{third.name} has {tokens} tokens, 64 of them for the image, and rollout.max_prompt_tokens allows 150; raise "
        "it, lower max_pixels or shorten the question, or leave out the 2 such rows of 6 with data.overlong=leave_out"
    )


def test_long_rows_are_left_out_and_counted(files, prompter):
    everything = Dataset.open(files)
    kept, found = fitting(everything, RowLimit(prompter, 150, KEY), "leave_out")
    assert [sample.id for sample in kept] == [everything[i].id for i in (0, 1, 3, 5)]
    assert found.left_out == 2 and str(found).endswith("; 2 longer ones left out")


def test_nothing_left_is_refused(files, prompter):
    with pytest.raises(ValueError, match=r"allows 10; .*; none of the 6 rows can be used as it is"):
        fitting(Dataset.open(files), RowLimit(prompter, 10, KEY), "leave_out")


def test_the_models_positions_are_a_limit_too(files, prompter):
    limit = RowLimit(replace(prompter, positions=80), 500, KEY)
    with pytest.raises(ValueError, match="and the model has 80 positions; lower max_pixels or shorten the question"):
        fitting(Dataset.open(files), limit, "refuse")


def test_a_limit_that_raising_would_not_lift_is_the_models(files, prompter):
    """Where the configuration allows as many tokens as the model has positions."""
    limit = RowLimit(replace(prompter, positions=80), 80, KEY)
    with pytest.raises(ValueError, match="and the model has 80 positions; lower max_pixels"):
        fitting(Dataset.open(files), limit, "refuse")


def test_an_image_like_a_thread_is_a_row_too_long(tmp_path, prompter):
    """No engine takes it, so it is named, or left out, as well."""
    drawn: list[Any] = list(rows(2, seed=3, modalities=["CT"], queries_per_image=1))
    thread, plain = drawn
    thread["images"] = [{"bytes": encode_png(np.zeros((1, 300, 3), dtype=np.uint8)), "path": "a.png"}]
    truth = {"bbox_2d": [0, 0, 9, 0], "point_2d": [[1, 0], [2, 0]]}
    thread["reward_model"]["ground_truth"] = json.dumps(truth)
    write_rows(tmp_path / "rows.parquet", [thread, plain])
    data, limit = Dataset.open(tmp_path / "rows.parquet"), RowLimit(prompter, 500, KEY)
    with pytest.raises(ValueError, match=r"cannot be resized: an image of 300x1 px has an aspect ratio over 200; crop"):
        fitting(data, limit, "refuse")
    kept, found = fitting(data, limit, "leave_out")
    assert len(kept) == found.left_out == 1


def test_a_row_that_cannot_be_read_is_named_before_the_first_step(tmp_path, prompter):
    drawn: list[Any] = list(rows(2, seed=3, modalities=["CT"], queries_per_image=1))
    broken, plain = drawn
    broken["images"] = [{"bytes": b"no image", "path": "a.png"}]
    write_rows(tmp_path / "rows.parquet", [plain, broken])
    with pytest.raises(ValueError, match=rf"{broken['extra_info']['id']}.* cannot be decoded"):
        fitting(Dataset.open(tmp_path / "rows.parquet"), RowLimit(prompter, 500, KEY), "leave_out")


def test_a_run_is_refused_before_anything_starts(files, demo_config, tmp_path):
    overrides = (f"data.train=[{files}]", f"data.eval=[{files}]", "rollout.max_prompt_tokens=150", f"runs={tmp_path}")
    config = demo_config(*overrides)
    with pytest.raises(ValueError, match=r"rollout.max_prompt_tokens allows 150"):
        open_rows(config, RunFolder(tmp_path / "a"))
    config = demo_config(*overrides, "data.overlong=leave_out")
    train, held_out, lengths = open_rows(config, RunFolder(tmp_path / "b"))
    assert len(train) == len(held_out) == 4
    assert {name: each.left_out for name, each in lengths.items()} == {"train": 2, "held_out": 2}


def test_a_long_held_out_row_is_found_as_well(files, demo_config, tmp_path):
    overrides = ("data.train={phantoms: 4, modalities: [CT]}", f"data.eval=[{files}]", f"runs={tmp_path}")
    with pytest.raises(ValueError, match=rf"{files} has \d+ tokens"):
        open_rows(demo_config(*overrides, "rollout.max_prompt_tokens=150"), RunFolder(tmp_path / "a"))


def test_measuring_is_shown_where_the_run_is(files, demo_config, tmp_path, monkeypatch):
    monkeypatch.setattr("cluster.display.LINE_EVERY_S", -1.0)
    shown = io.StringIO()
    console = Console(file=shown, width=160)
    open_rows(demo_config(f"data.train=[{files}]", f"data.eval=[{files}]"), RunFolder(tmp_path), console)
    assert "measuring prompts: 6 of 6 rows" in shown.getvalue()


def test_fewer_pixels_make_a_prompt_fit(files, demo_config, tmp_path):
    overrides = (f"data.train=[{files}]", f"data.eval=[{files}]", f"runs={tmp_path}")
    _, _, whole = open_rows(demo_config(*overrides), RunFolder(tmp_path / "c"))
    _, _, small = open_rows(demo_config(*overrides, "max_pixels=12544"), RunFolder(tmp_path / "d"))
    assert whole["train"].longest - small["train"].longest == 64 - 16


def test_queries_that_occur_again_are_counted_once(files, demo_config):
    """The cached length is that of the text alone: the image's is its own."""
    config = demo_config()
    limit = prompt_limit(config.model, config.spec(), config.rollout)
    sample = Dataset.open(files)[0]
    small = replace(sample, image_bytes=encode_png(np.zeros((112, 112, 3), dtype=np.uint8)))
    assert limit.measure(sample)[0] - limit.measure(small)[0] == 64 - 16


SFT = ("think=false", "learner.micro_batch_tokens=200")


def supervised(files, *overrides):
    given = [f"model={TINY_REASONER}", f"data.train=[{files}]", *overrides]
    return load_config(SftConfig, ROOT / "configs" / "tiny_reasoner_sft.yaml", given)


def test_a_supervised_run_counts_the_answers_too(files):
    """Each row with its reference answer must fit into a packed sequence."""
    with pytest.raises(
        ValueError, match=r"answer, 64 of them for the image, and learner.micro_batch_tokens allows 200"
    ):
        Images(supervised(files, *SFT))
    images = Images(supervised(files, *SFT, "data.overlong=leave_out"))
    assert images.lengths.rows == len(images.learnt) == 4 and images.lengths.left_out == 2


def test_a_supervised_rows_length_is_that_of_what_is_learnt(files):
    reasoner: Any = load_prompter(TINY_REASONER, supervised(files, *SFT).spec())
    sample = Dataset.open(files)[0]
    tokens, _ = RowLimit(reasoner, 500, "learner.micro_batch_tokens", answers=True).measure(sample)
    assert tokens == len(reference_branches(reasoner, [sample]))


def test_a_run_resumes_with_the_rows_that_it_began_with(files, tmp_path):
    """The budget of tokens may change, but rows that only the larger one takes cannot vanish in the middle."""
    before, config = (
        supervised(
            files,
            "think=false",
            "data.overlong=leave_out",
            f"learner.micro_batch_tokens={most}",
            "resume=auto",
            f"runs={tmp_path}",
        )
        for most in (4096, 200)
    )
    run = RunFolder(tmp_path / "run")
    state = RunState(step=1, cursor=Cursor(seed=0, position=1), metrics=7, rows=Images(before).lengths.rows)

    def resumed(config, checkpoint):
        refuse_other_rows(checkpoint, run, Images(config).lengths.rows)

    ours = Checkpoint(folder=run.checkpoints.resolve() / "step-000001", state=state, sha256="")
    with pytest.raises(
        ValueError, match=r"has 4 rows and had 6 when step-000001 was written.* limits on tokens of then"
    ):
        resumed(config, ours)
    resumed(before, ours)
    resumed(config, replace(ours, state=state.model_copy(update={"rows": None})))
    # Another run's checkpoint may be gone on from with other rows.
    resumed(config, replace(ours, folder=tmp_path / "another" / "step-000001"))
    resumed(config, None)
