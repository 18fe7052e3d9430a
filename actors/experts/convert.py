"""Official checkpoints (.pth) to safetensors, once."""

import hashlib
import pickle
from pathlib import Path

import torch
from torch import Tensor

from actors.experts.config import PUBLISHED_EXPERTS
from actors.experts.sam import build_sam
from actors.experts.weights import check_shapes, save_weights, shapes_of, weights_digest


def convert_checkpoint(source: Path, target: Path, *, name: str) -> str:
    """Write an official .pth as safetensors; returns the digest of the weights (`Expert.digest` in float32).

    The file's metadata holds `name`, `source_sha256` (of the .pth) and `weights_sha256` (that digest).
    ValueError where the source is no checkpoint, or not one of `name`; then nothing is written.
    """
    if name not in PUBLISHED_EXPERTS:
        raise ValueError(f"no official checkpoint is called {name!r}; name one of {', '.join(PUBLISHED_EXPERTS)}")
    weights = _read_official(source)
    with torch.device("meta"):
        expected = shapes_of(build_sam(PUBLISHED_EXPERTS[name].config).state_dict())
    check_shapes(shapes_of(weights), expected, source=source, name=name)
    digest = weights_digest(weights)
    with source.open("rb") as file:
        source_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    metadata = {"name": name, "source_sha256": source_sha256, "weights_sha256": digest}
    save_weights(weights, target, metadata=metadata)
    return digest


def _read_official(source: Path) -> dict[str, Tensor]:
    try:
        weights = torch.load(source, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ValueError(f"there is no file {source}") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, IsADirectoryError) as error:
        raise ValueError(f"{source} is not a PyTorch checkpoint of plain tensors; download it again") from error
    if not isinstance(weights, dict) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise ValueError(f"{source} holds more than a table of tensors; give the checkpoint as it was released")
    return weights
