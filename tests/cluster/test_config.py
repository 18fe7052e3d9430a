"""Configuration: YAML, overrides, and errors that name the nearest right key."""

from pathlib import Path
from typing import Literal

import pytest

from cluster.config import SftConfig, load_config, save_config
from umrg.config import Config

CONFIG = """
name: trial
model: models/tiny-reasoner
data: {train: [a.parquet]}
learner: {lr: 1.0e-4}
steps: 10
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return path


def test_overrides_lie_over_the_file(config):
    loaded = load_config(SftConfig, config, ["learner.lr=0.001", "data.train=[b.parquet, c.parquet]", "seed=3"])
    assert loaded.learner.lr == 0.001
    assert [path.name for path in loaded.data.train] == ["b.parquet", "c.parquet"]
    assert loaded.seed == 3 and loaded.steps == 10


@pytest.mark.parametrize(
    ("override", "value"), [("resume=auto", "auto"), ("resume=a/b", Path("a/b")), ("checkpoint_every=0", 0)]
)
def test_a_key_may_be_of_several_kinds(config, tmp_path, override, value):
    loaded = load_config(SftConfig, config, [override])
    assert getattr(loaded, override.partition("=")[0]) == value
    save_config(loaded, tmp_path / "again.yaml")
    assert load_config(SftConfig, tmp_path / "again.yaml") == loaded
    assert load_config(SftConfig, config).checkpoint_every == "auto"


def test_the_resolved_config_is_read_again_as_it_was(config, tmp_path):
    loaded = load_config(SftConfig, config, ["seed=5"])
    save_config(loaded, tmp_path / "resolved.yaml")
    assert load_config(SftConfig, tmp_path / "resolved.yaml") == loaded


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("learner.lrr=1", r"unknown key 'learner.lrr'; did you mean 'lr'\?"),
        ("stepz=1", r"did you mean 'steps'\?"),
        ("steps=0", "steps: Input should be greater than 0"),
        ("learner.lr=fast", "learner.lr: Input should be a valid number"),
        ("steps", "is not key=value"),
        ("name.of=x", "name holds a value"),
        ("data.train=[]", "data.train: give at least one$"),
        ("data.train={a: 1}", "data.train: give a list$"),
        ("learner=3", "learner: give keys and values$"),
        ("runs=3", "runs: give a path$"),
        ("name=..", "name: '..' is no name for a folder"),
        ("resume=True", r"[^;]*: resume: True is neither auto nor never nor a checkpoint's folder; give one of them$"),
        ("resume=", "resume: None is neither"),
        ("checkpoint_every=often", "[^;]*: checkpoint_every: 'often' is neither auto nor a number of steps; [^;]*$"),
        ("checkpoint_every=-1", "-1 is neither"),
        ("checkpoint_every=true", "True is neither"),
    ],
)
def test_mistakes_are_named(config, override, said):
    with pytest.raises(ValueError, match=said):
        load_config(SftConfig, config, [override])


def test_only_an_evaluation_reads_leniently(config, demo_config):
    with pytest.raises(ValueError, match="unknown key 'answers'"):
        load_config(SftConfig, config, ["answers=lenient"])
    with pytest.raises(ValueError, match="unknown key 'answers'"):
        demo_config("answers=lenient")
    with pytest.raises(ValueError, match=r"unknown key 'evaluation\.answers'"):
        demo_config("evaluation.answers=lenient")


def test_an_unknown_key_of_one_of_several_kinds_is_named_alike(demo_config):
    with pytest.raises(ValueError, match=r"^[^;]*unknown key 'data.train.seeed'; did you mean 'seed'\?$"):
        demo_config("data.train.seeed=3")
    with pytest.raises(ValueError, match=r"unknown key 'reward.preseet'; did you mean 'preset'\?"):
        demo_config("reward.preseet=mask")


class Either(Config):
    value: int | list[int] | Literal["none"]


def test_a_value_of_no_possible_kind_is_one_fault():
    with pytest.raises(
        ValueError, match=r"^value: Input should be a valid integer[^;]* or give a list or [^;]*'none'$"
    ):
        load_config(Either, None, ["value=many"])


def test_an_engine_over_several_gpus_asks_for_as_many(demo_config):
    assert demo_config("rollout.tensor_parallel=2", "rollout.num_gpus=2").rollout.tensor_parallel == 2
    with pytest.raises(ValueError, match="set num_gpus to 2, or tensor_parallel to 1"):
        demo_config("rollout.tensor_parallel=2", "rollout.num_gpus=1")


def test_a_file_that_is_no_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no config file"):
        load_config(SftConfig, tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("[1, 2]")
    with pytest.raises(ValueError, match="must hold keys and values"):
        load_config(SftConfig, tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1")
    with pytest.raises(ValueError, match="is not YAML"):
        load_config(SftConfig, tmp_path / "broken.yaml")
