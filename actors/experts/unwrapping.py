"""Weights as people's training wraps them: in tables beside an optimizer, under the names of what held the model.

{"model": {"module.image_encoder.pos_embed": …}, "optimizer": …, "epoch": 7}  ──►  {"image_encoder.pos_embed": …}
"""

from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""What data parallelism, `torch.compile`, FSDP and activation checkpointing add to names, wherever they wrap."""

_DEEPEST = 8
"""Tables within tables that are looked through; a pickle may hold itself."""

Keys = tuple[Hashable, ...]


@dataclass(frozen=True, kw_only=True)
class Found:
    """Weights by the model's own names, and in sentences what they were taken out of."""

    weights: dict[str, Tensor]
    said: tuple[str, ...]


def unwrapped(checkpoint: object, expected: Collection[str], *, source: Path, key: str | None) -> Found:
    """The weights in a checkpoint that have any of the expected names once they are unwrapped.

    key: of the table to take, with dots where it lies deeper. Raises ValueError where there is none, and where several
    could be meant; where none has an expected name, the largest is taken, for its shapes to be compared.
    """
    every = dict(_tables(checkpoint))
    tables = {path: table for path, table in every.items() if key in (None, _dotted(path))}
    if not tables:
        there = f" under {key!r}; it has some under {_listed(every) or 'nothing'}" if key is not None and every else ""
        raise ValueError(f"{source} holds no tensors by name{there}; give a checkpoint that torch.save wrote")
    plain = {path: _plain(table, expected, source) for path, table in tables.items()}
    fitting = [path for path, (weights, _) in plain.items() if not weights.keys().isdisjoint(expected)]
    if len(fitting) > 1:
        raise ValueError(
            f"{source} holds several models: {_listed(fitting)}; say which with --key {_dotted(fitting[0])}"
        )
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
    """Every mapping that has tensors by name, and these tensors, by the keys that lead to it."""
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
    """The table by unwrapped names, and the prefixes that came off."""
    taken: dict[str, None] = {}
    plain: dict[str, Tensor] = {}
    for name, tensor in table.items():
        parts = name.split(".")
        taken |= dict.fromkeys(part for part in parts if part in _WRAPPERS)
        bare = ".".join(part for part in parts if part not in _WRAPPERS)
        if bare in plain:
            raise ValueError(f"{source} holds {bare} twice, wrapped and not; save one of them alone")
        plain[bare] = tensor
    # What held the model, as `self.model` or `self.sam`: a name that all share, and that the model itself has not.
    while plain.keys().isdisjoint(expected) and (prefix := _shared(plain)):
        taken[prefix] = None
        plain = {name.removeprefix(f"{prefix}."): tensor for name, tensor in plain.items()}
    return plain, tuple(taken)


def _shared(names: Collection[str]) -> str | None:
    """The first part that all names begin with, where each has more."""
    firsts = {name.partition(".")[0] if "." in name else "" for name in names}
    return firsts.pop() or None if len(firsts) == 1 else None


def _beside(checkpoint: object, path: Keys) -> list[str]:
    """The names of what lies in the file beside the table, and of what lies in the table and is no tensor."""
    beside: list[str] = []
    place = checkpoint
    for key in path:
        assert isinstance(place, Mapping)
        beside += [str(name) for name in place if name != key]
        place = place[key]
    assert isinstance(place, Mapping)
    return beside + [str(name) for name, value in place.items() if not isinstance(value, Tensor)]
