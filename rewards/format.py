"""Is the completion well formed? `format_think` and `format_seg` search the text for blocks, and text outside them
costs nothing, as published for `soft` and `hard`; `format_strict` reads the text as a whole."""

from rewards.case import Case
from umrg.answers import Form

_FORM_REWARD = {
    Form.NO_BLOCK: 0.0,
    Form.NOT_AN_OBJECT: 0.2,
    Form.KEYS_MISSING: 0.4,
    Form.BOTH_MALFORMED: 0.4,
    Form.ONE_MALFORMED: 0.6,
    Form.CORRECT: 1.0,
}


def format_think(case: Case) -> float:
    """0 without a think block, 0.2 for an empty one, 1 for one with text."""
    think = case.answer.think
    if think is None:
        return 0.0
    return 1.0 if think else 0.2


def format_seg(case: Case) -> float:
    """0 without an answer block, 0.2 if it is not a JSON object, 0.4 if keys are missing or box and points
    are both malformed, 0.6 if one of the two is, 1 if it is correct."""
    return _FORM_REWARD[case.answer.form]


def format_strict(case: Case) -> float:
    """1 if the whole text is exactly one think block and then exactly one answer block, white space around them
    aside, else 0. Where the prompt asks for no thinking, one answer block alone. What they hold does not matter."""
    answer = case.answer
    return float(answer.strict and (answer.think is not None) == case.think)


def format_json(case: Case) -> float:
    """1 if the answer block is a JSON object with a usable box and points, else 0."""
    return float(case.answer.form is Form.CORRECT)
