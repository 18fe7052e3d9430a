"""The lengths of all prompts, known before the first step: what is too long is named at the start of a run, or left out
of it and counted, and never met in the middle."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from cluster.display import progress
from reasoner.prompter import Prompter
from umrg.dataset import Dataset
from umrg.sample import Sample

Overlong = Literal["refuse", "leave_out"]


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Of the rows of a run."""

    rows: int
    """That are kept."""
    shortest: int
    """Tokens of the shortest prompt, those of the image included; in supervised runs with the reference answer."""
    median: int
    longest: int
    left_out: int = 0
    """Rows that were too long."""

    def __str__(self) -> str:
        left_out = f"; {self.left_out:,} longer ones left out" if self.left_out else ""
        return f"{self.rows:,} rows of {self.shortest:,} to {self.longest:,} tokens{left_out}"


def fitting(
    rows: Dataset, prompter: Prompter, *, most: int, overlong: Overlong, key: str, answers: bool = False
) -> tuple[Dataset, Lengths]:
    """The rows of at most `most` tokens, and the lengths of their prompts.

    key: of the configuration that sets `most`. answers: reference answers count too. Raises ValueError that names the
    first row that is too long, where it is not to be left out, or if no row is left; and for rows that cannot be read.
    """
    measure = _measure(prompter, answers)
    kept, lengths, refused = [], [], 0
    first = ""
    with progress("measuring prompts", len(rows)) as show:
        for i in range(len(rows)):
            sample = rows[i]
            tokens = measure(sample)
            if tokens <= most:
                kept.append(i)
                lengths.append(tokens)
            else:
                refused += 1
                image = prompter.image_tokens(sample.size)
                first = first or f"{sample.name} has {tokens} tokens, {image} of them for the image"
            show(i + 1)
    if refused and (overlong == "refuse" or not kept):
        others = f", and {refused - 1} more of {len(rows)} rows are too long" if refused > 1 else ""
        raise ValueError(
            f"{first}, and {key} allows {most}{others}; raise it, lower max_pixels, or set data.overlong=leave_out"
        )
    found = Lengths(
        rows=len(kept),
        shortest=min(lengths),
        median=int(statistics.median(lengths)),
        longest=max(lengths),
        left_out=refused,
    )
    return (rows.only(kept) if refused else rows), found


def _measure(prompter: Prompter, answers: bool) -> Callable[[Sample], int]:
    """Counts a row's tokens. Texts of queries that occur again are counted once."""
    texts: dict[str, int] = {}

    def measure(sample: Sample) -> int:
        image = prompter.image_tokens(sample.size)
        if sample.query not in texts:
            texts[sample.query] = prompter.prompt_tokens(sample.query, sample.size) - image
        answer = len(prompter.completion_ids(prompter.reference_answer(sample))) if answers else 0
        return texts[sample.query] + image + answer

    return measure
