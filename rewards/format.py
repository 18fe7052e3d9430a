"""Terms for the form of the completion. `format_think` and `format_seg` search the text for blocks and ignore all text
outside them, as published for `soft` and `hard`; `format_strict` judges the text as a whole."""

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
    are both malformed, 0.6 if one of the two is malformed, 1 if both are well formed."""
    return _FORM_REWARD[case.answer.form]


def format_strict(case: Case) -> float:
    """1 if the whole text is exactly one think block followed by exactly one answer block, apart from white space
    around them, else 0. If the prompt asks for no thinking, exactly one answer block. The content does not matter."""
    answer = case.answer
    return float(answer.strict and (answer.think is not None) == case.think)


def format_json(case: Case) -> float:
    """1 if the answer block is a JSON object with a usable box and points, else 0."""
    return float(case.answer.form is Form.CORRECT)
