"""Splitting a dataset so that the held-out rows have unseen phrasings, categories, super-categories or modalities."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa

from umrg.atomic import named
from umrg.dataset import Dataset, RowInfo, check_names
from umrg.dataset_writer import write_batches
from umrg.mistake import Mistake
from umrg.names import category_matches, category_name, modality_family, modality_matches, modality_name
from umrg.prompts import clean_query

_PARQUETS = ("train.parquet", "held_out.parquet")


class SplitBy(StrEnum):
    """The attribute whose values do not overlap between training and held-out rows."""

    PHRASING = "phrasing"
    CATEGORY = "category"
    SUPERCATEGORY = "supercategory"
    MODALITY = "modality"


@dataclass(frozen=True, kw_only=True)
class Split:
    """An assignment of rows to training and held-out data."""

    by: SplitBy
    held_names: tuple[str, ...]
    """The held-out names or, when splitting by phrasing, the held-out queries."""
    train: tuple[int, ...]
    """Numbers of the training rows, ascending."""
    held_out: tuple[int, ...]
    """Numbers of the held-out rows, ascending."""


def plan_split(
    infos: Sequence[RowInfo],
    by: SplitBy,
    *,
    hold_out: Sequence[str] = (),
    share: float = 0.2,
    seed: int = 0,
) -> Split:
    """Choose the rows to hold out.

    By category, super-category or modality, the names in `hold_out` are held out or, if it is empty, a random share of
    all names (of the families, for modalities). By phrasing, the queries of rows marked "held_out" are held out,
    together with a random share of each category's distinct queries among unmarked rows (or among all rows, if none is
    marked "held_out"). Queries are compared ignoring case and white space, and a category's only query is never drawn.
    Raises ValueError if a name is unknown, the share is outside (0, 1), or either side would be empty.
    """
    if not 0 < share < 1:
        raise Mistake(f"the share to hold out is {share}; it must lie between 0 and 1")
    if by is SplitBy.PHRASING and hold_out:
        raise Mistake("names cannot be held out by phrasing; name none, or split by category")
    rng = np.random.default_rng(seed)
    if by is SplitBy.PHRASING:
        names, held = _by_phrasing(infos, share, rng)
    else:
        names, held = _by_name(infos, by, hold_out, share, rng)
    split = Split(
        by=by,
        held_names=tuple(names),
        train=tuple(i for i, out in enumerate(held) if not out),
        held_out=tuple(i for i, out in enumerate(held) if out),
    )
    _refuse_empty_side(split)
    return split


def _by_phrasing(infos: Sequence[RowInfo], share: float, rng: np.random.Generator) -> tuple[list[str], list[bool]]:
    queries = _held_queries(infos, share, rng)
    held = [_query_key(info) in queries for info in infos]
    return sorted({info.query for info, out in zip(infos, held, strict=True) if out}), held


def _by_name(
    infos: Sequence[RowInfo], by: SplitBy, hold_out: Sequence[str], share: float, rng: np.random.Generator
) -> tuple[list[str], list[bool]]:
    normalised, matches = (
        (modality_name, modality_matches) if by is SplitBy.MODALITY else (category_name, category_matches)
    )
    check_names(infos, by.value, hold_out, matches)
    names = [normalised(name) for name in hold_out] or _drawn_names(infos, by, share, rng)
    return names, [any(matches(getattr(info, by.value), name) for name in names) for info in infos]


def write_split(
    dataset: Dataset, split: Split, folder: Path, progress: Callable[[int], object] = lambda done: None
) -> dict[str, object]:
    """Write train.parquet, held_out.parquet and split.json, and return the content of split.json.

    Rows are copied with all columns, in the dataset's schema. `images_on_both_sides` counts images that occur in both
    files (with different questions), because a model may have memorised them. `progress` is called with the number of
    rows written so far. The three files are moved into the folder once all are complete.
    Raises ValueError if one of them would overwrite a file of the dataset.
    """
    schema = dataset.schema
    _refuse_overwriting(dataset, folder)
    sides = {"train": split.train, "held_out": split.held_out}
    images: dict[str, set[bytes]] = {side: set() for side in sides}
    folder.mkdir(parents=True, exist_ok=True)
    # Within the target folder, so that the final renames stay on one file system.
    with TemporaryDirectory(dir=folder, prefix=".split-") as aside, named(folder, Path(aside)):
        before = 0
        for side, rows in sides.items():
            copied = _copied(dataset, rows, images[side])
            write_batches(
                Path(aside) / f"{side}.parquet",
                copied,
                schema=schema,
                progress=_counting_on(progress, before),
            )
            before += len(rows)
        report: dict[str, object] = {
            "by": split.by.value,
            "held_out": list(split.held_names),
            "rows": {side: len(rows) for side, rows in sides.items()},
            "images": {side: len(seen) for side, seen in images.items()},
            "images_on_both_sides": len(images["train"] & images["held_out"]),
        }
        (Path(aside) / "split.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
        for name in (*_PARQUETS, "split.json"):
            (Path(aside) / name).replace(folder / name)
    return report


def _refuse_overwriting(dataset: Dataset, folder: Path) -> None:
    sources = {info.file.resolve() for info in dataset.infos}
    for name in _PARQUETS:
        if (folder / name).resolve() in sources:
            raise Mistake(f"{folder / name} is a file of the dataset itself; choose another folder")


def _counting_on(progress: Callable[[int], object], before: int) -> Callable[[int], object]:
    return lambda written: progress(before + written)


def _copied(dataset: Dataset, rows: Sequence[int], images: set[bytes]) -> Iterator[pa.RecordBatch]:
    """Copy rows, and add the digests of their encoded images to `images`."""
    for batch in dataset.copied(rows):
        for image in filter(None, chain.from_iterable(filter(None, batch.column("images").to_pylist()))):
            images.add(hashlib.sha256(image["bytes"] or b"").digest())
        yield batch


def _held_queries(infos: Sequence[RowInfo], share: float, rng: np.random.Generator) -> set[str]:
    held = {_query_key(info) for info in infos if info.phrasing == "held_out"}
    queries: dict[str, set[str]] = defaultdict(set)
    for info in infos:
        if info.phrasing is None or not held:
            queries[info.category].add(_query_key(info))
    drawn = set[str]()
    # Sorted, so that the draw depends on the seed alone and not on the order of rows.
    for _, texts in sorted(queries.items()):
        drawn.update(_drawn(sorted(texts), share, rng))
    return held | drawn


def _drawn_names(infos: Sequence[RowInfo], by: SplitBy, share: float, rng: np.random.Generator) -> list[str]:
    names = {getattr(info, by.value) for info in infos}
    if by is SplitBy.MODALITY:
        names = {modality_family(name) for name in names}
    return _drawn(sorted(names), share, rng)


def _drawn(names: Sequence[str], share: float, rng: np.random.Generator) -> list[str]:
    """Draw about a share of the names: at least one, but never all of them, so none from a single name."""
    count = min(max(1, round(share * len(names))), len(names) - 1)
    return sorted(names[i] for i in rng.permutation(len(names))[:count])


def _query_key(info: RowInfo) -> str:
    return clean_query(info.query).casefold()


def _refuse_empty_side(split: Split) -> None:
    if not split.held_out:
        what = "category has two different queries" if split.by is SplitBy.PHRASING else "second name exists"
        raise Mistake(f"nothing can be held out by {split.by.value}: no {what}; split by something else")
    if not split.train:
        raise Mistake(f"all rows would be held out by {split.by.value}; hold out less")
