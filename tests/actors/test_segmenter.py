"""A group's answers, scored beside the tiny expert."""

import pytest

from actors.config import SegmenterConfig
from actors.segmenter import Segmenter
from rewards.scoring import Scorer
from umrg.answers import format_answer
from umrg.dataset import Dataset
from umrg.dataset_writer import write_rows
from umrg.frames import Frame, Frames
from umrg.group import Completion, Group, GroupSamples
from umrg.phantoms import rows


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
        group="r/0/0",
        prompt_ids=(),
        frames=Frames(original=sample.size, model=sample.size),
        completions=tuple(map(completion, texts)),
    )
    for step, above in ((0, 1.0), (10, 0.0)):
        group = Group(run="r", step=step, index=0, sample=sample)
        short, long = (scored.reward.parts for scored in segmenter.score(group, samples))
        assert short["bbox_iou_above"] == long["bbox_iou_above"] == above
        assert (short["answer_length"], long["answer_length"]) == (1, 0)
        assert short["mask_dice"] == long["mask_dice"] > 0.5
