"""Runs at staleness 1: what corrects for the lag, which weights are evaluated, when the canary is asked, and how a run
goes on with another staleness."""

import os
import pickle
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

import cluster.train
import cluster.workers
from actors.learner_rank import LearnerRank, fetched
from actors.pools import RolloutPool
from cluster.records import read_records
from cluster.train import train
from cluster.weight_sync import WeightsDiffer
from cluster.workers import rollouts
from learner.config import ObjectiveConfig
from learner.grpo import GrpoRank
from learner.objective import Tokens, token_losses
from reasoner.model import load_reasoner
from tests.cluster.test_train import StaleRollout
from tests.conftest import TINY_REASONER
from tests.light_rollout import LightRollout
from umrg.config import model_folder
from umrg.dataset import Dataset
from umrg.shuffling import Cursor, batches

SMALL = (
    "data.train={phantoms: 24, seed: 1, modalities: [CT]}",
    "data.eval={phantoms: 4, seed: 2, modalities: [CT]}",
    "batch=4",
    "rollout.n=4",
    "evaluation={before: false, limit: 4, n: 0}",
    "learner.warmup=0",
    "staleness=1",
    "learner.objective.correction=token",
)
pytestmark = pytest.mark.slow
WITHIN = 2e-3
"""Of a weight: the engine's arithmetic against that of transformers, in float32."""


def weight_used(tokens, objective):
    """Losses, and what the correction multiplied each by; not a number where the loss is 0."""
    losses = token_losses(tokens, objective)
    plain = token_losses(tokens, objective.model_copy(update={"correction": "none"}))
    return losses, (losses.loss / plain.loss).detach()


class Recording(LearnerRank):
    """Leaves behind what it learnt from at each step, and how each token's loss was weighted."""

    seen: list[tuple[Tokens, torch.Tensor]]

    def start(self, *args):
        super().start(*args)
        self.steps = 0
        self._grpo = GrpoRank(self.running(), self._grpo_config, losses=self.recorded)

    def recorded(self, tokens, objective):
        losses, weight = weight_used(tokens, objective)
        plain = {name: value.detach() for name, value in vars(tokens).items() if value is not None}
        self.seen.append((replace(tokens, **plain), weight))
        return losses

    def update(self, groups, work):
        self.seen = []
        report = super().update(groups, work)
        found = [fetched(*refs) for refs in groups]
        Path(os.environ["OF_RECORDING"], f"{self.steps}.pickle").write_bytes(pickle.dumps((found, self.seen, report)))
        self.steps += 1
        return report


