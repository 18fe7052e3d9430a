"""A training run's configuration: what ships is valid, and what is wrong is said in one sentence."""

import os
import pickle
import re
import subprocess
import sys

import pytest
import yaml

from actors.config import RolloutConfig
from cluster.commands.memory import tenants
from cluster.config import EvaluateConfig, SftConfig, TrainConfig, load_config, save_config
from cluster.config_keys import flat, may_change
from cluster.memory import GIB, overfull
from cluster.placement import Node, alone, bundles, joined, shortage
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
        ("transfer=nccl", "transfer=nccl needs whole GPUs of engines and learner, because no GPU holds two members"),
        ("transfer=ipc", "transfer=ipc needs a learner and engines that share GPUs; set placement to colocated"),
        ("learner.objective.aggregation=tokens", "learner.objective.aggregation: Input should be 'token'"),
        ("learner.objective.clip_high=0.1", "clip_high 0.1 is below clip 0.2; give at least that"),
        ("learner.objective.dual_clip=0.5", "learner.objective.dual_clip: Input should be greater than 1"),
        ("learner.objective.kl_estimater=k1", "did you mean 'kl_estimator'"),
        ("rollout.autoscale={min: 2, max: 4}", "rollout: a run does not begin with 1 actors and stay between 2 and 4"),
        ("segmenter.autoscale={min: 1}", "segmenter.autoscale.max: Field required"),
        ("segmenter.autoscale={min: 0, max: 2}", "segmenter.autoscale.min: Input should be greater than 0"),
        ("rollout.n=1", "advantage=group compares a group's answers; set rollout.n to 2 or more"),
        (
            "learner.micro_batch_tokens=500",
            "a prompt with one answer may have 640 (rollout.max_prompt_tokens and max_tokens); raise it",
        ),
        ("learner={lr: 1, zero_stage: 2, offload: parameters}", "offload=parameters needs zero_stage 3 or more"),
        ("learner.freeze=[vision_tower, merger, language_model]", "every part of the model is frozen"),
        ("staleness=2", "set learner.objective.correction to token or sequence, or staleness to 0"),
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
OF_A_POOL = {"actors", "autoscale"}
OF_AN_ENGINE = {f"rollout.{key}" for key in ("max_num_seqs", "max_num_batched_tokens", "cuda_graphs")}
OF_A_RANK = {*OF_AN_ACTOR, "zero_stage", "offload", "micro_batch_tokens", "gradient_checkpointing", "ranks", "nodes"}
OF_A_RUN = {"runs", "cache", "spread", "deadlines.resources", "deadlines.start", "deadlines.step"}
OF_TRACKING = {"trackers", *(f"tracking.{key}" for key in ("project", "offline", "mlflow_uri", "python"))}
OF_LEARNING = {"steps", "resume", "checkpoint_every", "keep", *OF_TRACKING, *(f"learner.{key}" for key in OF_A_RANK)}
OF_GRPO = {
    "placement",
    "transfer",
    "keep_best",
    "learner.reference",
    "learner.sha256",
    "restarts",
    "staleness",
    "tolerated_failures",
}
OF_A_SEGMENTER = {f"segmenter.embeddings.{key}" for key in ("memory_mib", "disk_gib")}
OF_INFERENCE = (
    OF_AN_ENGINE
    | OF_A_SEGMENTER
    | {f"{role}.{key}" for role in ("rollout", "segmenter") for key in {*OF_AN_ACTOR, *OF_A_POOL}}
)


@pytest.mark.parametrize(
    ("schema", "name", "expected"),
    [
        (
            TrainConfig,
            "demo",
            OF_A_RUN | OF_LEARNING | OF_INFERENCE | OF_GRPO,
        ),
        (EvaluateConfig, "evaluate_demo", OF_A_RUN | OF_INFERENCE),
        (SftConfig, "tiny_reasoner_sft", OF_A_RUN | OF_LEARNING | {"patience"}),
    ],
)
def test_the_keys_that_may_change_on_resume(schema, name, expected):
    config = load_config(schema, ROOT / "configs" / f"{name}.yaml")
    assert {key for key in flat(config.model_dump(mode="json")) if may_change(schema, key)} == expected


def test_the_environment_of_a_role_is_text(demo_config):
    """YAML reads numbers; and the user's variables stand over our own."""
    config = demo_config(
        "rollout.environment={NCCL_SOCKET_IFNAME: eth0, VLLM_LOGGING_LEVEL: DEBUG, NCCL_IB_DISABLE: 1}"
    )
    found = config.rollout.process_environment
    assert found["NCCL_SOCKET_IFNAME"] == "eth0" and found["NCCL_IB_DISABLE"] == "1"
    assert found["VLLM_LOGGING_LEVEL"] == "DEBUG" and found["VLLM_NO_USAGE_STATS"] == "1"
    assert config.learner.process_environment == {"DS_ACCELERATOR": "cpu"}
    assert config.segmenter.process_environment == {}
    assert may_change(TrainConfig, "rollout.environment.NCCL_IB_DISABLE")


