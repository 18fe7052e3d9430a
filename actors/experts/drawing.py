"""Decoding of answers into masks by an expert, the same for training, evaluation and serving."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from actors.config import SegmenterConfig
from actors.experts.protocol import Embedding, Expert, Prompts
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


def prompts_of(
    expert: Expert, embedding: Embedding, answers: Sequence[Answer], *, boxes: bool = True, points: bool = True
) -> Prompts:
    """Prompts of answers, at least one, that are all promptable, about an embedded image. boxes, points: whether they
    are given to the expert (points only to an expert that takes them)."""
    return Prompts(
        embedding=embedding,
        boxes=np.array([answer.box for answer in answers]) if boxes else None,
        points=np.array([answer.points for answer in answers]) if points and expert.takes_points else None,
    )


def reference_prompts(expert: Expert, embedding: Embedding, box: Box, points: PointPair) -> Prompts:
    """The reference box and, if the expert takes them, points as a prompt. Its mask shows what an answer equal to the
    reference would reach."""
    given = np.array([points]) if expert.takes_points else None
    return Prompts(embedding=embedding, boxes=np.array([box]), points=given)


def draw_masks(
    expert: Expert, embedding: Embedding, answers: Sequence[Answer]
) -> Mapping[int, tuple[NDArray[np.bool_], float]]:
    """Mask, bool [H, W], and the expert's own score for each promptable answer about an embedded image, by the answer's
    index. All answers are decoded in one batch."""
    promptable = [i for i, answer in enumerate(answers) if answer.promptable]
    if not promptable:
        return {}
    (decoded,) = expert.decode_all([prompts_of(expert, embedding, [answers[i] for i in promptable])])
    return {i: (mask, float(score)) for i, mask, score in zip(promptable, decoded.masks, decoded.scores, strict=True)}


def reference_mask(expert: Expert, embedding: Embedding, box: Box, points: PointPair) -> NDArray[np.bool_]:
    """The expert's mask, bool [H, W], for `reference_prompts`."""
    mask: NDArray[np.bool_] = expert.decode_all([reference_prompts(expert, embedding, box, points)])[0].masks[0]
    return mask
