"""A rank's optimizer state in host memory, while an engine has the GPU (`placement: colocated`).

    learning    masters, moments and gradients on the GPU
    parked      masters and moments in host memory, the buffer of gradients nowhere; the weights stay

DeepSpeed has `offload_states` for this. It refuses torch's AdamW at stage 3, and at stages 1 and 2 it takes views of
the buffers apart and links them anew. Here a tensor's storage is emptied in place and filled again: every view of it,
of whoever's, stays what it was, and one way serves all stages, on GPUs and on a CPU.
"""

from collections.abc import Callable, Sequence

import torch

Present = Callable[[torch.Tensor], torch.Tensor]
"""Gives a tensor as it is now: itself, or its numbers in host memory."""


class Parking:
    """Where tensors of a device wait. What is on another device stays as it is."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._hosts: dict[int, torch.Tensor] = {}
        """Kept from one parking to the next: to lock pages takes longer than to copy."""
        self._parked: dict[int, tuple[torch.UntypedStorage, torch.Tensor]] = {}

    @property
    def parked(self) -> bool:
        """Whether tensors wait."""
        return bool(self._parked)

    def park(self, kept: Sequence[torch.Tensor], dropped: Sequence[torch.Tensor] = ()) -> None:
        """Free the storages of tensors. kept: come back as they were. dropped: come back as zeros."""
        assert not self._parked, "the tensors wait already"
        for tensor in kept:
            if (key := self._free(tensor)) is not None:
                storage = tensor.untyped_storage()
                self._parked[key] = (storage, self._host(key, storage))
                storage.resize_(0)
        for tensor in dropped:
            if (key := self._free(tensor)) is not None:
                storage = tensor.untyped_storage()
                self._parked[key] = (storage, torch.empty(storage.nbytes(), dtype=torch.uint8, device="meta"))
                storage.resize_(0)
        self._hosts = {key: host for key, host in self._hosts.items() if key in self._parked}

    def unpark(self) -> None:
        """Bring everything back."""
        for storage, host in self._parked.values():
            storage.resize_(host.numel())
            _bytes(storage).zero_() if host.is_meta else _bytes(storage).copy_(host)
        self._parked = {}

    def present(self, tensor: torch.Tensor) -> torch.Tensor:
        """As `Present`; of those that come back as they were."""
        _, host = self._parked.get(_key(tensor), (None, None))
        if host is None:
            return tensor
        place = torch.empty(0, dtype=tensor.dtype)
        return place.set_(host.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())

    def _free(self, tensor: torch.Tensor) -> int | None:
        """The key of a storage that has not been emptied yet; None for one of another device."""
        key = _key(tensor)
        return key if tensor.device.type == self._device.type and key not in self._parked else None

    def _host(self, key: int, storage: torch.UntypedStorage) -> torch.Tensor:
        """A storage's bytes in host memory, page-locked beside a GPU."""
        host = self._hosts.get(key)
        if host is None or host.numel() != storage.nbytes():
            host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=self._device.type == "cuda")
            self._hosts[key] = host
        return host.copy_(_bytes(storage))


def _key(tensor: torch.Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
