"""A configuration's faults in words, by the user's keys. Imports no torch."""

import difflib
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from cluster.config_keys import models

RENAMED = {"refill": "dynamic_sampling_retries"}
"""Keys that had another name in earlier versions, by their dotted names then."""

_IN_WORDS = {
    "dict_type": "give keys and values",
    "list_type": "give a list",
    "model_type": "give keys and values",
    "path_type": "give a path",
    "too_short": "give at least one",
}
"""In place of pydantic's messages, where these speak of Python."""


def in_words(schema: type[BaseModel], tree: Any, faults: Sequence[Any]) -> list[str]:
    """A sentence a fault. Where a value may be of several kinds and is of none, the faults of all kinds are one."""
    found: dict[str, list[str]] = {}
    for fault in faults:
        place = _place(tree, fault)
        if fault["type"] == "extra_forbidden":
            found.setdefault(_unknown_key(schema, place), [])
        else:
            message = _IN_WORDS.get(fault["type"], fault["msg"].removeprefix("Value error, "))
            found.setdefault(".".join(place), []).append(message)
    return [": ".join(filter(None, (place, " or ".join(dict.fromkeys(said))))) for place, said in found.items()]


def _place(node: Any, fault: Any) -> list[str]:
    """Where a fault is, by the user's keys: pydantic names the kinds that a value may be of, too."""
    place = []
    for part in fault["loc"]:
        here = part in node if isinstance(node, dict) else isinstance(node, list) and isinstance(part, int)
        if here:
            node = node[part]
        if here or (fault["type"] == "missing" and part == fault["loc"][-1]):
            place.append(str(part))
    return place


def _unknown_key(schema: type[BaseModel], place: list[str]) -> str:
    if (older := ".".join(place)) in RENAMED:
        return f"unknown key {older!r}; its name is {RENAMED[older]!r}"
    known = _keys(schema, place[:-1])
    near = difflib.get_close_matches(place[-1], known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys here: {', '.join(sorted(known))}"
    return f"unknown key {'.'.join(place)!r}; {hint}"


def _keys(schema: type[BaseModel], path: list[str]) -> list[str]:
    schemas = [schema]
    for part in path:
        fields = [each.model_fields[part] for each in schemas if part in each.model_fields]
        # A part that is no field is a place in a list.
        schemas = [found for field in fields for found in models(field.annotation)] or schemas
    return [key for each in schemas for key in each.model_fields]
