"""Decoding of answers into masks by an expert, the same for training, evaluation and serving."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from actors.config import SegmenterConfig
from actors.experts.protocol import Embedding, Expert
from actors.experts.registry import load_expert
from umrg.answers import Answer
from umrg.frames import Box, PointPair


def load_frozen(expert: str, config: SegmenterConfig) -> Expert:
    """Load the expert that a configuration selects."""
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
    """Mask, bool [H, W], and the expert's own score for each promptable answer about an embedded image, by the answer's
    index. All answers are decoded in one batch. boxes, points: whether they are given to the expert (points only to an
    expert that takes them)."""
    promptable = [i for i, answer in enumerate(answers) if answer.promptable]
    if not promptable:
        return {}
    decoded = expert.decode(
        embedding,
        boxes=np.array([answers[i].box for i in promptable]) if boxes else None,
        points=np.array([answers[i].points for i in promptable]) if points and expert.takes_points else None,
    )
    return {i: (mask, float(score)) for i, mask, score in zip(promptable, decoded.masks, decoded.scores, strict=True)}


def reference_mask(expert: Expert, embedding: Embedding, box: Box, points: PointPair) -> NDArray[np.bool_]:
    """The expert's mask, bool [H, W], for the reference box and, if the expert takes them, points. It shows what an
    answer equal to the reference would reach."""
    given = np.array([points]) if expert.takes_points else None
    mask: NDArray[np.bool_] = expert.decode(embedding, boxes=np.array([box]), points=given).masks[0]
    return mask
