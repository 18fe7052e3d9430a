"""Weights on their way from the learner to the rollouts: named tensors as safetensors bytes, and their digest."""

import hashlib
from collections.abc import Iterable, Mapping

import torch
from safetensors.torch import load, save


def pack(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Serialize tensors as one safetensors file in memory."""
    return save(dict(tensors))


def unpack(data: bytes) -> dict[str, torch.Tensor]:
    return load(data)


class WeightsDigest:
    """sha256 over names, dtypes, shapes and bytes of tensors, sorted by name within each bucket."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name in sorted(tensors):
            tensor = tensors[name]
            self._hash.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            self._hash.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def digest_of(buckets: Iterable[Mapping[str, torch.Tensor]]) -> str:
    """Digest of weights given in buckets."""
    digest = WeightsDigest()
    for bucket in buckets:
        digest.add(bucket)
    return digest.hexdigest()