@pytest.fixture(scope="module")
def learnt(ray_cluster, demo_config, tmp_path_factory):
    """What each step of a run learnt from and how; the folders of all versions of its model."""
    folder = tmp_path_factory.mktemp("lag")
    kept = ("steps=4", "checkpoint_every=1", "keep=9", f"runs={folder}", "name=lag")
    recording = ("learner.mini_batch=2", f"learner.environment={{OF_RECORDING: {folder}}}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster.train, "LearnerRank", Recording)
        run = train(demo_config(*SMALL, *kept, *recording))
    steps = [pickle.loads((folder / f"{step}.pickle").read_bytes()) for step in range(4)]
    models = [TINY_REASONER, *(model_folder(run.checkpoints / f"step-{step:06d}") for step in (1, 2, 3))]
    return steps, models


@torch.no_grad()
def logprobs(reasoner, sample, token_ids):
    """Of a completion's tokens, by transformers' own forward pass."""
    prompt = reasoner.encode(sample.query, reasoner.encode_image(sample.image()))
    ids = torch.cat([prompt.token_ids, torch.tensor(token_ids)])[None]
    logits = reasoner.model(
        input_ids=ids,
        mm_token_type_ids=(ids == reasoner.image_token_id).int(),
        pixel_values=prompt.image.pixel_values,
        image_grid_thw=prompt.image.grid_thw,
    ).logits[0, len(prompt.token_ids) - 1 : -1]
    logits[:, list(reasoner.vision_tokens)] = -torch.inf
    return logits.log_softmax(1).gather(1, ids[0, len(prompt.token_ids) :, None])[:, 0]


def key(values):
    """Knows a completion by its engine's log-probs."""
    return tuple(torch.as_tensor(values, dtype=torch.float32).tolist())


@pytest.fixture(scope="module")
def expected(learnt):
    """Of each step, by completion: exp(log-prob of the version that learns - log-prob of the version that sampled),
    and how many versions lie between the two."""
    steps, models = learnt
    reasoners = [load_reasoner(model) for model in models]
    weights = []
    for version, (groups, _, _) in enumerate(steps):
        found = {}
        for group in groups:
            for each in group.samples.completions:
                now, then = (
                    logprobs(reasoners[of], group.group.sample, each.token_ids) for of in (version, each.policy_version)
                )
                found[key(each.logprobs)] = ((now - then).exp(), version - each.policy_version)
        weights.append(found)
    return weights


def differences(seen, expected, weigh=lambda tokens, weight: weight):
    """Of each token's weight from the expected one, at most the cap."""
    found = []
    for tokens, used in seen:
        lengths = tokens.answer.unique_consecutive(return_counts=True)[1].tolist()
        answers = tokens.engine_logprobs.split(lengths)
        right = torch.cat([expected[key(answer)][0] for answer in answers]).clamp(max=2.0)
        found.append((weigh(tokens, used) - right).abs())
    every = torch.cat(found)
    return every[~every.isnan()]


def test_the_weight_of_each_token_is_that_of_the_two_versions(learnt, expected):
    """Of the one that learns over the one that sampled, both from their checkpoints."""
    for (_, seen, report), weights in zip(learnt[0], expected, strict=True):
        found = differences(seen, weights)
        assert len(found) > 100 and found.max() < WITHIN
        ratios = torch.cat([(tokens.old_logprobs - tokens.engine_logprobs).exp() for tokens, _ in seen])
        assert report.correction == pytest.approx(float(ratios.clamp(max=2.0).mean()), abs=1e-4)
    lags = [{lag for _, lag in weights.values()} for weights in expected]
    assert lags[0] == {0} and all(each <= {0, 1} for each in lags) and 1 in set.union(*lags)
    lagging = torch.cat([weight for weights in expected for weight, lag in weights.values() if lag])
    assert (lagging - 1).abs().max() > 20 * WITHIN, "the versions differ so much that a wrong weight is seen"


PLANTED = {
    "the learner's own for the engine's": lambda tokens: replace(tokens, engine_logprobs=tokens.old_logprobs),
    "the engine's for the learner's": lambda tokens: replace(tokens, old_logprobs=tokens.engine_logprobs),
    "the reverse": lambda tokens: replace(
        tokens, old_logprobs=tokens.engine_logprobs, engine_logprobs=tokens.old_logprobs
    ),
    "those of a policy that has moved": lambda tokens: replace(tokens, old_logprobs=tokens.logprobs),
}


@pytest.mark.parametrize("plant", PLANTED)
def test_a_wrong_numerator_or_denominator_would_be_seen(learnt, expected, plant):
    """In what the learner gave the loss."""
    objective = ObjectiveConfig(correction="token")
    worst = max(
        differences(seen, weights, lambda tokens, _: weight_used(PLANTED[plant](tokens), objective)[1]).max()
        for (_, seen, _), weights in zip(learnt[0], expected, strict=True)
    )
    assert worst > 10 * WITHIN


@pytest.mark.chaos
def test_where_weights_hardly_move_engine_and_learner_agree_for_twenty_steps(ray_cluster, demo_config, tmp_path):
    """A gain of 1 is moved by a rounding at each step: what does not move at all is refused."""
    still = ("learner.lr=1e-8", "learner.vector_lr=1e-7", "batch=2", "steps=20")
    metrics = train(demo_config(*SMALL, *still, f"runs={tmp_path}", "name=still")).metrics()
    assert len(metrics) == 20 and sum(line["policy/lag"] > 0 for line in metrics) > 10
    for line in metrics:
        assert line["learner/engine_gap"] < 1e-4 and line["learner/correction"] == pytest.approx(1, abs=1e-4)
        assert line["learner/truncated_fraction"] == 0
    assert [line["step"] for line in metrics if "learner/canary_gap" in line] == [1, 11]


@pytest.mark.chaos
def test_a_stale_cache_is_found_by_the_first_canary(ray_cluster, demo_config, tmp_path, monkeypatch):
    monkeypatch.setattr(
        cluster.train, "rollouts", lambda *part: [replace(actor, actor_class=StaleRollout) for actor in rollouts(*part)]
    )
    moving = ("learner.lr=3e-4", "learner.freeze=[]")
    with pytest.raises(WeightsDiffer, match=r"after weights of version 1 .* stale weights or caches"):
        train(demo_config(*SMALL, *moving, f"runs={tmp_path}", "name=stale", "steps=3"))


@pytest.fixture(scope="module")
def overlapped(ray_cluster, demo_config, tmp_path_factory):
    """A run of twelve steps with two light rollouts; how many engines the canary was asked of at each version."""
    folder, asked = tmp_path_factory.mktemp("overlapped"), {}
    canary = RolloutPool.canary

    def counted(self, *args):
        found = canary(self, *args)
        versions = {each.completions[0].policy_version for each in found}
        asked[self.weights.version if self.weights else 0] = (len(found), versions)
        return found

    two = ("rollout.actors=2", "rollout.num_cpus=0.3", "segmenter.threads=1", "learner.num_cpus=0.3")
    often = ("steps=12", "evaluation.every=4", "checkpoint_every=1", "keep=99")
    config = demo_config(*SMALL, *two, *often, f"runs={folder}", "name=light")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster.workers, "Rollout", LightRollout)
        patch.setattr(RolloutPool, "canary", counted)
        run = train(config)
    return run, config, asked