@pytest.mark.parametrize("name", ["CUDA_VISIBLE_DEVICES", "RAY_ADDRESS"])
def test_variables_of_ray_are_refused(demo_config, name):
    with pytest.raises(ValueError, match=f"{name} is set by Ray; take it out of environment"):
        demo_config(f"learner.environment={{{name}: 0}}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{NCCL_DEBUG: true}", "NCCL_DEBUG is True; give text, in quotes"),
        ("{NCCL_DEBUG: }", "NCCL_DEBUG is None; give text"),
        ("{NCCL DEBUG: INFO}", "'NCCL DEBUG' is no name of a variable"),
        ("NCCL_DEBUG=INFO", "segmenter.environment: give keys and values"),
    ],
)
def test_variables_that_are_no_text_are_refused(demo_config, text, said):
    with pytest.raises(ValueError, match=said):
        demo_config(f"segmenter.environment={text}")


def test_a_gpu_and_a_half_is_refused(demo_config):
    with pytest.raises(ValueError, match=r"learner.num_gpus: 1\.5 GPUs cannot be given"):
        demo_config("learner.num_gpus=1.5")


@pytest.mark.parametrize(
    ("overrides", "completions"),
    [
        ({}, 43 * 16),  # the published set-up on three engines: 128 groups of 16
        ({"max_num_seqs": 100}, 100),
        ({"actors": 1}, 1024),  # of 2048
        ({"num_gpus": 1, "max_num_batched_tokens": 512}, 512),
    ],
)
def test_an_engine_samples_all_that_it_is_given_at_once(overrides, completions):
    config = RolloutConfig.model_validate({"actors": 3, "n": 16, **overrides})
    assert config.holding((128, config.n), (512, 1)).max_num_seqs == completions


def test_evaluations_count_too(demo_config):
    assert demo_config("evaluation={limit: 16, n: 8}").engines.max_num_seqs == 16 * 8
    assert demo_config("batch=4", "evaluation={limit: 40, n: 0}").engines.max_num_seqs == 40
    given = {"name": "x", "model": "models/tiny-reasoner", "data": {"eval": "rows.parquet"}, "expert": "tiny"}
    assert EvaluateConfig.model_validate({**given, "batch": 32, "n": 4}).engines.max_num_seqs == 128


@pytest.mark.parametrize(
    ("given", "largest"),
    [
        ({"max_num_seqs": 688}, 688),
        ({"max_num_seqs": 513}, 528),
        ({"max_num_seqs": 512}, None),  # vLLM's own ceiling
        ({"max_num_seqs": 688, "num_gpus": 0}, None),
        ({"max_num_seqs": 688, "cuda_graphs": False}, None),
        ({}, None),
    ],
)
def test_graphs_are_captured_for_all_completions(given, largest):
    assert RolloutConfig.model_validate({"num_gpus": 1, **given}).captured == largest


@pytest.mark.parametrize(
    ("rollout", "fault"),
    [
        ("{kv_cache: fp8}", "kv_cache=fp8 needs a GPU; set num_gpus, or kv_cache to auto"),
        (
            "{max_num_seqs: 5000}",
            "5000 completions at a time need a token each, and a pass has 4096; lower max_num_seqs",
        ),
        ("{max_num_batched_tokens: 100}", "takes a prompt in one pass; set max_num_batched_tokens to 2560"),
    ],
)
def test_what_an_engine_on_a_cpu_cannot_is_refused(demo_config, rollout, fault):
    with pytest.raises(ValueError, match=fault):
        demo_config(f"rollout={rollout}")


def test_tokens_of_a_pass():
    assert RolloutConfig().pass_tokens == 4096 and RolloutConfig(num_gpus=1).pass_tokens == 16384
    assert RolloutConfig(num_gpus=1, max_num_batched_tokens=2048).pass_tokens == 2048
    assert RolloutConfig(max_prompt_tokens=8000).pass_tokens == 8512


@pytest.mark.parametrize(
    ("name", "gpus"),
    [
        ("demo_gpu", 1),
        ("lingshu_7b_hard", 8),
        ("lingshu_7b_soft", 8),
        ("qwen2_5_vl_3b_mask", 4),
        ("colocated_1gpu_3b", 1),
        ("colocated_4gpu_7b", 4),
        ("colocated_8gpu_7b", 8),
    ],
)
def test_the_configs_of_gpus_say_what_a_gpu_needs(name, gpus):
    config = load_config(TrainConfig, ROOT / "configs" / f"{name}.yaml")
    assert config.learner.gradient_checkpointing is True and config.learner.objective.correction == "token"
    assert config.learner.dtype == "bfloat16" and config.learner.zero_stage >= 2
    listed = [
        *bundles("segmenter", config.segmenter.actors, config.segmenter),
        *bundles("rollout", config.rollout.actors, config.rollout),
        *bundles("learner", config.learner.ranks, config.learner),
    ]
    assert alone("segmenter", listed, colocated=config.colocated) == 0, "segmenters lie beside the engines"
    assert shortage(joined(listed, colocated=config.colocated), [Node(cpus=128, gpus=gpus)]) is None
    assert sum(bundle.gpus for bundle in listed) == pytest.approx(gpus), "none is left over"


