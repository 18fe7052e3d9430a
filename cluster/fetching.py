"""What a configuration names by URI, as copies on the driver's machine."""

from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from umrg.config import Config, uri
from umrg.copies import PATIENCE_S, Cache, here
from umrg.mistake import Mistake

C = TypeVar("C", bound=Config)

LOCATIONS = ("model", "expert", "segmenter.checkpoint", "data.train", "data.eval", "data.seen")
"""The keys that may be URIs."""


def fetched(config: C) -> C:
    """The same with copies in place of URIs, which are made unless they are there. Raises ValueError, with the key, if
    a URI cannot be read, or not within `deadlines.start`."""
    cache, deadlines = Cache(getattr(config, "cache", None)), getattr(config, "deadlines", None)
    seconds = deadlines.start if deadlines else PATIENCE_S

    def copied(value: Any) -> Any:
        if isinstance(value, list):
            return [copied(each) for each in value]
        if isinstance(value, str):
            return here(value, cache, seconds=seconds)
        return here(value, cache, seconds=seconds) if isinstance(value, Path) else value

    for key in LOCATIONS:
        try:
            config = _changed(config, key, copied)
        except Mistake as error:
            raise Mistake(f"{key}: {error}") from error
    return config


def uris(config: Config) -> dict[str, str]:
    """The URIs that a configuration names, by key."""
    found: dict[str, str] = {}

    def noted(key: str, value: Any) -> Any:
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, (str, Path)) and (name := uri(each)):
                found[key] = name
        return value

    for key in LOCATIONS:
        _changed(config, key, partial(noted, key))
    return found


def _changed(config: C, key: str, change: Any) -> C:
    """The same with another value of a dotted key, if it has one."""
    name, _, rest = key.partition(".")
    value = getattr(config, name, None)
    if value is None:
        return config
    return config.model_copy(update={name: _changed(value, rest, change) if rest else change(value)})
