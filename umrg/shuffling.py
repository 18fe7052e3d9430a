"""Deterministic, endless, shuffled iteration over a dataset's rows, resumable from a cursor."""

from collections.abc import Iterator, Sized

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, NonNegativeInt

from umrg.mistake import Mistake


class Cursor(BaseModel):
    """A position in the shuffled iteration."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: NonNegativeInt
    """The seed that determines the order of every epoch."""
    epoch: NonNegativeInt = 0
    """The current epoch, from 0."""
    position: NonNegativeInt = 0
    """The number of rows of the current epoch that were already yielded."""


def epoch_order(length: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of row numbers [length] in one epoch."""
    # Seeding with the epoch as well gives each epoch its own order without replaying earlier ones on resume.
    return np.random.default_rng([seed, epoch]).permutation(length)


def batches(dataset: Sized, batch_size: int, cursor: Cursor) -> Iterator[tuple[list[int], Cursor]]:
    """Yield endless batches of row numbers, each with the cursor that resumes right after it.

    Every epoch yields each row once. The last batch of an epoch is filled up from the next epoch, so no row is dropped.
    Raises ValueError if the dataset or the batch is empty, or if the cursor lies beyond the end of the dataset.
    """
    length = len(dataset)
    if length < 1 or batch_size < 1:
        raise Mistake(f"batches of {batch_size} from {length} rows: both must be 1 or more")
    if cursor.position > length:
        raise Mistake(f"the cursor is at row {cursor.position} of {length}; it belongs to another dataset")
    return _batches(length, batch_size, cursor)


def _batches(length: int, batch_size: int, cursor: Cursor) -> Iterator[tuple[list[int], Cursor]]:
    seed, epoch, position = cursor.seed, cursor.epoch, cursor.position
    order = epoch_order(length, seed, epoch)
    while True:
        rows: list[int] = []
        while len(rows) < batch_size:
            if position == length:
                epoch, position = epoch + 1, 0
                order = epoch_order(length, seed, epoch)
            taken = order[position : position + batch_size - len(rows)]
            rows += taken.tolist()
            position += len(taken)
        yield rows, Cursor(seed=seed, epoch=epoch, position=position)
