"""The learner's ranks, as real actors with real DeepSpeed engines."""

from unittest.mock import patch

import numpy as np
import peft
import pytest
import ray
import torch

from actors.learner_rank import LearnerRank
from actors.weight_files import unpack
from learner.attention import use_shared_prefix
from learner.lora import Weight
from learner.optimizer_state import state_tensors
from learner.shared_prefix import Branches, branch_scores, pack
from phantoms import rows
from reasoner.model import load_reasoner
from tests.conftest import TINY_REASONER
from tests.ranks import STEADY, assert_moved_alike, running, scored_group
from umrg.answers import format_answer
from umrg.dataset import Dataset
from umrg.dataset_writer import write_rows
from umrg.group import Completion, Group, GroupSamples

pytestmark = pytest.mark.numeric
slow, chaos = pytest.mark.slow, (pytest.mark.slow, pytest.mark.chaos)


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    """Three groups of three answers each, as a rollout of the tiny reasoner would give them."""
    path = tmp_path_factory.mktemp("data") / "phantoms.parquet"
    write_rows(path, rows(3, seed=3, modalities=["CT"], queries_per_image=1))
    reasoner = load_reasoner(TINY_REASONER)
    use_shared_prefix(reasoner.model)
    rng = np.random.default_rng(0)
    return [
        answered(reasoner, Group(run="t", step=0, index=i, sample=s), rng) for i, s in enumerate(Dataset.open(path))
    ]


def answered(reasoner, group, rng):
    """The group with three answers near the reference, without rewards."""
    sample = group.sample
    prompt = reasoner.encode(sample.query, reasoner.encode_image(sample.image()))
    boxes = np.clip(np.array(sample.box) + rng.integers(-20, 20, (3, 4)), 0, 223)
    texts = [format_answer(box=tuple(box), points=sample.points, think="Here.") for box in boxes.tolist()]
    ids = [reasoner.completion_ids(text) for text in texts]
    with torch.no_grad():
        flat = branch_scores(
            reasoner.model,
            pack([Branches(prefix=prompt, branches=ids)], reasoner.model),
            forbidden=torch.tensor(reasoner.vision_tokens),
        ).logprobs
    completions = tuple(
        Completion(text=text, token_ids=tuple(i.tolist()), logprobs=tuple(p.tolist()), policy_version=0, finished=True)
        for text, i, p in zip(texts, ids, flat.split([len(i) for i in ids]), strict=True)
    )
    samples = GroupSamples(
        prompt_ids=tuple(prompt.token_ids.tolist()),
        frames=prompt.image.frames,
        completions=completions,
    )
    return group, samples


WORK = [3, 2, 2]
"""Of the groups: with two ranks the first takes the first group and the second the others."""

REWARDS = [[0.1, 0.7, 0.4], [0.9, 0.2, 0.3], [0.5, 0.5, 0.5]]


def references(groups):
    """The groups in the object store, of which the last has zero variance."""
    return [
        (ray.put(group), ray.put(scored_group(group, samples, rewards)))
        for (group, samples), rewards in zip(groups, REWARDS, strict=True)
    ]


def learn(pool, groups, steps):
    """Reports of some steps on the same groups."""
    refs = references(groups)
    return [pool.update(refs, WORK) for _ in range(steps)]


def weights_of(pool):
    buckets = pool.weights(0, everything=True).buckets
    return {name: tensor for ref in buckets for name, tensor in unpack(ray.get(ref)).items()}


def trained(groups, hosts, steps=3, **changes):
    """Reports and weights after some steps on the same groups."""
    pool = running(hosts, steps=steps, **changes)
    return learn(pool, groups, steps), weights_of(pool)


def test_an_update_moves_every_parameter_and_reports(groups, hosts):
    (report,), weights = trained(groups, hosts, steps=1)
    assert report.engine_gap < 1e-5 and report.updates == 1 and report.clip_fraction == 0
    assert report.tokens == sum(len(c.token_ids) for _, samples in groups for c in samples.completions)
    assert report.grad_norm > 0 and report.lr == 1e-4
    before = dict(load_reasoner(TINY_REASONER).model.named_parameters())
    assert weights.keys() == before.keys()
    assert not any(torch.equal(weights[name], before[name]) for name in before)


@pytest.fixture(scope="module")
def plain(groups, hosts):
    """Reports and weights after three steps of one rank without ZeRO."""
    return trained(groups, hosts, **STEADY, zero_stage=0)


@pytest.mark.parametrize("stage", [2, pytest.param(0, marks=chaos), pytest.param(3, marks=slow)])
def test_deepspeed_compiles_nothing(groups, hosts, stage):
    """Neither at the start, for which the switch is undocumented, nor in an update with a reference model."""
    trained(groups, hosts, steps=1, zero_stage=stage, objective={"kl": 0.01})
    assert ray.get(hosts(1)[0].reduction.remote()) is None
    assert ray.get(hosts(1)[0].compiled.remote()) == []


