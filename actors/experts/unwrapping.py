"""Unwrapping of a model's weights in training checkpoints, where they are nested beside an optimizer's state and named
with the prefixes of what wrapped the model.

{"model": {"module.image_encoder.pos_embed": …}, "optimizer": …, "epoch": 7}  ──►  {"image_encoder.pos_embed": …}
"""

from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from umrg.mistake import Mistake

_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""The parts that data parallelism, `torch.compile`, FSDP and activation checkpointing insert anywhere into names."""

_DEEPEST = 8
"""How deeply nested tables are searched; without a limit, a pickle that contains itself would never end."""

Keys = tuple[Hashable, ...]


@dataclass(frozen=True, kw_only=True)
class Found:
    """The weights that were found in a checkpoint."""

    weights: dict[str, Tensor]
    """The weights by the model's own names."""
    said: tuple[str, ...]
    """Phrases that say what they were extracted from."""


def unwrapped(checkpoint: object, expected: Collection[str], *, source: Path, key: str | None) -> Found:
    """The weights in a checkpoint that have any of the expected names after unwrapping.

    key: selects a table of weights, with dots for nested ones. Raises ValueError if there is no table, or if several
    match. If none has an expected name, the largest is returned, so that the caller's check of names and shapes can say
    what is missing.
    """
    every = dict(_tables(checkpoint))
    tables = {path: table for path, table in every.items() if key in (None, _dotted(path))}
    if not tables:
        there = f" under {key!r}; it has some under {_listed(every) or 'nothing'}" if key is not None and every else ""
        raise Mistake(f"{source} holds no tensors by name{there}; give a checkpoint that torch.save wrote")
    plain = {path: _plain(table, expected, source) for path, table in tables.items()}
    fitting = [path for path, (weights, _) in plain.items() if not weights.keys().isdisjoint(expected)]
    if len(fitting) > 1:
        raise Mistake(f"{source} holds several models: {_listed(fitting)}; say which with --key {_dotted(fitting[0])}")
    path = fitting[0] if fitting else max(tables, key=lambda path: len(tables[path]))
    weights, prefixes = plain[path]
    beside = _beside(checkpoint, path)
    said = (
        f"took the weights from {_dotted(path)!r}" if path else "",
        f"left aside {', '.join(beside)}" if beside else "",
        f"took {', '.join(f'{prefix}.' for prefix in prefixes)} off the names" if prefixes else "",
    )
    return Found(weights=weights, said=tuple(filter(None, said)))


def _tables(value: object, path: Keys = ()) -> Iterator[tuple[Keys, dict[str, Tensor]]]:
    """The named tensors of every mapping that has some, by the path of keys to the mapping."""
    if not isinstance(value, Mapping) or len(path) > _DEEPEST:
        return
    if tensors := {name: each for name, each in value.items() if isinstance(name, str) and isinstance(each, Tensor)}:
        yield path, tensors
    for name, inner in value.items():
        yield from _tables(inner, (*path, name))


def _dotted(path: Keys) -> str:
    return ".".join(map(str, path))


def _listed(paths: Iterable[Keys]) -> str:
    return ", ".join(_dotted(path) or "the file itself" for path in paths)


def _plain(
    table: Mapping[str, Tensor], expected: Collection[str], source: Path
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The table with unwrapped names, and the prefixes that were removed."""
    taken: dict[str, None] = {}
    plain: dict[str, Tensor] = {}
    for name, tensor in table.items():
        parts = name.split(".")
        taken |= dict.fromkeys(part for part in parts if part in _WRAPPERS)
        bare = ".".join(part for part in parts if part not in _WRAPPERS)
        if bare in plain:
            raise Mistake(f"{source} holds {bare} twice, wrapped and not; save one of them alone")
        plain[bare] = tensor
    # A prefix that all names share and the model itself lacks is the attribute that held the model, such as `self.sam`.
    while plain.keys().isdisjoint(expected) and (prefix := _shared(plain)):
        taken[prefix] = None
        plain = {name.removeprefix(f"{prefix}."): tensor for name, tensor in plain.items()}
    return plain, tuple(taken)


def _shared(names: Collection[str]) -> str | None:
    """The first part of the names if it is the same for all and none of them consists of it alone."""
    firsts = {name.partition(".")[0] if "." in name else "" for name in names}
    return firsts.pop() or None if len(firsts) == 1 else None


def _beside(checkpoint: object, path: Keys) -> list[str]:
    """Names of the file's other content: siblings along the table's path, and values in the table that are not
    tensors."""
    beside: list[str] = []
    place = checkpoint
    for key in path:
        assert isinstance(place, Mapping)
        beside += [str(name) for name in place if name != key]
        place = place[key]
    assert isinstance(place, Mapping)
    return beside + [str(name) for name, value in place.items() if not isinstance(value, Tensor)]
