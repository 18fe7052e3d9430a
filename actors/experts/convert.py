"""Conversion of checkpoints, whether official or from a training of one's own, to safetensors."""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from actors.experts.checkpoint_file import read_checkpoint
from actors.experts.sam import build_sam
from actors.experts.sam_config import PUBLISHED_EXPERTS
from actors.experts.unwrapping import unwrapped
from actors.experts.weights import check_shapes, save_weights, shapes_of, weights_digest
from umrg.mistake import Mistake


def convert_checkpoint(
    source: Path, target: Path, *, name: str, key: str | None = None, say: Callable[[str], object] = str
) -> str:
    """Write a checkpoint as safetensors in float32; returns the digest of the weights (`Expert.digest` in float32).

    key: selects one of several models in the file. say: is called with a sentence for each change, such as names that
    were unwrapped. The metadata of the written file has `name`, `source_sha256` (of the source file) and
    `weights_sha256` (the returned digest). Raises ValueError, and writes nothing, if the source is not a checkpoint of
    the expert `name`.
    """
    if name not in PUBLISHED_EXPERTS:
        raise Mistake(f"no official checkpoint is called {name!r}; name one of {', '.join(PUBLISHED_EXPERTS)}")
    with torch.device("meta"):  # only the shapes are needed, so no memory is allocated
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
    """A copy in float32 that shares no storage with other tensors, as safetensors requires. Raises ValueError if the
    tensor is not of a plain floating-point type."""
    if tensor.layout is not torch.strided or tensor.is_quantized or not tensor.is_floating_point():
        raise Mistake(f"{what} is {str(tensor.dtype).removeprefix('torch.')}; give weights that are plain floats")
    return tensor.detach().to(torch.float32, copy=True)


def _cast(weights: Iterable[Tensor]) -> list[str]:
    """A phrase that names the other precisions of the weights, if there are any."""
    kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in weights} - {"float32"})
    return [f"turned {', '.join(kinds)} into float32"] if kinds else []
