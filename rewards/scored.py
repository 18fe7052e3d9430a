"""A scored answer: what the segmenter makes of one completion."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from rewards.scoring import Reward
from umrg.answers import Answer


@dataclass(frozen=True, kw_only=True)
class ScoredAnswer:
    """reward: total and parts. answer: parsed, in original pixels. failure: why it is malformed; None where it is not.

    metrics: by name, each in [0, 1] but for pdice_published: well_formed, iou (boxes), pdice, pdice_published, dice
    and mask_iou (the expert's mask); all 0 for a malformed answer.
    mask: the expert's mask as COCO run-length encoding, `{"size": [H, W], "counts": text}`; None where the answer
    had no usable box and points. expert_score: the expert's own prediction of the mask's IoU.
    """

    reward: Reward
    answer: Answer
    failure: str | None
    metrics: Mapping[str, float]
    mask: Mapping[str, object] | None = field(repr=False)
    expert_score: float | None
