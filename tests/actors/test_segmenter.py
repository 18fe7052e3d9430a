"""A group's answers, scored beside the tiny expert."""

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import actors.segmenter
from actors.config import EmbeddingsConfig, SegmenterConfig
from actors.experts.desk import Desk
from actors.experts.measuring import counts_there, encoded_there, overlaps
from actors.experts.protocol import Embedding, Prompts
from actors.experts.sam import SamExpert, build_sam
from actors.experts.sam_config import SamConfig
from actors.segmenter import Segmenter
from phantoms import rows
from rewards.case import Case
from rewards.scored import ScoredGroup
from rewards.scoring import Scorer
from umrg.answers import format_answer
from umrg.dataset import Dataset
from umrg.dataset_writer import write_rows
from umrg.frames import Frame, Frames, Size
from umrg.group import Completion, Group, GroupSamples
from umrg.masks import decode_rle, encode_rle
from umrg.metrics import Overlap, mask_dice, mask_iou
from umrg.sample import Sample


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Four rows about three images."""
    path = tmp_path_factory.mktemp("data") / "phantoms.parquet"
    write_rows(path, rows(3, seed=9, modalities=["CT"], queries_per_image=1))
    found = list(Dataset.open(path))
    return [*found, replace(found[0], id="another")]


@pytest.fixture(scope="module")
def sample(samples):
    return samples[0]


def completion(text: str) -> Completion:
    return Completion(text=text, token_ids=(), logprobs=(), policy_version=0, finished=True)


def test_rewards_see_text_mask_and_the_groups_step(sample):
    terms = {"bbox_iou_above": 1.0, "mask_dice": 1.0, "answer_length": 1.0}
    options: dict[str, dict[str, object]] = {
        "bbox_iou_above": {"threshold": {"start": 0.1, "end": 0.9, "steps": 10}},
        "answer_length": {"limit": 200, "fade": 100},
    }
    segmenter = Segmenter("tiny", SegmenterConfig(), Scorer(terms, options), frame=Frame.ORIGINAL, think=True)
    segmenter.start()
    x1, y1, x2, y2 = sample.box
    # Half as wide again as the reference: an IoU of two thirds.
    texts = [
        format_answer(box=(x1 - (x2 - x1) / 2, y1, x2, y2), points=sample.points, think="word " * words)
        for words in (1, 100)
    ]
    samples = GroupSamples(
        prompt_ids=(),
        frames=Frames(original=sample.size, model=sample.size),
        completions=tuple(map(completion, texts)),
    )
    for step, above in ((0, 1.0), (10, 0.0)):
        group = Group(run="r", step=step, index=0, sample=sample)
        short, long = (scored.reward.parts for scored in segmenter.score(group, sample.mask_bytes, samples).answers)
        assert short["bbox_iou_above"] == long["bbox_iou_above"] == above
        assert (short["answer_length"], long["answer_length"]) == (1, 0)
        assert short["mask_dice"] == long["mask_dice"] > 0.5


def test_a_reward_that_looks_at_no_mask_decodes_none_in_training(sample, monkeypatch):
    """Evaluation does, for its metrics. The image is not even embedded, nor the reference mask read."""
    segmenter = Segmenter(
        "tiny", SegmenterConfig(), Scorer.of_preset("soft", think=False), frame=Frame.ORIGINAL, think=False
    )
    segmenter.start()
    samples = GroupSamples(
        prompt_ids=(),
        frames=Frames(original=sample.size, model=sample.size),
        completions=(completion(format_answer(box=sample.box, points=sample.points, think=None)),),
    )
    group = Group(run="r", step=0, index=0, sample=sample).without_masks()
    (evaluated,) = segmenter.score(group, sample.mask_bytes, samples, "masks").answers
    assert evaluated.mask is not None and evaluated.metrics["dice"] > 0.5

    monkeypatch.setattr(SamExpert, "embed_all", lambda *_: pytest.fail("the expert was run"))
    monkeypatch.setattr(Desk, "embed", lambda *_: pytest.fail("the image was asked for"))
    segmenter.embed(group, "reward")
    scored = segmenter.score(group, (b"no mask",), samples, "reward")
    (trained,) = scored.answers
    assert trained.mask is None and trained.reward == evaluated.reward
    assert trained.metrics == {
        name: evaluated.metrics[name] for name in ("well_formed", "iou", "pdice", "pdice_published")
    }
    assert scored.group.sample.image_bytes == b"", "images travel once, in the group"


@pytest.mark.parametrize("lenient", [False, True])
def test_foreign_answers_are_drawn_only_where_that_was_asked(sample, lenient):
    x1, y1, x2, y2 = sample.box
    native = f'```json\n[{{"bbox_2d": [{x1}, {y1}, {x2}, {y2}], "label": "liver"}}]\n```'
    draft = format_answer(box=(0, 0, 9, 9), points=((1, 1), (8, 8)), think=None)
    ours = format_answer(box=sample.box, points=sample.points, think=f"perhaps {draft}")
    samples = GroupSamples(
        prompt_ids=(),
        frames=Frames(original=sample.size, model=sample.size),
        completions=(completion(ours), completion(native)),
    )
    scorer = Scorer.of_preset("mask", think=False)
    segmenter = Segmenter("tiny", SegmenterConfig(), scorer, frame=Frame.ORIGINAL, think=False, lenient=lenient)
    segmenter.start()
    group = Group(run="r", step=0, index=0, sample=sample).without_masks()
    own, foreign = segmenter.score(group, sample.mask_bytes, samples, "ablations").answers
    assert (own.answer.box, own.answer.lenient) == (sample.box, False)
    assert foreign.answer.lenient is lenient
    assert foreign.failure == (None if lenient else "no answer block")
    assert (foreign.metrics["dice"] > 0.5) is lenient
    assert foreign.metrics["pdice"] == 0, "a box alone has no points to speak of"


def test_an_expert_that_takes_boxes_only_is_given_no_points(sample, monkeypatch):
    sizes = SamConfig(encoder_dim=16, encoder_depth=1, encoder_heads=2, global_layers=(0,), image_side=64)
    native = SamExpert(build_sam(sizes), sizes, name="medsam_vit_b", preprocess="native")
    monkeypatch.setattr(actors.segmenter, "load_frozen", lambda *_: native)
    segmenter, group = started(), Group(run="r", step=0, index=0, sample=sample).without_masks()
    texts = [format_answer(box=sample.box, points=sample.points, think=None), "no"]
    good, bad = segmenter.score(group, sample.mask_bytes, samples_of(sample, texts), "ablations").answers
    assert good.mask is not None and bad.mask is None
    assert good.metrics.keys() == bad.metrics.keys() >= {"dice_box", "oracle_dice"}
    assert "dice_points" not in good.metrics
    # The reference itself was answered, so the ceiling is reached.
    assert good.metrics["dice_box"] == good.metrics["dice"] == good.metrics["oracle_dice"]
    assert bad.metrics["dice_box"] == 0 and bad.metrics["oracle_dice"] == good.metrics["oracle_dice"]


def started(config: SegmenterConfig | None = None, scorer: Scorer | None = None) -> Segmenter:
    """A segmenter of the tiny expert that rewards masks."""
    scorer = scorer or Scorer({"mask_dice": 1.0, "mask_iou": 1.0, "boundary": 1.0}, think=False)
    segmenter = Segmenter("tiny", config or SegmenterConfig(threads=1), scorer, frame=Frame.ORIGINAL, think=False)
    segmenter.start()
    return segmenter


def samples_of(sample: Sample, texts: Sequence[str]) -> GroupSamples:
    return GroupSamples(
        prompt_ids=(),
        frames=Frames(original=sample.size, model=sample.size),
        completions=tuple(map(completion, texts)),
    )


def texts_about(sample: Sample) -> list[str]:
    """Answers that are right, shifted, and malformed."""
    x1, y1, x2, y2 = sample.box
    boxes = [sample.box, (x1 - 4, y1 + 3, x2 - 4, y2 + 3)]
    return [*(format_answer(box=box, points=sample.points, think=None) for box in boxes), "I cannot say."]


def test_each_image_is_embedded_once_also_after_a_restart(tmp_path, samples):
    """Two epochs of groups that are scored at the same time, their images embedded ahead; and a third in another
    process's place, with the first one's disk. What an answer is worth depends on none of that."""
    config = SegmenterConfig(threads=1, embeddings=EmbeddingsConfig(folder=tmp_path))
    groups = [Group(run="r", step=0, index=i, sample=each).without_masks() for i, each in enumerate(samples)]

    def epoch(segmenter: Segmenter, *, ahead: bool) -> list[ScoredGroup]:
        with ThreadPoolExecutor(4) as callers:
            if ahead:
                list(callers.map(segmenter.embed, groups))
            asked = [
                callers.submit(segmenter.score, group, row.mask_bytes, samples_of(row, texts_about(row)), "reward")
                for group, row in zip(groups, samples, strict=True)
            ]
            return [each.result(120) for each in asked]

    segmenter = started(config)
    first = epoch(segmenter, ahead=True)
    assert segmenter.cache_use().embedded == len({each.image_key for each in samples}) == 3
    second = epoch(segmenter, ahead=False)
    use = segmenter.cache_use()
    assert (use.embedded, use.misses, use.read) == (0, 0, 0) and 0 < use.hits <= len(samples)
    restarted = started(config)
    third = epoch(restarted, ahead=True)
    use = restarted.cache_use()
    assert (use.embedded, use.misses, use.read) == (0, 0, 3)
    for scored in (second, third):
        assert scored == first


def test_no_image_file_is_decoded_where_its_embedding_is_kept(sample, monkeypatch):
    segmenter, group = started(), Group(run="r", step=0, index=0, sample=sample).without_masks()
    segmenter.embed(group)
    monkeypatch.setattr(Sample, "image", lambda _: pytest.fail("it was decoded again"))
    segmenter.embed(group, "reward")
    scored = segmenter.score(group, sample.mask_bytes, samples_of(sample, texts_about(sample)), "reward")
    assert scored.rewards[0] > scored.rewards[2] == 0


def test_ten_thousand_images_stay_within_the_memory_of_the_configuration(sample, monkeypatch):
    """Embeddings of 128 KiB, of which all together would take 1.2 GiB; the tests' own expert makes them at once."""
    segmenter = started(SegmenterConfig(threads=1, embeddings=EmbeddingsConfig(memory_mib=8)))
    monkeypatch.setattr(Sample, "image", lambda _: np.zeros((4, 4, 3), dtype=np.uint8))
    monkeypatch.setattr(
        SamExpert,
        "embed_all",
        lambda _, images: [
            Embedding(features=(torch.ones(1, 128, 16, 16),), original=Size(4, 4), content=Size(224, 224))
            for _ in images
        ],
    )
    before = _resident_mib()
    for i in range(10_000):
        row = replace(sample, image_bytes=i.to_bytes(4), mask_bytes=())
        segmenter.embed(Group(run="r", step=0, index=i, sample=row))
    use = segmenter.cache_use()
    assert (use.embedded, use.kept, use.bytes) == (10_000, 64, 8 << 20)
    assert _resident_mib() - before < 200


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 2**20


