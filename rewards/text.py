"""Terms for the text of the completion, against overlong and repetitive reasoning."""

from typing import Annotated

from pydantic import Field, PositiveInt

from rewards.case import Case

Characters = Annotated[float, Field(gt=0)]


def answer_length(case: Case, *, limit: Characters = 4000.0, fade: Characters = 2000.0) -> float:
    """1 for a completion of at most `limit` characters, then falling linearly to 0 at `limit + fade`.

    The soft overlong punishment of DAPO (Yu et al., 2025, arXiv:2503.14476), shifted from [-1, 0] to [0, 1] and counted
    in characters, so that the reward does not depend on a tokenizer.
    """
    return max(0.0, min(1.0, (limit + fade - len(case.answer.text)) / fade))


def repetition(case: Case, *, n: PositiveInt = 3) -> float:
    """Fraction of distinct n-grams among all n-grams of the completion's words, which are split at white space; 1 if it
    has fewer than n words.

    The distinct-n of Li et al. (2016, arXiv:1510.03055). A loop over a few words comes close to 0.
    """
    words = case.answer.text.split()
    count = len(words) - n + 1
    if count < 1:
        return 1.0
    return len(set(zip(*(words[i : i + count] for i in range(n)), strict=True))) / count
