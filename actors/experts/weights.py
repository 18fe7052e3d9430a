"""Weights of experts as safetensors files, which are checked by their headers before they are loaded."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from umrg.atomic import written_aside
from umrg.mistake import Mistake
from umrg.safetensors_header import Header
from umrg.safetensors_header import read_header as read_any

Shapes = Mapping[str, tuple[int, ...]]


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes, in order of the names."""
    sha = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def shapes_of(weights: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def check_shapes(found: Shapes, expected: Shapes, *, source: Path, name: str) -> None:
    """Raise ValueError, naming the first tensor in the model's own order that is not as in the expert `name`."""
    for tensor, shape in expected.items():
        if tensor not in found:
            raise Mistake(f"{source} is not {name}: it has no tensor {tensor}")
        if found[tensor] != shape:
            raise Mistake(f"{source} is not {name}: {tensor} is {list(found[tensor])} there, {list(shape)} in {name}")
    for tensor in found:
        if tensor not in expected:
            raise Mistake(f"{source} is not {name}: it has a tensor {tensor}, which {name} has not")


def read_header(path: Path) -> Header:
    """Shapes and metadata of a safetensors file. Raises ValueError if it is not one, or is truncated."""
    if not path.exists():
        raise Mistake(f"there is no checkpoint {path}; give the path of a safetensors file")
    try:
        return read_any(path)
    except ValueError as error:
        raise Mistake(
            f"{error}; an expert's weights are a safetensors file, as `medreasoner expert convert` makes one of a .pth"
        ) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises ValueError if it is not one, or is damaged."""
    read_any(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise Mistake(f"{path} has a damaged header; download it again") from error


def load_into(model: torch.nn.Module, path: Path, *, name: str) -> None:
    """Load a safetensors file into a model of exactly the same shapes. Raises ValueError, naming the first
    difference."""
    check_shapes(read_header(path).shapes, shapes_of(model.state_dict()), source=path, name=name)
    model.load_state_dict(read_tensors(path))


def save_weights(weights: Mapping[str, Tensor], path: Path, *, metadata: dict[str, str]) -> None:
    """Write a safetensors file; `path` never holds a partial one."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    with written_aside(path) as aside:
        # safetensors' `save_file` makes a file that only its owner can read, whatever the umask.
        aside.write_bytes(save(tensors, metadata))
