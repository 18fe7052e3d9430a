"""The supervised job, from a config file to a model folder, on real ranks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.calls import Calls
from actors.learner_rank import SupervisedRank
from actors.pools import SupervisedPool
from cluster.config import SftConfig, load_config
from cluster.loop import checkpoint_to_resume
from cluster.run_folder import RunFolder
from cluster.sft import Finetuning, Images, actors, out_of_patience, sft
from cluster.trackers import Trackers
from phantoms import rows
from reasoner.model import load_reasoner
from tests.ranks import STEADY, assert_moved_alike, hosted
from umrg.dataset_writer import write_rows

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
        SftConfig,
        file,
        [*tiny, "learner.warmup=0", "batch=4", "learner.lr=3e-4", "learner.freeze=[]", "learner.threads=1", *overrides],
    )


def finetuned(hosts, config):
    """As `sft`, on ranks in processes that run already."""
    with RunFolder.begun(config.runs / config.name, config, resume=config.resume != "never") as run:
        task = actors(config, run.path)[0].arguments["task"]
        ranks = hosted(hosts, config.learner.ranks, SupervisedRank, config.learner, task)
        learner = SupervisedPool(ranks, config.deadlines)
        Calls().gather(learner.starting(), seconds=300, doing="starting")
        with Trackers(run, config, pytest.fail) as trackers:
            Finetuning(config, run, learner, Images(config), trackers).go(checkpoint_to_resume(config, run))
    return run


def test_training_lowers_the_loss_and_leaves_a_run_folder(ray_cluster, tmp_path, phantoms):
    run = sft(config(tmp_path, phantoms, "steps=8"))
    metrics = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in metrics] == list(range(1, 9))
    # Few rows, seen again and again: they are learnt by heart.
    assert metrics[-1]["learner/loss"] < metrics[0]["learner/loss"]
    summary = json.loads((run.path / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("ended", 8)
    assert summary["prompts"]["rows"] == 12 and summary["prompts"]["left_out"] == 0
    assert (run.report / "index.html").read_text().count("<svg") == 3
    before, after = load_reasoner(ROOT / "models" / "tiny-reasoner"), load_reasoner(run.model)
    assert before.prompt == after.prompt
    changed = {
        name: not torch.equal(old, new)
        for (name, old), new in zip(before.model.named_parameters(), after.model.parameters(), strict=True)
    }
    assert all(changed.values()), [name for name, moved in changed.items() if not moved]


def test_ranks_and_stages_learn_alike(hosts, tmp_path, phantoms):
    """Of five images, one rank has three and the other two; a small budget splits them into several rows."""
    steady = ("steps=2", "batch=5", f"learner.lr={STEADY['lr']}", "learner.eps=1", "learner.vector_lr=null")
    alone = finetuned(hosts, config(tmp_path, phantoms, *steady, "name=alone"))
    ranks = ("learner.ranks=2", "learner.num_cpus=0.5", "learner.zero_stage=2", "learner.micro_batch_tokens=400")
    together = finetuned(hosts, config(tmp_path, phantoms, *steady, "name=together", *ranks))
    first, second = (load_reasoner(run.model).model.state_dict() for run in (alone, together))
    assert_moved_alike(second, first)
    losses = [[step["learner/loss"] for step in run.metrics()] for run in (alone, together)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_resumed_run_ends_as_one_that_was_not_interrupted(hosts, tmp_path, phantoms):
    settings = ("steps=4", "validation=0.25", "validate_every=2", "learner.schedule=constant", "keep=9")
    whole = finetuned(hosts, config(tmp_path, phantoms, *settings, "name=whole"))
    finetuned(hosts, config(tmp_path, phantoms, *settings, "name=halves", "steps=2"))
    halves = finetuned(hosts, config(tmp_path, phantoms, *settings, "name=halves", "resume=auto"))
    assert whole.metrics() == halves.metrics() and len(whole.metrics()) == 4
    files = [run.model / "model.safetensors" for run in (whole, halves)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_run_stops_where_what_is_held_out_gets_no_likelier_and_leaves_the_best(hosts, tmp_path, phantoms):
    """So large a learning rate makes things worse."""
    settings = ("steps=50", "validation=0.25", "validate_every=1", "patience=2", "learner.lr=0.05")
    run = finetuned(hosts, config(tmp_path, phantoms, *settings))
    validations = [step["validation/loss"] for step in run.metrics()]
    best = validations.index(min(validations))
    assert len(validations) == best + 3 < 50
    assert json.loads((run.path / "summary.json").read_text())["model_of_step"] == best + 1


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("patience=2",), "give validation"),
        (("validation=0.01",), "leaves none on one side"),
        (("learner.offload=optimizer", "learner.zero_stage=0"), "needs zero_stage 1 or more"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, phantoms, overrides, said):
    with pytest.raises(ValueError, match=said):
        sft(config(tmp_path, phantoms, "steps=1", *overrides))
    assert not (tmp_path / "trial").exists()


@pytest.mark.parametrize(
    ("losses", "over"),
    [([], False), ([3.0], False), ([3.0, 2.0, 2.1], False), ([3.0, 2.0, 2.1, 2.0], True), ([1.0, 2.0, 0.5], False)],
)
def test_patience(losses, over):
    assert out_of_patience(losses, 2) is over and out_of_patience(losses, None) is False


def test_a_run_folder_that_exists_is_kept(tmp_path, phantoms):
    (tmp_path / "trial").mkdir()
    with pytest.raises(ValueError, match="exists"):
        sft(config(tmp_path, phantoms, "steps=1"))


@pytest.mark.parametrize(
    ("reasoning", "said"),
    [
        (None, "no extra_info.reasoning to learn from; set think=false or add it"),
        (" ", "a blank extra_info.reasoning to learn from"),
        ("<think>The oval.</think>", "<think>, </think> in its extra_info.reasoning; leave the words alone there"),
        ("The oval.<|im_end|>", "<|im_end|> in its extra_info.reasoning"),
    ],
)
def test_reasoning_that_cannot_be_taught_is_refused_by_row_before_anything_starts(tmp_path, reasoning, said):
    some: list[Any] = list(rows(3, seed=1))
    some[1]["extra_info"]["reasoning"] = reasoning
    write_rows(tmp_path / "rows.parquet", some)
    with pytest.raises(ValueError) as refusal:
        sft(config(tmp_path, tmp_path / "rows.parquet", "steps=1", "think=true"))
    assert f"row 1 ('{some[1]['extra_info']['id']}') of {tmp_path}/rows.parquet has {said}" in str(refusal.value)
    assert not (tmp_path / "trial").exists()


def test_reasoning_that_is_not_taught_may_be_anything(tmp_path):
    some: list[Any] = list(rows(2, seed=1))
    some[1]["extra_info"]["reasoning"] = "<think>"
    write_rows(tmp_path / "rows.parquet", some)
    images = Images(config(tmp_path, tmp_path / "rows.parquet", "steps=1", "think=false"))
    assert sum(map(len, images.learnt)) == 2
