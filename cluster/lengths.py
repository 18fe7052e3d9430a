"""The lengths of all rows, known before the first step: what is too long is named at the start of a run, or left out
of it and counted, and never met in the middle."""

import statistics
from dataclasses import dataclass
from typing import Literal

from rich.console import Console

from cluster.display import progress
from reasoner.prompter import Prompter
from umrg.dataset import Dataset
from umrg.mistake import Mistake
from umrg.sample import Sample

Overlong = Literal["refuse", "leave_out"]


class RowLimit:
    """The most tokens that a row may have, by a run's configuration and by the model's positions.

    most: what the configuration's `key` allows. answers: the reference answer counts too, as in supervised training.
    """

    def __init__(self, prompter: Prompter, most: int, key: str, *, answers: bool = False) -> None:
        self._prompter, self._answers = prompter, answers
        self._most = min(most, prompter.positions)
        self._bound, self._remedy = f"{key} allows {most}", "raise it, lower max_pixels or shorten the question"
        if prompter.positions <= most:
            self._bound = f"the model has {prompter.positions} positions"
            self._remedy = "lower max_pixels or shorten the question"
        self._texts: dict[str, int] = {}

    def measure(self, sample: Sample) -> tuple[int, str | None]:
        """A row's tokens and, if it is too long, why and what to change, phrased to follow the row's name. The tokens
        are 0 where the processor refuses the image's aspect ratio."""
        try:
            image = self._prompter.image_tokens(sample.size)
        except ValueError as error:
            return 0, f"cannot be resized: {error}"
        tokens = image + self._text(sample)
        if tokens <= self._most:
            return tokens, None
        whole = " with its reference answer" if self._answers else ""
        return tokens, f"has {tokens} tokens{whole}, {image} of them for the image, and {self._bound}; {self._remedy}"

    def _text(self, sample: Sample) -> int:
        """Tokens besides the image's. A query that occurs again is counted once."""
        if sample.query not in self._texts:
            whole = self._prompter.prompt_tokens(sample.query, sample.size)
            self._texts[sample.query] = whole - self._prompter.image_tokens(sample.size)
        answer = self._prompter.completion_ids(self._prompter.reference_answer(sample)) if self._answers else ()
        return self._texts[sample.query] + len(answer)


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
        return f"{self.rows:,} rows of {self.shortest:,} to {self.longest:,} tokens, median {self.median:,}{left_out}"


def fitting(
    rows: Dataset, limit: RowLimit, overlong: Overlong, console: Console | None = None
) -> tuple[Dataset, Lengths]:
    """The rows within the limit, in their order, and their lengths. console: on which to show the progress.

    Every row is read and checked on the way, without its mask. Raises ValueError that names the first row that is too
    long, where such rows are not to be left out or no other is there; and for a row that cannot be read.
    """
    kept: list[int] = []
    lengths: list[int] = []
    first = ""
    with progress("measuring prompts", len(rows), console=console) as show:
        for i, sample in enumerate(rows.unmasked()):
            tokens, fault = limit.measure(sample)
            if fault is None:
                kept.append(i)
                lengths.append(tokens)
            else:
                first = first or f"{sample.name} {fault}"
            show(i + 1)
    left_out = len(rows) - len(kept)
    if left_out and (overlong == "refuse" or not kept):
        others = f", or leave out the {left_out} such rows of {len(rows)} with data.overlong=leave_out" if kept else ""
        raise Mistake(first + (others or f"; none of the {len(rows)} rows can be used as it is"))
    found = Lengths(
        rows=len(kept),
        shortest=min(lengths),
        median=round(statistics.median(lengths)),
        longest=max(lengths),
        left_out=left_out,
    )
    return (rows.only(kept) if left_out else rows), found
