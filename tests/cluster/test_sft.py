"""The supervised job, from a config file to a model folder."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.config import SftConfig, load_config
from cluster.sft import sft
from learner.reasoner import load_reasoner
from umrg.dataset_writer import write_rows
from umrg.phantoms import rows

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "phantoms.parquet"
    write_rows(path, rows(12, seed=5, modalities=["CT"], annotation="coarse"))
    return path


def config(tmp_path: Path, data: Path, *overrides: str) -> SftConfig:
    tiny = [f"model={ROOT / 'models' / 'tiny-reasoner'}", f"data.train=[{data}]", f"runs={tmp_path}", "name=trial"]
    file = ROOT / "configs" / "tiny_reasoner_sft.yaml"
    return load_config(
        SftConfig, file, [*tiny, "learner.warmup=0", "batch=4", "learner.lr=3e-4", "learner.freeze=[]", *overrides]
    )


def test_training_lowers_the_loss_and_leaves_a_run_folder(tmp_path, phantoms):
    run = sft(config(tmp_path, phantoms, "steps=8"))
    metrics = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in metrics] == list(range(8))
    # Few rows, seen again and again: they are learnt by heart.
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert json.loads((run.path / "summary.json").read_text())["steps"] == 8
    before, after = load_reasoner(ROOT / "models" / "tiny-reasoner"), load_reasoner(run.model)
    assert before.prompt == after.prompt
    changed = {
        name: not torch.equal(old, new)
        for (name, old), new in zip(before.model.named_parameters(), after.model.parameters(), strict=True)
    }
    assert all(changed.values()), [name for name, moved in changed.items() if not moved]


def test_the_same_seed_gives_the_same_weights(tmp_path, phantoms):
    runs = [sft(config(tmp_path, phantoms, "steps=2", f"name=run{i}")) for i in range(2)]
    first, second = (load_reasoner(run.model).model.state_dict() for run in runs)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_folder_that_exists_is_kept(tmp_path, phantoms):
    (tmp_path / "trial").mkdir()
    with pytest.raises(ValueError, match="exists"):
        sft(config(tmp_path, phantoms, "steps=1"))


def test_rows_without_reasoning_are_refused_by_name(tmp_path):
    bare: list[Any] = list(rows(2, seed=1))
    for row in bare:
        row["extra_info"].pop("reasoning")
    write_rows(tmp_path / "bare.parquet", bare)
    with pytest.raises(ValueError, match=r"has no extra_info\.reasoning"):
        sft(config(tmp_path, tmp_path / "bare.parquet", "steps=1"))
