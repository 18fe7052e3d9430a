"""A safetensors file's header, from which its tensors are known before a byte of them is read.

The format: eight bytes, little-endian, that say how long the header is; the header, JSON; the tensors' bytes.
"""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from umrg.foreign_files import first_bytes, what_it_is

_LONGEST = 100_000_000
"""Bytes of a header, as the format limits them."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """shapes: of the tensors by name. metadata: what the writer added."""

    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Read it, and see that all bytes it tells of are there. Raises ValueError where the file is no safetensors file,
    and says what else it is, or where it is cut short."""
    size, start = path.stat().st_size if path.is_file() else 0, first_bytes(path, 9)
    length = int.from_bytes(start[:8], "little")
    if len(start) < 9 or start[8:9] != b"{" or length > _LONGEST:
        kind = what_it_is(path)
        raise ValueError(f"{path} is {kind}" if kind else f"{path} is not a safetensors file")
    if size < 8 + length:
        raise ValueError(f"{path} is cut short within its header; download it again")
    with path.open("rb") as file:
        file.seek(8)
        text = file.read(length)
    try:
        header, end = _parsed(json.loads(text))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} has a damaged header; download it again") from error
    if size != 8 + length + end:
        cut = "is cut short" if size < 8 + length + end else "is longer than its header says"
        raise ValueError(f"{path} {cut}: {size:,} bytes of {8 + length + end:,}; download it again")
    return header


def _parsed(tree: dict[str, Any]) -> tuple[Header, int]:
    """The header, and where the last tensor's bytes end."""
    metadata = tree.pop("__metadata__", {})
    shapes = {name: tuple(int(side) for side in entry["shape"]) for name, entry in tree.items()}
    ends = [0]
    for name, entry in tree.items():
        begin, end = entry["data_offsets"]
        if not 0 <= begin <= end or (prod(shapes[name]) == 0) != (begin == end):
            raise ValueError(f"{name} has no such place")
        ends.append(end)
    return Header(shapes=shapes, metadata=dict(metadata)), max(ends)
