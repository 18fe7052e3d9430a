"""A deterministic, endless, shuffled pass over a dataset's rows, with a cursor that can be saved."""

from collections.abc import Iterator, Sized

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, NonNegativeInt


class Cursor(BaseModel):
    """A place in the pass: `position` rows of epoch `epoch` have been given out.

    JSON through `model_dump_json` and `model_validate_json`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: NonNegativeInt
    epoch: NonNegativeInt = 0
    position: NonNegativeInt = 0


def epoch_order(length: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of the rows [length] in one epoch."""
    return np.random.default_rng([seed, epoch]).permutation(length)


def batches(dataset: Sized, batch_size: int, cursor: Cursor) -> Iterator[tuple[list[int], Cursor]]:
    """Row numbers of batch after batch, each with the cursor that continues right after it; never ends.

    Every epoch gives each row once. A batch at an epoch's end is filled up from the next epoch, so none is
    dropped. Raises ValueError for no rows, an empty batch, or a cursor of another, longer dataset.
    """
    length = len(dataset)
    if length < 1 or batch_size < 1:
        raise ValueError(f"batches of {batch_size} from {length} rows: both must be 1 or more")
    if cursor.position > length:
        raise ValueError(f"the cursor is at row {cursor.position} of {length}; it belongs to another dataset")
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