def test_the_canary_is_asked_of_an_engine_at_the_first_version_and_each_tenth_after(overlapped):
    _, _, asked = overlapped
    assert list(asked) == [0, 1, 11]
    assert all(count >= 1 and versions == {version} for version, (count, versions) in asked.items())


def test_an_evaluation_within_a_run_is_of_the_steps_own_weights(overlapped):
    run, _, _ = overlapped
    for name, step in (("step-000004", 4), ("step-000008", 8), ("after", 12)):
        records = read_records(run.samples / f"{name}-greedy.parquet")
        assert len(records) == 4 and {record["policy_version"] for record in records} == {step}


def rows_learnt(run):
    """Ids of the rows that each step learnt from, in order."""
    steps = [read_records(path) for path in sorted(run.samples.glob("step-??????.parquet"))]
    return [list(dict.fromkeys(record["sample_id"] for record in records)) for records in steps]


def rows_drawn(run, config):
    """Ids of the rows of each step in the order of the data."""
    data = Dataset.open(run.drawn_train)
    drawn = islice(batches(data, config.batch, Cursor(seed=config.seed)), config.steps)
    return [[data.infos[row].id for row in rows] for rows, _ in drawn]


def lags(run):
    """Of each step, the versions by which its answers' weights were behind."""
    steps = [read_records(path) for path in sorted(run.samples.glob("step-??????.parquet"))]
    return [{record["step"] - record["policy_version"] for record in records} for records in steps]


def test_a_run_goes_on_with_another_staleness(overlapped, monkeypatch):
    """From a checkpoint that lists rows of a step that was begun; no row is lost, and none comes twice."""
    run, config, _ = overlapped
    monkeypatch.setattr(cluster.workers, "Rollout", LightRollout)
    assert rows_learnt(run) == rows_drawn(run, config)
    assert lags(run)[0] == {0} and {1} in lags(run) and set.union(*lags(run)) <= {0, 1}
    for step, staleness in ((6, 2), (4, 0)):
        resume = run.checkpoints / f"step-{step:06d}"
        train(config.model_copy(update={"resume": resume, "staleness": staleness, "steps": 9}))
        assert rows_learnt(run) == rows_drawn(run, config)[:9]
        assert set.union(*lags(run)[step:]) <= set(range(staleness + 1)), "0 is behind by nothing"