def test_two_ranks_of_zero_2_match_one(groups, hosts, plain):
    alone, expected = plain
    together, weights = trained(groups, hosts, **STEADY, ranks=2, zero_stage=2)
    assert_moved_alike(weights, expected)
    for first, second in zip(alone, together, strict=True):
        assert second.loss == pytest.approx(first.loss, abs=1e-5)
        assert second.grad_norm == pytest.approx(first.grad_norm, rel=1e-4)


def test_a_rank_fetches_its_own_groups_only(groups, hosts):
    """Here it is not even told where the others' are."""
    ranks = running(hosts, steps=1, ranks=2)._actors.values()
    refs = references(groups)
    calls = [
        rank.update.remote([ref if (i > 0) == number else None for i, ref in enumerate(refs)], WORK)
        for number, rank in enumerate(ranks)
    ]
    first, second = ray.get(calls, timeout=300)
    assert first == second and first.tokens == sum(len(c.token_ids) for _, s in groups for c in s.completions)


CHECKPOINTING, SPLIT = {"gradient_checkpointing": True}, {"micro_batch_tokens": 260}


@slow
@pytest.mark.parametrize(
    "changes", [CHECKPOINTING | SPLIT, *(pytest.param(each, marks=chaos) for each in (CHECKPOINTING, SPLIT))], ids=str
)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=chaos), 2, 3])
def test_every_stage_and_number_of_ranks_agree(groups, hosts, plain, stage, ranks, changes):
    """Of three groups the second rank has one; a budget of 260 tokens splits each into several packed sequences."""
    _, weights = trained(groups, hosts, **STEADY | changes, ranks=ranks, zero_stage=stage)
    assert_moved_alike(weights, plain[1])


def test_later_mini_batches_keep_the_old_log_probs(groups, hosts):
    """Two updates per step: at the second the policy has moved, and the engine is still compared with the policy that
    sampled."""
    (report,), _ = trained(groups, hosts, steps=1, mini_batch=2)
    assert report.updates == 2 and report.engine_gap < 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora": {"rank": 4, "alpha": 8}, "lr": 1e-2},
        pytest.param({"reference": "partitioned"}, marks=chaos),
        pytest.param({"reference": "partitioned", "ranks": 2, "zero_stage": 3}, marks=slow),
        pytest.param({"reference": "parked", "ranks": 2, "zero_stage": 3}, marks=chaos),
        pytest.param({"lora": {"rank": 4, "alpha": 8}, "lr": 1e-2, "ranks": 2, "zero_stage": 3}, marks=slow),
    ],
    ids=str,
)
def test_a_divergence_from_the_reference_is_zero_at_first_and_grows(groups, hosts, changes):
    """Wherever the reference model is: parked, over the ranks, or the policy without its adapters."""
    reports, _ = trained(groups, hosts, steps=2, objective={"kl": 0.05}, **changes)
    assert abs(reports[0].kl) < 1e-5 < reports[1].kl


@slow
def test_the_divergence_is_the_same_wherever_the_reference_is(groups, hosts):
    (_, parked), weights = trained(groups, hosts, steps=2, **STEADY, objective={"kl": 0.05})
    (_, spread), others = trained(groups, hosts, steps=2, **STEADY, objective={"kl": 0.05}, reference="partitioned")
    assert spread.kl == pytest.approx(parked.kl, rel=1e-3)
    assert_moved_alike(others, weights)


def test_a_frozen_vision_tower_stands_still(groups, hosts):
    _, weights = trained(groups, hosts, steps=1, freeze=["vision_tower", "merger"])
    before = dict(load_reasoner(TINY_REASONER).model.named_parameters())
    same = {name for name in before if torch.equal(weights[name], before[name])}
    assert same == {name for name in before if ".visual." in name}


def saved(groups, hosts, folder, **changes):
    """Two steps of three, and a checkpoint after them."""
    pool = running(hosts, **changes)
    learn(pool, groups, 2)
    pool.save(folder)
    # Training goes on while the checkpoint is written, and does not leak into it.
    learn(pool, groups, 1)
    pool.saved(wait=True)
    return weights_of(pool)


def resumed(groups, hosts, folder, **changes):
    """The third step, from the checkpoint."""
    pool = running(hosts, **changes)
    pool.load(folder)
    learn(pool, groups, 1)
    return weights_of(pool)


