"""Runs whose steps overlap, and whose actors or driver are killed: each row is learnt from once, sampled by weights at
most one version behind, with the rewards that its answers have."""

import json
import random
import threading
import zlib
from collections import Counter
from itertools import islice

import pytest

import cluster.train
import cluster.workers
from actors.segmenter import Segmenter
from cluster.checkpoints import CheckpointFolder
from cluster.evaluation import Collected
from cluster.records import read_records
from cluster.steps_ahead import StepsAhead
from cluster.train import train
from rewards.case import Case
from tests.cluster.test_chaos import SMALL, Disturbed, disturb, kill_learner
from tests.cluster.test_nodes import LIGHT
from tests.light_rollout import LightRollout
from tests.runs import Run
from umrg.dataset import Dataset
from umrg.group import Group
from umrg.shuffling import Cursor, batches, epoch_order

OVERLAPPING = ("staleness=1", "learner.objective.correction=token")
pytestmark = pytest.mark.slow


class Keeping(StepsAhead):
    """Keeps what each step learnt from."""

    kept: dict[int, list[Collected]]

    def collect(self, number, **options):
        found = super().collect(number, **options)
        self.kept[number] = found[0]
        return found


@pytest.fixture
def kept(monkeypatch):
    """The groups of each step of the run that follows, by its number."""
    found: dict[int, list[Collected]] = {}
    monkeypatch.setattr(Keeping, "kept", found, raising=False)
    monkeypatch.setattr(cluster.train, "StepsAhead", Keeping)
    return found


def assert_in_order(run, config, kept):
    """Rows, versions and rewards of each step; what was recorded is what was learnt."""
    data, spec = Dataset.open(run.drawn_train), config.spec()
    scorer = config.reward.scorer(think=spec.think)
    again = Segmenter(config.expert, config.segmenter, scorer, frame=spec.frame, think=spec.think)
    again.start()
    lags = []
    drawn = islice(batches(data, config.batch, Cursor(seed=config.seed)), config.steps)
    for step, (rows, _) in enumerate(drawn):
        groups = [each.scored for each in kept[step]]
        assert [group.group.id for group in groups] == [f"{config.name}/{step}/{i}" for i in range(config.batch)]
        assert [group.group.sample.id for group in groups] == [data.infos[row].id for row in rows]
        for group, sample in zip(groups, data.samples(rows), strict=True):
            whole = Group(run=config.name, step=step, index=group.group.index, sample=sample)
            scored = again.score(whole.without_masks(), sample.mask_bytes, group.samples, "reward")
            assert scored == group
        records = read_records(run.samples / f"step-{step + 1:06d}.parquet")
        ids = Counter(record["answer_id"] for record in records)
        assert len(ids) == config.batch * config.rollout.n and set(ids.values()) == {1}
        assert [each["reward"] for each in records] == [reward for group in groups for reward in group.rewards]
        lags.append({step - record["policy_version"] for record in records})
    assert len(lags) == config.steps and lags[0] == {0} and set.union(*lags) == {0, 1}


def test_a_short_run_whose_steps_overlap_learns_from_each_row_once_whoever_dies(
    ray_cluster, demo_config, tmp_path, monkeypatch, kept
):
    """A segmenter, a rollout, and the learner while the next step is sampled."""
    monkeypatch.setattr(cluster.workers, "Rollout", LightRollout)
    disturb(monkeypatch, ["segmenter", "rollout"], random.Random(3))
    left = kill_learner(monkeypatch, update=3)
    config = demo_config(*SMALL, *OVERLAPPING, "steps=4", "checkpoint_every=1", f"runs={tmp_path}", "name=ahead")
    run = train(config)
    assert Disturbed.killed == ["segmenter", "rollout"] and left() < 0
    assert_in_order(run, config, kept)


@pytest.mark.chaos
def test_every_row_is_learnt_from_once_whoever_dies(ray_cluster, demo_config, tmp_path, monkeypatch, kept):
    """Through the end of an epoch; four segmenters are killed, and a rollout, an engine's core and its worker."""
    kills = ["segmenter"] * 4 + ["rollout", "core", "worker"]
    chance = random.Random(11)
    chance.shuffle(kills)
    disturb(monkeypatch, kills, chance)
    config = demo_config(*SMALL, *OVERLAPPING, "steps=12", f"runs={tmp_path}", "name=ahead")
    run = train(config)
    assert Disturbed.killed == kills and len(Dataset.open(run.drawn_train)) < 12 * 6
    assert_in_order(run, config, kept)


def flat(box):
    """Whether all answers to a row get the same reward."""
    return int(box[0]) % 2 == 0


def half_flat(case: Case) -> float:
    """A reward term: the same for every answer to every other row, and different for any two answers to the others."""
    return 0.0 if flat(case.reference.box) else zlib.crc32(case.answer.text.encode()) / 2**32


LIGHT_TRAIN = f"{LIGHT}\nrun_command(lambda: train.main(sys.argv[1:]))\n"


@pytest.mark.chaos
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_run_that_is_killed_loses_no_row_and_learns_from_none_twice(tmp_path, seed):
    """Wherever it is killed, with a step on its way whose flat rows give way to others."""
    settings = (
        *OVERLAPPING,
        *("checkpoint_every=1", "dynamic_sampling_retries=4", "batch=3", "rollout.n=3"),
        "data.train={phantoms: 96, seed: 1, modalities: [CT]}",
        "reward={terms: [{name: tests.cluster.test_chaos_ahead:half_flat}]}",
        "evaluation={before: false, limit: 4, n: 0}",
    )
    killed = Run(tmp_path, *settings, "steps=200", program=("-c", LIGHT_TRAIN))
    killed.await_line("step 3/")
    moment = threading.Timer(random.Random(seed).uniform(0, 2), killed.process.kill)
    moment.start()
    killed.process.wait(timeout=60)
    killed.assert_nothing_left()
    checkpoints = CheckpointFolder(killed.folder / "checkpoints")
    newest = checkpoints.latest()
    assert newest is not None and len(newest.state.ahead) == 1, "a step was on its way"
    steps = newest.state.step + 3
    run = Run(tmp_path, *settings, f"steps={steps}", "resume=auto", program=("-c", LIGHT_TRAIN), output="again")
    assert run.process.wait(timeout=300) == 0, run.output.read_text()
    last = checkpoints.at(steps).state
    data = Dataset.open(run.folder / "data" / "train.parquet")
    assert last.cursor.epoch == 0 and last.ahead == []
    drawn = data.samples(epoch_order(len(data), 0, 0)[: last.cursor.position].tolist())
    found = [read_records(path) for path in sorted((run.folder / "samples").glob("step-??????.parquet"))]
    learnt = Counter(record["sample_id"] for records in found for record in records)
    assert len(found) == steps and all(len(records) == 9 for records in found)
    assert set(learnt.values()) == {3} and learnt.keys() <= {sample.id for sample in drawn}
    unused = [sample for sample in drawn if sample.id not in learnt]
    assert unused and all(flat(sample.box) for sample in unused), "only a row that gave way is not learnt from"
    lags = [{record["step"] - record["policy_version"] for record in records} for records in found]
    assert set.union(*lags) <= {0, 1}
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, steps + 1))
