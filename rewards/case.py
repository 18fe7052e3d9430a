"""What a reward term is, and what it sees: one answer beside its reference."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

import numpy as np
from numpy.typing import NDArray

from umrg.answers import Answer
from umrg.frames import Box, PointPair, Size
from umrg.sample import Sample


@dataclass(frozen=True, kw_only=True, eq=False)
class Reference:
    """What an answer is measured against, in original pixels. One reference serves a whole group.

    box: XYXY, inclusive maximum. points: the two key points, XY. size: extent of the image.
    mask: bool [H, W], or None where no term looks at it.
    name: how error messages name the sample, "" where it has no name.
    """

    box: Box
    points: PointPair
    size: Size
    mask: NDArray[np.bool_] | None = field(default=None, repr=False)
    name: str = ""

    @classmethod
    def of_sample(cls, sample: Sample, *, with_mask: bool) -> Self:
        """The reference of a dataset row. Raises ValueError where its mask is wanted and cannot be read."""
        mask = sample.mask() if with_mask else None
        return cls(box=sample.box, points=sample.points, size=sample.size, mask=mask, name=sample.name)


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """One answer to be scored.

    answer: what the completion says, in original pixels, and its text.
    reference: what it is measured against.
    mask: the expert's mask for this answer, bool [H, W]; None where none was asked for.
    pixel: length, in original pixels, that thresholds call one pixel.
    think: the prompt asked for reasoning.
    """

    answer: Answer
    reference: Reference
    mask: NDArray[np.bool_] | None = field(default=None, repr=False)
    pixel: float = 1.0
    think: bool = True


Term = Callable[..., float]
"""A reward term, `term(case, *, option=default …)`: a case to a value in [0, 1], finite for any answer whatever.
Its keyword-only parameters are its options (`rewards.options`)."""