BOTH = [
    pytest.param({"zero_stage": 0}, id="zero-0"),
    pytest.param({"zero_stage": 2, "ranks": 2}, id="zero-2-of-two"),
    pytest.param({"zero_stage": 2, "dtype": "bfloat16"}, id="zero-2-in-bfloat16"),
    pytest.param({"zero_stage": 3, "ranks": 2, "dtype": "bfloat16"}, id="zero-3-in-bfloat16", marks=slow),
    pytest.param(
        {"zero_stage": 2, "dtype": "bfloat16", "lora": {"rank": 4, "alpha": 8}},
        id="adapters-in-bfloat16",
        marks=chaos,
    ),
    pytest.param({"zero_stage": 1, "ranks": 2}, id="zero-1-of-two", marks=chaos),
    pytest.param({"zero_stage": 3, "ranks": 2}, id="zero-3-of-two", marks=chaos),
]


@pytest.mark.parametrize("changes", BOTH)
def test_a_resumed_learner_goes_on_bit_for_bit(groups, hosts, tmp_path, changes):
    config = {"eps": 1e-6, "threads": 1, "schedule": "cosine", "objective": {"kl": 0.01}, **changes}
    uninterrupted = saved(groups, hosts, tmp_path, **config)
    again = resumed(groups, hosts, tmp_path, **config)
    assert all(torch.equal(again[name], tensor) for name, tensor in uninterrupted.items())


@slow
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((0, 2), (2, 1)),
        ((2, 2), (3, 2)),
        ((3, 2), (3, 1)),
        *(pytest.param(*each, marks=chaos) for each in (((1, 2), (0, 1)), ((2, 2), (2, 1)), ((3, 2), (2, 2)))),
    ],
    ids=str,
)
def test_other_ranks_and_stages_go_on(groups, hosts, tmp_path, plain, before, after):
    """before, after: (ZeRO stage, ranks)."""
    saved(groups, hosts, tmp_path, **STEADY, zero_stage=before[0], ranks=before[1])
    weights = resumed(groups, hosts, tmp_path, **STEADY, zero_stage=after[0], ranks=after[1])
    assert_moved_alike(weights, plain[1])


PARKED = [
    pytest.param({"zero_stage": 0}, id="zero-0"),
    pytest.param({"zero_stage": 2}, id="zero-2"),
    pytest.param({"zero_stage": 3, "ranks": 2, "dtype": "bfloat16"}, id="zero-3-in-bfloat16"),
    pytest.param({"zero_stage": 3}, id="zero-3", marks=pytest.mark.slow),
    pytest.param({"zero_stage": 3, "ranks": 2}, id="zero-3-of-two", marks=pytest.mark.slow),
    pytest.param({"zero_stage": 0, "ranks": 2}, id="zero-0-of-two", marks=pytest.mark.slow),
    pytest.param({"zero_stage": 2, "ranks": 2, "dtype": "bfloat16"}, id="zero-2-in-bfloat16", marks=pytest.mark.slow),
    pytest.param({"lora": {"rank": 4, "alpha": 8}, "zero_stage": 2}, id="adapters", marks=pytest.mark.slow),
    pytest.param({"zero_stage": 2, "offload": "optimizer"}, id="zero-2-offloaded", marks=pytest.mark.slow),
    pytest.param({"zero_stage": 3, "offload": "parameters"}, id="zero-3-offloaded", marks=pytest.mark.slow),
]


class Measured(LearnerRank):
    """Which says how much of its optimizer's state is in its place."""

    def in_place(self):
        zero = self.running()
        tensors = state_tensors(zero.engine.optimizer, zero.trained(), zero.ranks)
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def in_place(pool):
    return sum(ray.get([rank.in_place.remote() for rank in pool._actors.values()]))


@pytest.mark.parametrize("changes", PARKED)
def test_a_learner_that_parks_between_steps_learns_bit_for_bit_the_same(groups, hosts, tmp_path, changes):
    """And while it is parked its weights are exported, its log-probs asked for, and a checkpoint of it written."""
    config = {"eps": 1e-6, "threads": 1, "kind": Measured, **changes}
    plain = running(hosts, **config)
    learn(plain, groups, 3)
    expected = weights_of(plain)
    plain.save(tmp_path / "plain")
    plain.saved(wait=True)
    pool = running(hosts, **config)
    for _ in range(3):
        pool.unpark()
        learn(pool, groups, 1)
        held = in_place(pool)
        pool.park(state=True)
        assert held > 0 and in_place(pool) == 0
        group, samples = groups[0]
        assert len(pool.logprobs(ray.put(group), samples.completions[0].token_ids)) > 0
    weights = weights_of(pool)
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    pool.save(tmp_path / "parked")
    pool.saved(wait=True)
    files = [path.relative_to(tmp_path / "plain") for path in (tmp_path / "plain").rglob("*.safetensors")]
    assert files and all((tmp_path / "parked" / f).read_bytes() == (tmp_path / "plain" / f).read_bytes() for f in files)


