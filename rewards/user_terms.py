"""Users' own reward terms, named by import path: `my_pkg.my_module:my_term`."""

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real

import numpy as np

from rewards.case import Case, Drawn, Reference, Term
from rewards.options import Option, at_step
from umrg.answers import Answer, format_answer, parse_answer
from umrg.frames import Size
from umrg.mistake import Mistake


class RewardTermError(RuntimeError):
    """A user's term raised or returned something else than a number in [0, 1]: a fault of the grader, never of the
    answer."""


@dataclass(frozen=True)
class UserTerm:
    """A user's own term. It is pickled as its import path, so that each actor imports the function itself."""

    path: str
    function: Term

    def __call__(self, case: Case, **options: float) -> float:
        """The term's value. Raises RewardTermError, which names the term and the sample."""
        try:
            value = self.function(case, **options)
        except Exception as error:
            raise RewardTermError(f"{self._about(case)}: {type(error).__name__}: {error}") from error
        # Without `Real`, whatever can be compared, such as a tensor of one element, would pass for a number.
        if not (isinstance(value, Real) and 0 <= value <= 1):
            raise RewardTermError(f"{self._about(case)}: it gave {value!r}, not a finite number in [0, 1]")
        return float(value)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.function, eval_str=True)

    def __reduce__(self) -> tuple[Callable[[str], "UserTerm"], tuple[str]]:
        return load_user_term, (self.path,)

    def try_out(self, options: Mapping[str, Option]) -> None:
        """Score a perfect and an empty answer. Raises ValueError if either value is not a number in [0, 1]."""
        for case in _trial_cases():
            try:
                self(case, **at_step(options, 0))
            except RewardTermError as error:
                raise Mistake(f"{error}; a term must score any answer whatever") from error

    def _about(self, case: Case) -> str:
        return (
            f"reward term {self.path!r} failed on {case.reference.name or 'a case'}, answer {case.answer.text[:200]!r}"
        )


def load_user_term(path: str) -> UserTerm:
    """Import a term from an installed package or the working directory.

    Raises ValueError if there is no such module or no such function in it.
    """
    module, _, name = path.partition(":")
    # Installed commands such as `medreasoner` do not have the working directory on the path, unlike Ray's actors and
    # `python -m`.
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        function = getattr(importlib.import_module(module), name, None)
    except (ImportError, SyntaxError, TypeError, ValueError) as error:
        raise Mistake(
            f"reward term {path!r} cannot be imported ({error}); write my_pkg.my_module:my_term, and start where "
            "my_pkg lies, or install it"
        ) from error
    if not callable(function):
        raise Mistake(f"reward term {path!r} cannot be called; {module} must have a function {name!r}")
    return UserTerm(path, function)


def _trial_cases() -> list[Case]:
    mask = np.zeros((64, 64), dtype=np.bool_)
    mask[16:49, 8:41] = True
    reference = Reference(
        box=(8, 16, 40, 48), points=((16, 24), (32, 40)), size=Size(64, 64), mask=mask, name="the trial sample"
    )
    drawn = Drawn.of(mask, reference)
    text = format_answer(box=reference.box, points=reference.points, think="The kidney filters blood.")
    answers: list[tuple[Answer, bool]] = [(parse_answer(text), True), (parse_answer(""), False)]
    return [
        Case(answer=answer, reference=reference, drawn=drawn if well_formed else None, pixel=64 / 840)
        for answer, well_formed in answers
    ]