def test_malformed_answers_never_reach_the_expert(sample, monkeypatch):
    segmenter, group = started(), Group(run="r", step=0, index=0, sample=sample).without_masks()
    asked: list[Prompts] = []
    decode = Desk.decode

    def watched(self: Desk, prompts: Prompts, read: Any) -> Any:
        asked.append(prompts)
        return decode(self, prompts, read)

    monkeypatch.setattr(Desk, "decode", watched)
    malformed = ["I cannot say.", "<answer>[1, 2]</answer>", ""]
    scored = segmenter.score(group, sample.mask_bytes, samples_of(sample, malformed), "reward")
    assert scored.rewards == (0.0, 0.0, 0.0) and not asked and segmenter.cache_use().misses == 0
    segmenter.score(group, sample.mask_bytes, samples_of(sample, [*malformed, *texts_about(sample)]), "reward")
    (prompts,) = asked
    assert prompts.boxes is not None and len(prompts.boxes) == 2


def test_masks_rewards_and_metrics_are_those_of_the_masks_themselves(sample):
    """As numpy counts and encodes them in the main memory."""
    segmenter, group = started(), Group(run="r", step=0, index=0, sample=sample).without_masks()
    right, shifted, malformed = segmenter.score(
        group, sample.mask_bytes, samples_of(sample, texts_about(sample)), "reward"
    ).answers
    assert malformed.mask is None and malformed.expert_score is None and malformed.reward.total == 0
    for found in (right, shifted):
        assert found.mask is not None
        mask = decode_rle(found.mask)
        assert found.mask == encode_rle(mask)
        assert found.metrics["dice"] == found.reward.parts["mask_dice"] == mask_dice(mask, sample.mask())
        assert found.metrics["mask_iou"] == found.reward.parts["mask_iou"] == mask_iou(mask, sample.mask())
    assert right.mask != shifted.mask


