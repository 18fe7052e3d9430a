"""A group's answers, scored beside the tiny expert."""

import pytest

from actors.config import SegmenterConfig
from actors.experts.drawing import draw_masks
from actors.experts.sam import SamExpert, build_sam
from actors.experts.sam_config import SamConfig
from actors.segmenter import Segmenter, ablation_metrics
from phantoms import rows
from rewards.case import Reference
from rewards.scoring import Scorer
from umrg.answers import format_answer, parse_answer
from umrg.dataset import Dataset
from umrg.dataset_writer import write_rows
from umrg.frames import Frame, Frames
from umrg.group import Completion, Group, GroupSamples


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "phantoms.parquet"
    write_rows(path, rows(1, seed=9, modalities=["CT"]))
    return Dataset.open(path)[0]


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

    monkeypatch.setattr(SamExpert, "embed", lambda *_: pytest.fail("the expert was run"))
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


def test_an_expert_that_takes_boxes_only_is_given_no_points(sample):
    sizes = SamConfig(encoder_dim=16, encoder_depth=1, encoder_heads=2, global_layers=(0,), image_side=64)
    native = SamExpert(build_sam(sizes), sizes, name="medsam_vit_b", preprocess="native")
    answers = [parse_answer(format_answer(box=sample.box, points=sample.points, think=None)), parse_answer("no")]
    embedding = native.embed(sample.image())
    assert list(draw_masks(native, embedding, answers)) == [0]
    good, bad = ablation_metrics(native, embedding, answers, Reference.of_sample(sample, with_mask=True))
    assert good.keys() == bad.keys() == {"dice_box", "oracle_dice"}
    # The reference itself was answered, so the ceiling is reached.
    assert good["dice_box"] == good["oracle_dice"] and bad["dice_box"] == 0
