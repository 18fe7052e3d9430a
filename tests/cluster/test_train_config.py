"""A training run's configuration: what ships is valid, and what is wrong is said in one sentence."""

import re
import subprocess
import sys

import pytest
import yaml

from cluster.config import EvaluateConfig, SftConfig, TrainConfig, load_config, save_config
from cluster.config_keys import flat, may_change
from tests.conftest import ROOT

CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.yaml") if not re.search("sft|evaluate", path.name))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_configurations_that_ship_are_valid(path):
    config = load_config(TrainConfig, path)
    assert config.name == path.stem
    assert config.reward.scorer(think=True).maximum > 0


def test_the_evaluation_that_ships_is_valid():
    config = load_config(EvaluateConfig, ROOT / "configs" / "evaluate_demo.yaml")
    assert config.name == "evaluate_demo" and config.n == 8


def test_the_published_hyper_parameters():
    config = load_config(TrainConfig, ROOT / "configs" / "lingshu_7b_soft.yaml")
    assert (config.rollout.n, config.batch, config.learner.mini_batch) == (16, 128, 64)
    assert (config.learner.lr, config.learner.objective.kl, config.learner.objective.clip) == (1e-6, 0.01, 0.2)
    assert (config.rollout.max_prompt_tokens, config.rollout.max_tokens) == (2048, 2048)


def test_the_configuration_imports_no_torch():
    code = "import sys, cluster.config; sys.exit(any(m in sys.modules for m in ('torch', 'ray', 'vllm')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learner.learning_rate=1e-4", "unknown key 'learner.learning_rate'"),
        ("rollout.num_gpu=1", "did you mean 'num_gpus'"),
        ("learner.zero_stage=4", "learner.zero_stage: "),
        ("learner.objective.aggregation=tokens", "learner.objective.aggregation: Input should be 'token'"),
        ("learner.objective.clip_high=0.1", "clip_high 0.1 is below clip 0.2; give at least that"),
        ("learner.objective.dual_clip=0.5", "learner.objective.dual_clip: Input should be greater than 1"),
        ("learner.objective.kl_estimater=k1", "did you mean 'kl_estimator'"),
        ("rollout.n=1", "advantage=group compares a group's answers; set rollout.n to 2 or more"),
        (
            "learner.micro_batch_tokens=500",
            "a prompt with one answer may have 640 (rollout.max_prompt_tokens and max_tokens); raise it",
        ),
        ("learner={lr: 1, zero_stage: 2, offload: parameters}", "offload=parameters needs zero_stage 3 or more"),
        ("learner.freeze=[vision_tower, merger, language_model]", "every part of the model is frozen"),
        ("staleness=2", "only 0 is supported"),
        ("reward.preset=sotf", "did you mean 'soft'"),
        ("reward.terms=[{name: mask_dice}]", "give either reward.preset or reward.terms"),
        ("reward={terms: [{name: bbox_iou, smoth: 0}]}", "did you mean 'smooth'"),
        ("reward={terms: [{name: 'no_pkg.terms:mine'}]}", "reward term 'no_pkg.terms:mine' cannot be imported"),
        ("data.train=[]", "data.train"),
        ("rollout.temperature=0", "rollout.temperature: "),
        ("data.eval.phantom=3", "data.eval"),
    ],
)
def test_mistakes(override, message):
    with pytest.raises(ValueError, match=r"demo\.yaml: ") as caught:
        load_config(TrainConfig, ROOT / "configs" / "demo.yaml", [override])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_reward_terms_take_options_and_schedules(tmp_path):
    term = "{name: bbox_iou_above, weight: 2, threshold: {start: 0.3, end: 0.7, steps: 200}}"
    config = load_config(TrainConfig, ROOT / "configs" / "demo.yaml", [f"reward={{terms: [{term}]}}"])
    assert config.reward.scorer(think=True).maximum == 2
    save_config(config, tmp_path / "config.yaml")
    assert load_config(TrainConfig, tmp_path / "config.yaml") == config


def test_a_file_takes_the_place_of_phantoms(tmp_path):
    config = load_config(
        TrainConfig, ROOT / "configs" / "demo.yaml", ["data.train=rows.parquet", "data.eval=[a.parquet]"]
    )
    assert [str(path) for path in config.data.train] == ["rows.parquet"]
    save_config(config, tmp_path / "config.yaml")
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["data"]["eval"] == ["a.parquet"]
    assert load_config(TrainConfig, tmp_path / "config.yaml") == config


def test_a_key_of_an_earlier_version_is_answered_with_its_name(demo_config):
    with pytest.raises(ValueError, match="unknown key 'refill'; its name is 'dynamic_sampling_retries'"):
        demo_config("refill=2")


OF_AN_ACTOR = {"num_cpus", "num_gpus", "threads"}
OF_A_RANK = {*OF_AN_ACTOR, "zero_stage", "offload", "micro_batch_tokens", "gradient_checkpointing", "ranks"}
OF_A_RUN = {"runs", "placement", "deadlines.resources", "deadlines.start", "deadlines.step"}
OF_LEARNING = {"steps", "resume", "checkpoint_every", "keep"} | {f"learner.{key}" for key in OF_A_RANK}
OF_INFERENCE = {f"{role}.{key}" for role in ("rollout", "segmenter") for key in {*OF_AN_ACTOR, "actors"}}


@pytest.mark.parametrize(
    ("schema", "name", "expected"),
    [
        (TrainConfig, "demo", OF_A_RUN | OF_LEARNING | OF_INFERENCE | {"keep_best"}),
        (EvaluateConfig, "evaluate_demo", OF_A_RUN | OF_INFERENCE),
        (SftConfig, "tiny_reasoner_sft", OF_A_RUN | OF_LEARNING | {"patience"}),
    ],
)
def test_the_keys_that_may_change_on_resume(schema, name, expected):
    config = load_config(schema, ROOT / "configs" / f"{name}.yaml")
    assert {key for key in flat(config.model_dump(mode="json")) if may_change(schema, key)} == expected