@given(
    masks=arrays(np.bool_, st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9))), seed=st.integers(0, 9)
)
def test_what_is_counted_and_encoded_on_a_device_is_what_numpy_makes_of_it(masks, seed):
    reference = np.random.default_rng(seed).random(masks.shape[1:]) < 0.5
    with torch.inference_mode():  # as experts do
        drawn = torch.from_numpy(masks).clone()
    found = overlaps(drawn, reference)
    assert found == [Overlap.of(mask, reference) for mask in masks]
    assert counts_there(drawn, reference) == [(each.both, each.predicted) for each in found]
    assert [encoded_there(mask) for mask in drawn] == [encode_rle(mask) for mask in masks]


def test_a_large_mask_of_few_runs_is_encoded_by_where_they_start():
    """One of many runs is not, which `encode_rle` decides alike."""
    for specks in (0.0, 0.5):
        mask = np.random.default_rng(0).random((200, 300)) < specks
        mask[20:90, 100:180] ^= True
        for each in (mask, ~mask):
            assert encoded_there(torch.from_numpy(each)) == encode_rle(each)


def test_masks_of_another_size_than_the_reference_are_refused():
    with pytest.raises(ValueError, match="cannot be compared"):
        overlaps(torch.zeros(2, 3, 4, dtype=torch.bool), np.zeros((4, 3), dtype=np.bool_))


class Alone:
    """A reward term that must not be called while it is."""

    def __init__(self) -> None:
        self.inside, self.most = 0, 0

    def __call__(self, case: Case) -> float:
        self.inside += 1
        self.most = max(self.most, self.inside)
        time.sleep(0.01)
        self.inside -= 1
        return 1.0


def test_a_users_term_need_not_know_of_threads(sample, monkeypatch):
    term = Alone()
    scorer = Scorer({"mask_dice": 1.0}, think=False)
    monkeypatch.setitem(scorer._terms[0].__dict__, "term", term)
    segmenter = started(scorer=scorer)
    group = Group(run="r", step=0, index=0, sample=sample).without_masks()
    given = samples_of(sample, texts_about(sample))
    with ThreadPoolExecutor(4) as callers:
        asked = [callers.submit(segmenter.score, group, sample.mask_bytes, given, "reward") for _ in range(4)]
        assert all(each.result(120).rewards == (1.0, 1.0, 1.0) for each in asked)
    assert term.most == 1
