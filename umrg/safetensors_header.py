"""The header of a safetensors file, which describes the tensors without reading them.

The file format is the header's length in bytes (8 bytes, little-endian), the header (JSON), and the tensors' bytes.
"""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from umrg.foreign_files import first_bytes, what_it_is
from umrg.mistake import Mistake

_LONGEST = 100_000_000
"""The largest header in bytes that the format allows."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """The header of a safetensors file."""

    shapes: dict[str, tuple[int, ...]]
    """Shapes of the tensors by name."""
    metadata: dict[str, str]
    """Free text by key, from the program that wrote the file."""


def read_header(path: Path) -> Header:
    """Read the header and check that the file has the size it implies. Raises ValueError if the file is not a
    safetensors file, with what it is instead, or if it is truncated."""
    size, start = path.stat().st_size if path.is_file() else 0, first_bytes(path, 9)
    length = int.from_bytes(start[:8], "little")
    if len(start) < 9 or start[8:9] != b"{" or length > _LONGEST:
        kind = what_it_is(path)
        raise Mistake(f"{path} is {kind}" if kind else f"{path} is not a safetensors file")
    if size < 8 + length:
        raise Mistake(f"{path} is cut short within its header; download it again")
    with path.open("rb") as file:
        file.seek(8)
        text = file.read(length)
    try:
        header, end = _parsed(json.loads(text))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise Mistake(f"{path} has a damaged header; download it again") from error
    if size != 8 + length + end:
        cut = "is cut short" if size < 8 + length + end else "is longer than its header says"
        raise Mistake(f"{path} {cut}: {size:,} bytes of {8 + length + end:,}; download it again")
    return header


def _parsed(tree: dict[str, Any]) -> tuple[Header, int]:
    """The header, and the offset at which the last tensor ends."""
    metadata = tree.pop("__metadata__", {})
    shapes = {name: tuple(int(side) for side in entry["shape"]) for name, entry in tree.items()}
    ends = [0]
    for name, entry in tree.items():
        begin, end = entry["data_offsets"]
        if not 0 <= begin <= end or (prod(shapes[name]) == 0) != (begin == end):
            raise Mistake(f"{name} has no such place")
        ends.append(end)
    return Header(shapes=shapes, metadata=dict(metadata)), max(ends)