def test_a_learner_with_room_keeps_its_state_in_place(groups, hosts):
    pool = running(hosts, kind=Measured, zero_stage=2)
    learn(pool, groups, 1)
    held = in_place(pool)
    pool.park(state=False)
    assert in_place(pool) == held > 0
    pool.unpark()
    learn(pool, groups, 1)


def test_a_checkpoint_of_other_frozen_parts_is_refused(groups, hosts, tmp_path):
    pool = running(hosts, freeze=["vision_tower"])
    pool.save(tmp_path)
    pool.saved(wait=True)
    other = running(hosts)
    with pytest.raises(ValueError, match=r"visual.*trained here and not there"):
        other.load(tmp_path)


class SmallBuckets(LearnerRank):
    """Whose model makes several shards, as a large one does. It counts the tensors that it copies for them."""

    def save(self, folder):
        self.copied = 0
        original = Weight.tensor

        def tensor(weight):
            self.copied += 1
            return original(weight)

        with (
            patch("learner.zero.BUCKET_BYTES", 1 << 20),
            patch("learner.checkpoint.BUCKET_BYTES", 1 << 20),
            patch.object(Weight, "tensor", tensor),
        ):
            super().save(folder)

    def copies(self):
        return self.copied


@pytest.mark.parametrize(("ranks", "stage"), [(1, 2), (2, 2), pytest.param(2, 3, marks=slow)])
def test_shards_of_the_ranks_make_one_model(groups, hosts, tmp_path, ranks, stage):
    """And each rank copies those that it writes, and no others."""
    pool = running(hosts, kind=SmallBuckets, ranks=ranks, zero_stage=stage)
    learn(pool, groups, 1)
    pool.save(tmp_path)
    files = pool.saved(wait=True)
    copies = ray.get([rank.copies.remote() for rank in pool._actors.values()])
    weights = weights_of(pool)
    assert sum(copies) == len(weights) and all(0 < count < len(weights) for count in copies if ranks > 1)
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 3
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == set(files)
    loaded = dict(load_reasoner(tmp_path / "model").model.named_parameters())
    assert weights.keys() == loaded.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())


def test_bfloat16_follows_float32(groups, hosts):
    """In the norm of the gradient; single weights are rounded too coarsely to compare."""
    (exact,), weights = trained(groups, hosts, steps=1, **STEADY)
    (rounded,), others = trained(groups, hosts, steps=1, **STEADY, dtype="bfloat16")
    assert rounded.grad_norm == pytest.approx(exact.grad_norm, rel=0.1)
    assert rounded.engine_gap < 0.15
    before = dict(load_reasoner(TINY_REASONER).model.named_parameters())
    assert others.keys() == weights.keys()
    assert all(tensor.dtype == torch.bfloat16 for tensor in others.values())
    assert any(not torch.equal(tensor.float(), before[name].bfloat16().float()) for name, tensor in others.items())


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="zero-2"),
        pytest.param({"zero_stage": 3, "ranks": 2}, id="zero-3-of-two", marks=slow),
    ],
)
def test_adapters_learn_alone_and_come_out_merged_and_by_themselves(groups, hosts, tmp_path, changes):
    pool = running(hosts, lr=1e-2, lora={"rank": 4, "alpha": 8}, **changes)
    untouched = weights_of(pool)
    first, _ = learn(pool, groups, 2)
    pool.save(tmp_path)
    pool.saved(wait=True)
    merged = weights_of(pool)
    assert first.engine_gap < 1e-5
    base = load_reasoner(TINY_REASONER)
    before = dict(base.model.named_parameters())
    assert all(torch.equal(untouched[name], tensor) for name, tensor in before.items())
    moved = {name for name, tensor in before.items() if not torch.equal(merged[name], tensor)}
    assert moved == {name for name in before if "language_model" in name and name.endswith("_proj.weight")}
    saved_model = dict(load_reasoner(tmp_path / "model").model.named_parameters())
    assert all(torch.equal(saved_model[name], tensor) for name, tensor in merged.items())
    adapted = peft.PeftModel.from_pretrained(base.model, tmp_path / "adapter").merge_and_unload()
    for name, tensor in adapted.named_parameters():
        assert (tensor - merged[name]).abs().max() <= 1e-5 * tensor.abs().max(), name


def test_an_adapter_is_resumed(groups, hosts, tmp_path):
    settings = {"lora": {"rank": 4, "alpha": 8}}
    uninterrupted = saved(groups, hosts, tmp_path, **settings)
    again = resumed(groups, hosts, tmp_path, **settings)
    assert all(torch.equal(again[name], tensor) for name, tensor in uninterrupted.items())
