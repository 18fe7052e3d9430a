"""Embeds the images of a dataset ahead of a run, into the folder in which segmenters look for them, and measures from
when on that pays."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from actors.experts.protocol import Embedding, Expert
from actors.experts.store import EmbeddingStore, rounded
from cluster.display import progress
from umrg.dataset import Dataset

GIB = 1 << 30
_READ_AGAIN = 16
"""Embeddings that are read to measure how long that takes."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Mean seconds of an image."""

    embed: float
    """Decoded, embedded and rounded anew."""
    write: float
    read: float
    """From the disk itself, and not from the system's memory."""

    @property
    def pays_from(self) -> int | None:
        """The visit of an image from which on it is faster to have stored it at the first; None if reading is no
        faster than embedding. With v visits, embed + write + (v - 1) read < v embed."""
        saved = self.embed - self.read
        return 2 + int(self.write / saved) if saved > 0 else None


@dataclass(frozen=True, kw_only=True)
class Filled:
    """What is in the folder of a dataset's images."""

    images: int
    """Distinct image files of the dataset."""
    embedded: int
    """Of these, embedded now; the others were there."""
    stored: int
    """Of these, in the folder at the end."""
    bytes: int
    """Of the files of those."""
    costs: Costs | None
    """None if nothing was embedded and stored."""

    def lines(self) -> Iterator[str]:
        """What the command prints."""
        yield f"{self.images} images: {self.embedded} embedded now, {self.images - self.embedded} were there"
        if self.stored < self.images:
            yield f"{self.images - self.stored} are not there any more: the folder is full"
        if self.stored:
            yield f"{_amount(self.bytes)} in all, {_amount(self.bytes / self.stored)} an image"
        if self.costs:
            embed, write, read = (
                f"{1e3 * each:.3g} ms" for each in (self.costs.embed, self.costs.write, self.costs.read)
            )
            yield f"an image takes {embed} to embed anew, {write} to write and {read} to read back"
            first = self.costs.pays_from
            yield (
                f"storing pays from visit {first} of an image on"
                if first
                else "storing does not pay: reading is slower"
            )


def embed_dataset(
    dataset: Dataset, expert: Expert, store: EmbeddingStore, *, limit: int, say: Callable[[str], None]
) -> Filled:
    """Embed every distinct image of a dataset that is not in the store yet. What is done stays, however it ends.

    limit: bound of the store, in bytes. say: takes a warning if the dataset will not fit it. Raises ValueError for an
    image that cannot be decoded and for features that float16 has not, and OSError where the disk fails.
    """
    rows = _first_rows(dataset)
    missing = [row for key, row in rows.items() if not store.holds(key)]
    clock = _Clock()
    written: list[str] = []
    with progress("embedding", len(rows), done=len(rows) - len(missing), unit="images") as show:
        # One by one, as segmenters embed them: several in a pass of a GPU are equal to those only up to rounding.
        for sample in dataset.only(missing).unmasked() if missing else ():
            with clock.timing("embed"):
                embedding = rounded(expert.embed(sample.image()))
            if not written:
                _warn(embedding, len(rows), limit, say)
            with clock.timing("write"):
                store.put(sample.image_key, embedding)
            written.append(sample.image_key)
            show(len(rows) - len(missing) + len(written))
    there = [path.stat().st_size for path in map(store.path, rows) if path.exists()]
    return Filled(
        images=len(rows),
        embedded=len(written),
        stored=len(there),
        bytes=sum(there),
        costs=_costs(clock, store, [key for key in written if store.holds(key)]),
    )


def _first_rows(dataset: Dataset) -> dict[str, int]:
    """The first row of each distinct image file, by its key."""
    rows: dict[str, int] = {}
    with progress("reading", len(dataset)) as show:
        for row, sample in enumerate(dataset.unmasked()):
            rows.setdefault(sample.image_key, row)
            show(row + 1)
    return rows


def _warn(embedding: Embedding, images: int, limit: int, say: Callable[[str], None]) -> None:
    needed = images * embedding.nbytes
    if needed > limit:
        gib = -(-needed // GIB) + 1  # with room for the headers
        say(
            f"{images} images need {needed / GIB:.3g} GiB, and the folder may have {limit / GIB:.3g}: those embedded "
            f"first will go again; give --disk-gib {gib}, and the run the same segmenter.embeddings.disk_gib"
        )


class _Clock:
    """Seconds that images took, by what was done with them. The first one warms up, and counts only if it is the only
    one."""

    def __init__(self) -> None:
        self._taken: dict[str, list[float]] = {}

    @contextmanager
    def timing(self, what: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._taken.setdefault(what, []).append(time.perf_counter() - began)

    def mean(self, what: str) -> float:
        """Of an image."""
        return fmean(self._taken[what][1:] or self._taken[what])


def _costs(clock: _Clock, store: EmbeddingStore, written: list[str]) -> Costs | None:
    if not written:
        return None
    for key in written[:: -(-len(written) // _READ_AGAIN)]:
        _leave_memory(store.path(key))
        with clock.timing("read"):
            store.get(key)
    return Costs(embed=clock.mean("embed"), write=clock.mean("write"), read=clock.mean("read"))


def _leave_memory(path: Path) -> None:
    """Have the system read a file from the disk when it is read next."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def _amount(size: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} GiB"
