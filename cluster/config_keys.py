"""A configuration's keys, dotted: what each is, and which may change when a run resumes. Imports no torch."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from umrg.config import MAY_CHANGE


@dataclass(frozen=True, kw_only=True)
class Key:
    """One key of a configuration's schema."""

    name: str
    """Dotted, such as `learner.lr`."""
    owner: type[BaseModel]
    """The model that has it as a field."""
    field: FieldInfo
    section: type[BaseModel] | None
    """The model of the keys beneath it; None for a key that holds a value."""
    may_change: bool
    """Whether a run may resume with another value than it began with."""


def keys(schema: type[BaseModel], prefix: str = "", *, changes: bool = False) -> Iterator[Key]:
    """All keys of a schema, each section before the keys beneath it. changes: the section above may change."""
    for name, field in schema.model_fields.items():
        key = Key(
            name=f"{prefix}{name}",
            owner=schema,
            field=field,
            section=_section(field.annotation),
            may_change=changes or MAY_CHANGE in field.metadata,
        )
        yield key
        if key.section:
            yield from keys(key.section, f"{key.name}.", changes=key.may_change)


def may_change(schema: type[BaseModel], key: str) -> bool:
    """Whether a run may resume with another value of a dotted key. A key of no field, such as an option of a reward
    term, is as the nearest field above it."""
    known = {each.name: each.may_change for each in keys(schema)}
    parts = key.split(".")
    above = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((known[name] for name in above if name in known), False)


def models(annotation: Any) -> list[type[BaseModel]]:
    """The models that a field's type is, or may be."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in get_args(annotation) for found in models(part)]


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        inner = isinstance(value, dict)
        found.update(flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value})
    return found


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flat`."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *parents, last = key.split(".")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return tree


def _section(annotation: Any) -> type[BaseModel] | None:
    """The model of a field that is one, or that one or null; None for any other field."""
    united = get_origin(annotation) in (Union, UnionType)
    parts = [part for part in get_args(annotation) if part is not type(None)] if united else [annotation]
    return parts[0] if len(parts) == 1 and parts == models(parts[0]) else None
