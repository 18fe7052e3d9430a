"""Engine and learner in bfloat16, as large models are trained, on the tiny ones."""

from dataclasses import asdict

import numpy as np
import pytest

from cluster.data import open_rows
from cluster.evaluation import collect
from cluster.run_folder import RunFolder
from cluster.train import actors
from cluster.weight_sync import Canary, sync_weights
from cluster.workers import started
from umrg.group import Group

CONFIG = (
    "data.train={phantoms: 24, seed: 1, modalities: [CT]}",
    "data.eval={phantoms: 4, seed: 2, modalities: [CT]}",
    "rollout.dtype=bfloat16",
    "learner.dtype=bfloat16",
    "learner.warmup=0",
)


def gap(workers, groups):
    """Mean absolute difference between the engine's and the learner's log-probs of its completions, in nats."""
    differences = []
    for group in groups:
        for completion in group.scored.samples.completions[:2]:
            expected = workers.learner.logprobs(group.refs[0], completion.token_ids)
            differences.append(np.abs(np.subtract(completion.logprobs, expected)).mean())
    return float(np.mean(differences))


def groups_of(workers, config, rows, step):
    groups = [Group(run="bfloat16", step=step, index=i, sample=rows[i]) for i in range(8)]
    return collect(workers, groups, config.rollout.sampling(seed=step), "reward")


@pytest.mark.slow
def test_engine_and_learner_agree_before_and_after_an_update(ray_cluster, demo_config, tmp_path):
    """As far as bfloat16 goes, and well within what the canary allows."""
    config = demo_config(*CONFIG)
    rows, *_ = open_rows(config, RunFolder.create(tmp_path / "run", config))
    with started(actors(config), config) as workers:
        assert workers.engines[0].dtype == "bfloat16"
        canary = Canary(rows[0], config)
        canary.check(workers)
        groups = groups_of(workers, config, rows, step=0)
        print("GAP before", gap(workers, groups))
        work = [config.learner.work(group.scored) for group in groups]
        report = workers.learner.update([group.refs for group in groups], work)
        print("REPORT", asdict(report))
        print("GAP stale", gap(workers, groups_of(workers, config, rows, step=1)))
        sync_weights(workers, version=1)
        print("GAP synced", gap(workers, groups_of(workers, config, rows, step=1)), canary.check(workers))
