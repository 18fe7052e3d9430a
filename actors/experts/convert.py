"""Conversion of checkpoints, whether official or from a training of one's own, to safetensors."""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from actors.experts.checkpoint_file import read_checkpoint
from actors.experts.published import PUBLISHED_EXPERTS
from actors.experts.registry import FAMILIES
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
    family = FAMILIES[PUBLISHED_EXPERTS[name].family]
    with torch.device("meta"):  # only the shapes are needed, so no memory is allocated
        model = shapes_of(family.build(PUBLISHED_EXPERTS[name].config).state_dict())
    expected = [layout.shapes(model) for layout in family.layouts]
    found = unwrapped(read_checkpoint(source), set().union(*expected), source=source, key=key)
    # The layout with most of the names; the first, if the file has none of any.
    layout, shapes = max(
        zip(family.layouts, expected, strict=True), key=lambda each: len(each[1].keys() & found.weights.keys())
    )
    used = layout.used(found.weights)
    check_shapes(shapes_of(used), shapes, source=source, name=name)
    plain = {tensor: _float32(used[tensor], f"{source}: {tensor}") for tensor in shapes}
    weights = layout.translated(plain, model)
    for sentence in (*found.said, *_left_out(len(found.weights) - len(used)), *_cast(used.values())):
        say(sentence)
    digest = weights_digest(weights)
    with source.open("rb") as file:
        source_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    save_weights(weights, target, metadata={"name": name, "source_sha256": source_sha256, "weights_sha256": digest})
    return digest


def _float32(tensor: Tensor, what: str) -> Tensor:
    """The tensor in float32. Raises ValueError if it is not of a plain floating-point type."""
    if tensor.layout is not torch.strided or tensor.is_quantized or not tensor.is_floating_point():
        raise Mistake(f"{what} is {str(tensor.dtype).removeprefix('torch.')}; give weights that are plain floats")
    return tensor.detach().to(torch.float32)


def _left_out(count: int) -> list[str]:
    """A phrase about the tensors that the expert has no use for, if there are any."""
    return [f"left out {count} tensors that an image alone has no use for"] if count else []


def _cast(weights: Iterable[Tensor]) -> list[str]:
    """A phrase that names the other precisions of the weights, if there are any."""
    kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in weights} - {"float32"})
    return [f"turned {', '.join(kinds)} into float32"] if kinds else []
