"""Options of terms: read from signatures, set in a configuration, scheduled over steps."""

from typing import Annotated

import pytest
from pydantic import Field

from rewards.case import Case, Reference
from rewards.config import RewardConfig
from rewards.options import Schedule, checked_options
from rewards.presets import TERMS
from rewards.scoring import Scorer
from umrg.answers import parse_answer
from umrg.frames import Size

REFERENCE = Reference(box=(0, 0, 100, 100), points=((20, 20), (80, 80)), size=Size(840, 840))
# IoU 3/5, as its box is 60 of the reference's 100 px wide; one reference point is outside.
ANSWER = parse_answer('<answer>{"bbox": [0, 0, 60, 100], "points_1": [20, 20], "points_2": [50, 80]}</answer>')


def scorer(**term: object) -> Scorer:
    return RewardConfig.model_validate({"terms": [term]}).scorer(think=True)


def value(step: int = 0, **term: object) -> float:
    return scorer(**term).score(ANSWER, REFERENCE, step=step).total


def test_smoothing_and_damping_can_be_switched_off() -> None:
    assert value(name="bbox_iou", smooth=False, damped=False) == 0.6
    assert value(name="bbox_iou", smooth=False) == pytest.approx(0.6 * (0.7 + 0.3 * 0.75))
    assert value(name="bbox_iou") == value(name="bbox_iou", smooth=True, damped=1.0)
    raw, published = value(name="bbox_iou", smooth=0, damped=0), value(name="bbox_iou", damped=0)
    assert value(name="bbox_iou", smooth=0.25, damped=0) == pytest.approx(0.75 * raw + 0.25 * published, abs=1e-4)


def test_a_schedule_runs_linearly_and_then_stays() -> None:
    schedule = Schedule(start=0.3, end=0.7, steps=200)
    assert [schedule.at(step) for step in (0, 50, 200, 10_000)] == pytest.approx([0.3, 0.4, 0.7, 0.7])
    assert (schedule.at(0), schedule.at(200)) == (0.3, 0.7)


def test_a_threshold_tightens_with_the_step() -> None:
    tightening = scorer(name="bbox_iou_above", threshold={"start": 0.3, "end": 0.7, "steps": 200})
    # An IoU of 0.6 passes until the threshold has come to 0.6, at step 150.
    assert [tightening.score(ANSWER, REFERENCE, step=step).total for step in (0, 149, 151, 500)] == [1, 1, 0, 0]


def test_smoothing_fades_with_the_step() -> None:
    fading = {"name": "bbox_iou", "smooth": {"start": 1, "end": 0, "steps": 10}, "damped": False}
    assert value(step=0, **fading) == value(name="bbox_iou", damped=False)
    assert value(step=0, **fading) > value(step=5, **fading) > value(step=10, **fading) == 0.6


@pytest.mark.parametrize(
    ("term", "said"),
    [
        ({"name": "bbox_iou", "smoth": True}, "'bbox_iou' has no option 'smoth'; did you mean 'smooth'"),
        ({"name": "format_seg", "smooth": True}, "'format_seg' has no option 'smooth'; it takes none"),
        ({"name": "bbox_iou_above", "threshold": 1}, "option 'threshold' of .*: Input should be less than 1"),
        ({"name": "bbox_iou_above", "threshold": float("nan")}, "option 'threshold' of .*finite"),
        ({"name": "boundary", "tolerance": 0}, "option 'tolerance' of .*: Input should be greater than 0"),
        ({"name": "bbox_iou", "smooth": 2}, "option 'smooth' of .*: Input should be less than or equal to 1"),
        ({"name": "bbox_iou", "smooth": "very"}, "option 'smooth' of .*valid number"),
        ({"name": "repetition", "n": 0}, "option 'n' of .*: Input should be greater than 0"),
        (
            {"name": "repetition", "n": {"start": 2, "end": 4, "steps": 9}},
            "option 'n' of reward term 'repetition' cannot follow a schedule",
        ),
        (
            {"name": "bbox_iou_above", "threshold": {"start": 0.3, "end": 1.7, "steps": 200}},
            "option 'threshold' of .*: Input should be less than 1",
        ),
        ({"name": "bbox_iou_above", "threshold": {"start": 0.3, "end": 0.7}}, "option 'threshold' of .*: steps: Field"),
        ({"name": "bbox_iou", "weight": -1}, "weight"),
    ],
)
def test_what_does_not_fit_is_said_in_a_sentence(term: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        scorer(**term)


def test_a_term_is_given_once() -> None:
    with pytest.raises(ValueError, match="names 'mask_dice' more than once"):
        RewardConfig.model_validate({"terms": [{"name": "mask_dice"}, {"name": "mask_dice", "weight": 2}]})


def test_a_configuration_is_read_again_as_it_was_written() -> None:
    config = RewardConfig.model_validate(
        {"terms": [{"name": "bbox_iou_above", "threshold": {"start": 0.3, "end": 0.7, "steps": 200}}]}
    )
    assert RewardConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize("name", TERMS)
def test_every_option_may_be_given_its_default(name: str) -> None:
    defaults = TERMS[name].__kwdefaults__ or {}
    assert checked_options(name, TERMS[name], defaults) == defaults


def no_case() -> float:
    return 1.0


def not_keyword(case: Case, tolerance: float = 1.0) -> float:
    return 1.0


def no_default(case: Case, *, tolerance: float) -> float:
    return 1.0


def no_number(case: Case, *, colour: str = "red") -> float:
    return 1.0


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (no_case, "must take the case as its first parameter"),
        (not_keyword, "parameter 'tolerance' of reward term 't' is no option"),
        (no_default, "parameter 'tolerance' of reward term 't' is no option"),
        (no_number, "parameter 'colour' of reward term 't' is no option"),
    ],
)
def test_a_term_takes_a_case_and_then_options(function, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        checked_options("t", function, {})


def test_ranges_stand_in_the_signature() -> None:
    def term(case: Case, *, share: Annotated[float, Field(ge=0, le=1)] = 0.5, strict: bool = False) -> float:
        return share

    assert checked_options("t", term, {"share": 1, "strict": True}) == {"share": 1.0, "strict": True}
    with pytest.raises(ValueError, match="option 'share' of reward term 't'"):
        checked_options("t", term, {"share": 1.5})
