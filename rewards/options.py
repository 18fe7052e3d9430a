"""The options of a reward term are its keyword-only parameters, which a configuration sets by name.

def bbox_iou_above(case: Case, *, threshold: Annotated[float, Field(ge=0, lt=1)] = 0.5) -> float: ...

reward: {terms: [{name: bbox_iou_above, threshold: 0.7}]}
reward: {terms: [{name: bbox_iou_above, threshold: {start: 0.3, end: 0.7, steps: 200}}]}
"""

import difflib
import inspect
from collections.abc import Mapping
from typing import Annotated, Any, get_args, get_origin

from pydantic import ConfigDict, Field, PositiveInt, TypeAdapter, ValidationError

from rewards.case import Term
from umrg.config import Config
from umrg.mistake import Mistake

Share = Annotated[float, Field(ge=0, le=1)]
"""A float in [0, 1]; true and false pass for 1 and 0."""

Pixels = Annotated[float, Field(gt=0)]
"""A length in pixels of an image whose long side is 840, to which thresholds are scaled; with a published preset, in
pixels of the image as it is."""


class Schedule(Config):
    """A number that changes linearly with the training step, from `start` at step 0 to `end` at step `steps`, and stays
    at `end` from there on."""

    start: float
    end: float
    steps: PositiveInt

    def at(self, step: int) -> float:
        """The number at a step."""
        share = min(1.0, step / self.steps)
        return (1.0 - share) * self.start + share * self.end


Option = bool | int | float | Schedule


def checked_options(name: str, term: Term, given: Mapping[str, object]) -> dict[str, Option]:
    """Check the options given to a term against the types and ranges in its signature.

    A mapping is read as a `Schedule`, both ends of which must be in range. Raises ValueError for an unknown option
    (naming the closest known one), for a value of the wrong type or out of range, and for a function that is no term.
    """
    types = option_types(name, term)
    for option in given:
        if option not in types:
            raise Mistake(f"reward term {name!r} has no option {option!r}; {_nearest(option, list(types))}")
    return {
        option: _checked(f"option {option!r} of reward term {name!r}", types[option], value)
        for option, value in given.items()
    }


def option_types(name: str, term: Term) -> dict[str, Any]:
    """The type of each option: `bool`, `int` or `float`, possibly `Annotated` with a pydantic `Field`.

    Raises ValueError unless the term takes one case and, apart from it, only keywords with such a type and a default.
    """
    try:
        parameters = list(inspect.signature(term, eval_str=True).parameters.values())
    except (NameError, TypeError, ValueError) as error:
        raise Mistake(f"the signature of reward term {name!r} cannot be read ({error})") from error
    if not parameters or parameters[0].kind not in (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
    ):
        raise Mistake(f"reward term {name!r} must take the case as its first parameter")
    for parameter in parameters[1:]:
        if not _is_option(parameter):
            raise Mistake(
                f"parameter {parameter.name!r} of reward term {name!r} is no option; make it keyword-only, a bool, int "
                "or float, with a default"
            )
    return {parameter.name: parameter.annotation for parameter in parameters[1:]}


def at_step(options: Mapping[str, Option], step: int) -> dict[str, bool | int | float]:
    """The values of the options at a training step."""
    return {name: value.at(step) if isinstance(value, Schedule) else value for name, value in options.items()}


def _is_option(parameter: inspect.Parameter) -> bool:
    return (
        parameter.kind is inspect.Parameter.KEYWORD_ONLY
        and parameter.default is not inspect.Parameter.empty
        and _base(parameter.annotation) in (bool, int, float)
    )


def _base(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _checked(what: str, kind: Any, value: object) -> Option:
    adapter: TypeAdapter[Any] = TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False))
    try:
        if not isinstance(value, Mapping):
            checked: Option = adapter.validate_python(value)
            return checked
        if _base(kind) is not float:
            raise Mistake(f"{what} cannot follow a schedule; give one value")
        schedule = Schedule.model_validate(value)
        for end in (schedule.start, schedule.end):
            adapter.validate_python(end)
        return schedule
    except ValidationError as error:
        raise Mistake(f"{what}: {_sentence(error)}") from None


def _sentence(error: ValidationError) -> str:
    return "; ".join(": ".join([*map(str, fault["loc"]), fault["msg"]]) for fault in error.errors())


def _nearest(option: str, known: list[str]) -> str:
    if not known:
        return "it takes none"
    near = difflib.get_close_matches(option, known, n=1, cutoff=0.0)[0]
    return f"did you mean {near!r}? Known are {', '.join(known)}"
