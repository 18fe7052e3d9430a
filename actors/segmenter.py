"""The segmenter actor: a frozen expert that turns answers into masks, and masks into rewards."""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from actors.config import SegmenterConfig
from actors.experts.protocol import Embedding, Expert
from actors.experts.registry import load_expert
from actors.threads import share_cores
from rewards.case import Reference
from rewards.mask import promptable
from rewards.scored import ScoredAnswer
from rewards.scoring import Scorer
from umrg.answers import Answer
from umrg.foreign_answers import parse_lenient
from umrg.frames import Box, Frame, PointPair
from umrg.group import Completion, Group, GroupSamples
from umrg.masks import encode_rle
from umrg.metrics import box_iou, mask_dice, mask_iou, pdice, pdice_published

METRICS = ("well_formed", "iou", "pdice", "pdice_published", "dice", "mask_iou")
THOROUGH = ("dice_box", "dice_points", "oracle_dice")


class Segmenter:
    """Scores groups: the image is embedded once, all usable answers are decoded in one batch. `start` must have
    returned before anything else is called.

    frame: the frame that the reasoner answers in. think: whether an answer must reason to be well formed. lenient:
    whether foreign forms of answers are taken too, where otherwise they are read as the scorer reads them.
    """

    def __init__(
        self,
        expert: str,
        config: SegmenterConfig,
        scorer: Scorer,
        *,
        frame: Frame,
        think: bool,
        lenient: bool = False,
    ) -> None:
        self._name, self._config = expert, config
        self._scorer, self._frame, self._think = scorer, frame, think
        self._read = partial(parse_lenient, frame=frame) if lenient else scorer.read
        self._loaded: Expert | None = None

    def start(self) -> str:
        """Load the expert; `digest`. Raises ValueError where there is none by that name, or its weights do not fit."""
        share_cores(self._config.threads, self._config.actors)
        self._loaded = load_frozen(self._name, self._config)
        return self.digest()

    def digest(self) -> str:
        """Digest of the expert's weights, which never change."""
        return self._expert.digest()

    def score(self, group: Group, samples: GroupSamples, *, thorough: bool = False) -> tuple[ScoredAnswer, ...]:
        """Masks, metrics and rewards of a group's answers; with `thorough`, the metrics of `THOROUGH` too. Raises
        ValueError where the reference cannot be read."""
        parsed = (self._read(completion.text) for completion in samples.completions)
        answers = [answer.to_original(samples.frames, self._frame) for answer in parsed]
        reference = Reference.of_sample(group.sample, with_mask=True)
        embedding = self._expert.embed(group.sample.image())
        drawn = draw_masks(self._expert, embedding, answers)
        more = thorough_metrics(self._expert, embedding, answers, reference) if thorough else [{}] * len(answers)
        return tuple(
            self._scored(answer, completion, reference, drawn.get(i, (None, None)), more[i], step=group.step)
            for i, (answer, completion) in enumerate(zip(answers, samples.completions, strict=True))
        )

    @property
    def _expert(self) -> Expert:
        assert self._loaded is not None, "the segmenter was not started"
        return self._loaded

    def _scored(
        self,
        answer: Answer,
        completion: Completion,
        reference: Reference,
        drawn: tuple[NDArray[np.bool_] | None, float | None],
        more: Mapping[str, float],
        *,
        step: int,
    ) -> ScoredAnswer:
        mask, score = drawn
        return ScoredAnswer(
            reward=self._scorer.score(answer, reference, mask, step=step),
            answer=answer,
            failure=answer.failure(think=self._think, finished=completion.finished),
            metrics={**metrics_of(answer, mask, reference, think=self._think), **more},
            mask=None if mask is None else encode_rle(mask),
            expert_score=score,
        )


def load_frozen(expert: str, config: SegmenterConfig) -> Expert:
    """The expert that a configuration asks for."""
    return load_expert(
        expert,
        checkpoint=config.checkpoint,
        device=config.where,
        dtype=config.dtype,
        preprocess=config.preprocess,
    )


def draw_masks(
    expert: Expert, embedding: Embedding, answers: Sequence[Answer], *, boxes: bool = True, points: bool = True
) -> Mapping[int, tuple[NDArray[np.bool_], float]]:
    """Mask bool [H, W] and the expert's own score of each usable answer about an embedded image, by its index; all in
    one batch. boxes, points: whether the expert is given the one and the other, if it takes both."""
    usable = [i for i, answer in enumerate(answers) if promptable(answer)]
    if not usable:
        return {}
    decoded = expert.decode(
        embedding,
        boxes=np.array([answers[i].box for i in usable]) if boxes else None,
        points=np.array([answers[i].points for i in usable]) if points and expert.takes_points else None,
    )
    return {i: (mask, float(score)) for i, mask, score in zip(usable, decoded.masks, decoded.scores, strict=True)}


def thorough_metrics(
    expert: Expert, embedding: Embedding, answers: Sequence[Answer], reference: Reference
) -> list[dict[str, float]]:
    """Of each answer the Dice of the mask from its box alone and, if the expert takes points, from them alone, 0 where
    it is malformed; and the Dice that the expert reaches with the reference: the ceiling of any answer of the kind."""
    truth = reference.mask
    assert truth is not None
    ceiling = mask_dice(reference_mask(expert, embedding, reference.box, reference.points), truth)
    drawn = {"dice_box": draw_masks(expert, embedding, answers, points=False)}
    if expert.takes_points:
        drawn["dice_points"] = draw_masks(expert, embedding, answers, boxes=False)
    return [
        {
            **{name: mask_dice(masks[i][0], truth) if i in masks else 0.0 for name, masks in drawn.items()},
            "oracle_dice": ceiling,
        }
        for i in range(len(answers))
    ]


def reference_mask(expert: Expert, embedding: Embedding, box: Box, points: PointPair) -> NDArray[np.bool_]:
    """The expert's mask, bool [H, W], from a reference box and, if it takes them, points: no answer can do better."""
    given = np.array([points]) if expert.takes_points else None
    mask: NDArray[np.bool_] = expert.decode(embedding, boxes=np.array([box]), points=given).masks[0]
    return mask


def metrics_of(
    answer: Answer, mask: NDArray[np.bool_] | None, reference: Reference, *, think: bool
) -> dict[str, float]:
    """The metrics named in `METRICS` of one answer, in original pixels like the reference and the mask."""
    if mask is None or answer.box is None or answer.points is None or not answer.well_formed(think=think):
        return dict.fromkeys(METRICS, 0.0)
    assert reference.mask is not None
    return {
        "well_formed": 1.0,
        "iou": box_iou(answer.box, reference.box),
        "pdice": pdice(answer.points, reference.points),
        "pdice_published": pdice_published(answer.points, reference.points),
        "dice": mask_dice(mask, reference.mask),
        "mask_iou": mask_iou(mask, reference.mask),
    }