def test_the_demo_on_a_gpu_learns_what_the_demo_learns():
    """Its roles share one GPU; devices, precision and what follows from them are all that differs."""
    gpu, cpu = (load_config(TrainConfig, ROOT / "configs" / f"{name}.yaml") for name in ("demo_gpu", "demo"))
    shares = [gpu.rollout.num_gpus, gpu.segmenter.num_gpus, gpu.learner.num_gpus]
    assert min(shares) > 0 and sum(shares) <= 1
    assert gpu.rollout.dtype == gpu.learner.dtype == "bfloat16"
    ours, theirs = (flat(config.model_dump(mode="json")) for config in (gpu, cpu))
    different = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
    assert different == {
        "name",
        *("rollout.num_gpus", "rollout.dtype", "rollout.gpu_memory", "rollout.threads"),
        "segmenter.num_gpus",
        *("learner.num_gpus", "learner.dtype", "learner.gradient_checkpointing", "learner.objective.correction"),
    }


def test_the_demo_on_a_gpu_fits_on_a_small_one():
    config = load_config(TrainConfig, ROOT / "configs" / "demo_gpu.yaml")
    assert overfull(tenants(config, int(7.6 * GIB))) is None, "7.6 GiB are what CUDA reports of a card of 8 GB"


@pytest.mark.parametrize(("extra", "config"), [("cpu", "demo.yaml"), ("gpu", "demo_gpu.yaml")])
def test_make_demo_takes_the_configuration_of_the_installed_set(extra, config):
    command = ["make", "--dry-run", "demo", f"EXTRA={extra}"]
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    recipe = subprocess.run(command, cwd=ROOT, env=outside, capture_output=True, text=True, check=True).stdout
    assert recipe.rstrip().endswith(f"train configs/{config}")


IN_TURN = (
    "placement=colocated",
    "learner.ranks=2",
    "learner.num_gpus=0.6",
    "rollout.actors=2",
    "rollout.num_gpus=0.3",
    "segmenter.num_gpus=0.1",
)


def test_engines_of_a_colocated_run_sleep_where_they_have_a_gpu(demo_config):
    assert demo_config(*IN_TURN).engines.sleeps
    assert pickle.loads(pickle.dumps(demo_config(*IN_TURN).engines)).sleeps, "it travels to the actor"
    assert not demo_config().engines.sleeps
    rehearsal = demo_config(*IN_TURN, *(f"{role}.num_gpus=0" for role in ("learner", "rollout", "segmenter")))
    assert rehearsal.colocated and not rehearsal.engines.sleeps


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("rollout.actors=3", "2 ranks (learner.ranks) and 3 engines (rollout.actors); set both to the same number"),
        ("rollout.autoscale={min: 1, max: 4}", "as many engines as ranks; take rollout.autoscale out"),
        ("rollout={actors: 2, tensor_parallel: 2, num_gpus: 2}", "set rollout.tensor_parallel from 2 to 1"),
        ("learner.num_gpus=2", "one rank on each GPU, and learner.num_gpus is 2; set it to a share"),
        ("learner.nodes=2", "take learner.nodes out"),
        ("learner.num_gpus=0.8", "0.8 and rollout.num_gpus 0.3, and 1 of segmenter.num_gpus 0.1, are 1.2 together"),
        ("segmenter={actors: 4, num_gpus: 0.1}", "and 2 of segmenter.num_gpus 0.1, are 1.1 together; lower them"),
        ("rollout.num_gpus=0", "give both a share of a GPU, or neither"),
        ("staleness=1", "staleness"),
    ],
)
def test_what_cannot_share_gpus_is_refused_by_name(demo_config, override, fault):
    with pytest.raises(ValueError, match=re.escape(fault)):
        demo_config(*IN_TURN, override)


def test_segmenters_with_gpus_of_their_own_share_with_nobody(demo_config):
    assert demo_config(*IN_TURN, "segmenter.num_gpus=1").colocated
    assert demo_config(*IN_TURN, "segmenter={actors: 4, num_gpus: 0.05}").colocated


@pytest.mark.parametrize(("older", "written"), [("pack", "false"), ("spread", "true")])
def test_an_older_placement_is_answered_with_what_to_write(demo_config, older, written):
    with pytest.raises(ValueError, match=f"in place of placement={older} write spread={written}"):
        demo_config(f"placement={older}")
    with pytest.raises(ValueError, match=f"write spread={written}"):
        load_config(EvaluateConfig, ROOT / "configs" / "evaluate_demo.yaml", [f"placement={older}"])


@pytest.mark.parametrize("role", ["rollout", "segmenter"])
def test_an_evaluation_does_not_change_the_number_of_its_actors(role):
    with pytest.raises(ValueError, match=f"take {role}.autoscale out and set {role}.actors"):
        load_config(EvaluateConfig, ROOT / "configs" / "evaluate_demo.yaml", [f"{role}.autoscale={{min: 1, max: 4}}"])
