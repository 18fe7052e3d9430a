"""Checkpoints, as released or as one's own training wrote them, to safetensors, once."""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from actors.experts.checkpoint_file import read_checkpoint
from actors.experts.config import PUBLISHED_EXPERTS
from actors.experts.sam import build_sam
from actors.experts.unwrapping import unwrapped
from actors.experts.weights import check_shapes, save_weights, shapes_of, weights_digest


def convert_checkpoint(
    source: Path, target: Path, *, name: str, key: str | None = None, say: Callable[[str], object] = str
) -> str:
    """Write a checkpoint as safetensors in float32; returns the digest of the weights (`Expert.digest` in float32).

    key: of the weights among several that the file holds. say: is told, a sentence each, what the weights were taken
    out of. The file's metadata holds `name`, `source_sha256` (of the source) and `weights_sha256` (that digest).
    ValueError where the source is no checkpoint, or not one of `name`; then nothing is written.
    """
    if name not in PUBLISHED_EXPERTS:
        raise ValueError(f"no official checkpoint is called {name!r}; name one of {', '.join(PUBLISHED_EXPERTS)}")
    with torch.device("meta"):
        expected = shapes_of(build_sam(PUBLISHED_EXPERTS[name].config).state_dict())
    found = unwrapped(read_checkpoint(source), expected.keys(), source=source, key=key)
    check_shapes(shapes_of(found.weights), expected, source=source, name=name)
    weights = {tensor: _float32(found.weights[tensor], f"{source}: {tensor}") for tensor in expected}
    for sentence in (*found.said, *_cast(found.weights.values())):
        say(sentence)
    digest = weights_digest(weights)
    with source.open("rb") as file:
        source_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    save_weights(weights, target, metadata={"name": name, "source_sha256": source_sha256, "weights_sha256": digest})
    return digest


def _float32(tensor: Tensor, what: str) -> Tensor:
    """A copy, which shares no storage with others. Raises ValueError for numbers that are no plain floats."""
    if tensor.layout is not torch.strided or tensor.is_quantized or not tensor.is_floating_point():
        raise ValueError(f"{what} is {str(tensor.dtype).removeprefix('torch.')}; give weights that are plain floats")
    return tensor.detach().to(torch.float32, copy=True)


def _cast(weights: Iterable[Tensor]) -> list[str]:
    """What is said of weights that are in another precision."""
    kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in weights} - {"float32"})
    return [f"turned {', '.join(kinds)} into float32"] if kinds else []
