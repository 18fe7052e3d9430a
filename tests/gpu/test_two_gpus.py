"""Two ranks, or a rank and an engine, each on a GPU of its own, over NCCL."""

import json
import math
import os
import time

import pytest
import ray
import torch

from actors.calls import Calls
from actors.config import DeadlineConfig, RolloutConfig
from actors.engine_report import Receiver
from actors.learner_rank import LearnerRank
from actors.pools import LearnerPool
from actors.rollout import Rollout
from bench.published_shapes import scored_groups
from learner.collectives import join
from learner.config import LearnerConfig, LearnerTask
from learner.grpo import GrpoRank
from learner.zero import ZeroRank
from tests.conftest import ROOT
from tests.direct_sender import as_plugin
from tests.gpu.conftest import SCALE, free_port, in_processes
from tests.runs import cluster_folder
from umrg.prompts import PromptSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two GPUs: there is one, and NCCL takes a rank for each"),
]


def learn(rank, folder, port, stage, out):
    """One of two ranks: a step, and its report, written to a file."""
    if SCALE.device == "cuda":
        assert torch.cuda.device_count() == 1, "it was started with the other rank's GPU too"
    join(rank, 2, host="127.0.0.1", port=port, device=SCALE.device, seconds=300)
    config = LearnerConfig.model_validate(
        {
            "lr": 1e-6,
            "ranks": 2,
            "dtype": SCALE.dtype,
            "num_gpus": SCALE.gpus,
            "zero_stage": stage,
            "gradient_checkpointing": True,
            "micro_batch_tokens": 16384,
            "objective": {"kl": 0.01},
        }
    )
    task = LearnerTask(model=folder, spec=PromptSpec.of_model(folder), updates=10, max_tokens=SCALE.work.length)
    zero = ZeroRank(config, task, device=SCALE.device)
    groups = scored_groups(zero.reasoner, SCALE.work)
    report = GrpoRank(zero, config).update([config.work(group) for group in groups], groups.__getitem__)
    (out / str(rank)).write_text(json.dumps([report.loss, report.grad_norm, report.tokens]))


@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_make_one_update(folder, scale, stage, tmp_path):
    """Both report the same loss over all groups' tokens, and the same gradient norm."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")[:2]
    own_gpus = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in visible] if SCALE.device == "cuda" else [{}, {}]
    in_processes(learn, (folder, free_port(), stage, tmp_path), own_gpus)
    first, second = (json.loads((tmp_path / str(rank)).read_text()) for rank in range(2))
    assert first == second and math.isfinite(first[0]) and first[1] > 0
    assert first[2] == scale.work.groups * scale.work.n * scale.work.length


@pytest.fixture
def cluster():
    """Ray, with the GPUs that there are."""
    with cluster_folder() as place:
        ray.init(num_cpus=4, include_dashboard=False, logging_level="ERROR", _temp_dir=str(place))
        yield
        ray.shutdown()


@pytest.mark.cluster
@pytest.mark.parametrize("stage", [2, 3])
def test_weights_go_from_the_learner_s_gpu_to_the_engine_s(cluster, folder, scale, stage, tmp_path):
    """By vLLM's `nccl`, twice in one group and then in another, with the actors of a run; on a CPU by the stand-in."""
    on_gpu = scale.device == "cuda"
    spec = PromptSpec.of_model(folder)
    engine = RolloutConfig.model_validate(
        {"num_gpus": scale.gpus, "dtype": scale.dtype, "max_prompt_tokens": 2048, "max_tokens": 64, "threads": 1}
    )
    learner = LearnerConfig.model_validate(
        {"lr": 1e-6, "dtype": scale.dtype, "num_gpus": scale.gpus, "zero_stage": stage, "threads": 1}
    )
    task = LearnerTask(model=folder, spec=spec, updates=1, max_tokens=64)
    code = str(ROOT) if on_gpu else as_plugin(tmp_path)

    def actor(kind, config, *arguments, **options):
        environment = {"env_vars": {**config.process_environment, "PYTHONPATH": code}}
        placed = ray.remote(kind).options(num_cpus=0, num_gpus=scale.gpus, runtime_env=environment)
        return placed.remote(*arguments, **options)

    rollout = actor(Rollout, engine, folder, engine, spec)
    rank = actor(LearnerRank if on_gpu else stand_in_rank(), learner, learner, task, rank=0)
    pool = LearnerPool({"learner 0": rank}, DeadlineConfig(step=300))
    Calls().gather({"rollout 0": rollout.start.remote(), **pool.starting()}, seconds=300, doing="starting")
    way, receivers = "nccl" if on_gpu else "stand-in", [Receiver(name="rollout 0", handle=rollout, workers=1)]
    expected = pool.weights(0, everything=True).checksum
    for version, groups in [(1, True), (2, False), (3, True)]:
        began = time.monotonic()
        if groups:
            pool.connect(way, receivers)
        sent = pool.send(version, everything=True)
        print(f"version {version} in {time.monotonic() - began:.2f} s")
        receipt = sent.receipts["rollout 0"]
        assert sent.checksum == receipt.checksum == expected and receipt.unlike == () and receipt.compared > 0
    ray.get(rollout.stop.remote(), timeout=60)


def stand_in_rank():
    """The class, whose module imports vLLM."""
    from tests.stand_in_transfer import StandInRank

    return StandInRank
