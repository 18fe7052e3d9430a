"""The segmenter actor: a frozen expert that turns answers into masks, and masks into rewards."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from actors.config import SegmenterConfig
from actors.experts.drawing import draw_masks, load_frozen, reference_mask
from actors.experts.protocol import Embedding, Expert
from actors.gpus import ALONE, Lodging, Place, this_place
from actors.threads import share_cores
from rewards.answer_metrics import answer_metrics
from rewards.case import Reference
from rewards.scored import ScoredAnswer, ScoredGroup, ScoringDepth
from rewards.scoring import Scorer
from umrg.answers import Answer
from umrg.foreign_answers import parse_lenient
from umrg.frames import Frame
from umrg.group import Completion, Group, GroupSamples
from umrg.masks import encode_rle
from umrg.metrics import mask_dice


class Segmenter:
    """The reward worker: it runs the expert (a frozen SAM-like segmentation model) and the reward on whole groups. The
    image is embedded once, and all promptable answers are decoded in one batch. `start` must have
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

    def place(self) -> Place:
        """Where it is; may be called before `start`."""
        return this_place({"expert": self._name, "segmenter.checkpoint": self._config.checkpoint})

    def start(self, lodging: Lodging = ALONE) -> str:
        """Load the expert; `digest`. Raises ValueError where there is no expert by that name, or its weights do not
        fit."""
        share_cores(self._config.threads, lodging.sharers)
        self._loaded = load_frozen(lodging.local(self._name), self._config.at(lodging.local))
        return self.digest()

    def digest(self) -> str:
        """Digest of the expert's weights, which never change."""
        return self._expert.digest()

    def score(
        self, group: Group, masks: tuple[bytes, ...], samples: GroupSamples, depth: ScoringDepth = "masks"
    ) -> ScoredGroup:
        """Masks, metrics and rewards of a group's completions. masks: the row's reference masks, as its `mask_bytes`.
        Raises ValueError where the reference cannot be read."""
        parsed = (self._read(completion.text) for completion in samples.completions)
        answers = [answer.to_original(samples.frames, self._frame) for answer in parsed]
        with_masks = depth != "reward" or self._scorer.uses_mask
        sample = replace(group.sample, mask_bytes=masks)
        reference = Reference.of_sample(sample, with_mask=with_masks)
        drawn: Mapping[int, tuple[NDArray[np.bool_], float]] = {}
        ablations: list[dict[str, float]] = [{} for _ in answers]
        if with_masks:
            embedding = self._expert.embed(sample.image())
            drawn = draw_masks(self._expert, embedding, answers)
            if depth == "ablations":
                ablations = ablation_metrics(self._expert, embedding, answers, reference)
        return ScoredGroup(
            group=group.without_files(),
            samples=samples,
            answers=tuple(
                self._scored(answer, completion, reference, drawn.get(i), ablations[i], step=group.step)
                for i, (answer, completion) in enumerate(zip(answers, samples.completions, strict=True))
            ),
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
        drawn: tuple[NDArray[np.bool_], float] | None,
        ablations: Mapping[str, float],
        *,
        step: int,
    ) -> ScoredAnswer:
        mask, score = drawn or (None, None)
        return ScoredAnswer(
            reward=self._scorer.score(answer, reference, mask, step=step),
            answer=answer,
            failure=answer.failure(think=self._think, finished=completion.finished),
            metrics={**answer_metrics(answer, mask, reference, think=self._think), **ablations},
            mask=None if mask is None else encode_rle(mask),
            expert_score=score,
        )


def ablation_metrics(
    expert: Expert, embedding: Embedding, answers: Sequence[Answer], reference: Reference
) -> list[dict[str, float]]:
    """Of each answer the Dice of the mask from its box alone and, if the expert takes points, from them alone, 0 where
    it is malformed; and the Dice that the expert reaches with the reference: the ceiling of any answer."""
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
