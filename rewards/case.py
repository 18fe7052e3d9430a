"""What a reward term is and what it is given: one answer together with its reference."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from umrg.answers import Answer
from umrg.frames import Box, PointPair, Size
from umrg.metrics import Overlap
from umrg.mistake import Mistake
from umrg.sample import Sample


@dataclass(frozen=True, kw_only=True, eq=False)
class Reference:
    """What an answer is compared with, in original pixels. All answers of a group share one reference."""

    box: Box
    """XYXY with inclusive maximum."""
    points: PointPair
    """The two key points, XY."""
    size: Size
    """Size of the image."""
    mask: NDArray[np.bool_] | None = field(default=None, repr=False)
    """bool [H, W]; None where no term looks at it."""
    name: str = ""
    """The sample's name in error messages; "" where it has none."""

    @classmethod
    def of_sample(cls, sample: Sample, *, with_mask: bool) -> Self:
        """The reference of a dataset row. Raises ValueError if the mask is wanted and cannot be read."""
        mask = sample.mask() if with_mask else None
        return cls(box=sample.box, points=sample.points, size=sample.size, mask=mask, name=sample.name)

    @property
    def target(self) -> NDArray[np.bool_]:
        """The mask, bool [H, W]. Raises ValueError if there is none."""
        if self.mask is None:
            raise Mistake("a mask term needs reference masks; use data with masks, or no mask terms")
        return self.mask


@dataclass(frozen=True, kw_only=True, eq=False)
class Drawn:
    """The expert's mask for an answer, wherever it lies: it is brought here once a term looks at its pixels."""

    fetch: Callable[[], NDArray[np.bool_]]
    """Brings the mask here, bool [H, W]."""
    compare: Callable[[], Overlap]
    """Counts pixels of it and of the reference mask. Raises ValueError if they differ in size."""

    @classmethod
    def of(cls, mask: NDArray[np.bool_], reference: "Reference") -> Self:
        """A mask that is here already."""
        return cls(fetch=lambda: mask, compare=lambda: Overlap.of(mask, reference.target))

    @cached_property
    def mask(self) -> NDArray[np.bool_]:
        """bool [H, W]."""
        return self.fetch()

    @cached_property
    def overlap(self) -> Overlap:
        """With the reference mask."""
        return self.compare()


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """One answer to be scored."""

    answer: Answer
    """What the completion says, in original pixels, and its text."""
    reference: Reference
    """What the answer is compared with."""
    drawn: Drawn | None = field(default=None, repr=False)
    """The expert's mask for this answer; None where none was decoded."""
    pixel: float = 1.0
    """Length, in original pixels, of one pixel of the thresholds."""
    think: bool = True
    """Whether the prompt asked for reasoning."""

    @property
    def mask(self) -> NDArray[np.bool_] | None:
        """The expert's mask for this answer, bool [H, W]; None where none was decoded."""
        return None if self.drawn is None else self.drawn.mask


Term = Callable[..., float]
"""A reward term, `term(case, *, option=default, …)`: maps a case to a finite value in [0, 1], whatever the answer.
Its keyword-only parameters are its options (`rewards.options`)."""

_T = TypeVar("_T", bound=Term)


def looks_at_masks(term: _T) -> _T:
    """Decorator of a term that uses `case.mask` or the reference's mask. A reward without such a term is computed
    without decoding any mask."""
    term.__dict__["looks_at_masks"] = True
    return term
