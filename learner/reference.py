"""The reference model, from which the KL term measures the policy's divergence: the model that the run began with.

A second whole copy on a GPU would cost what the policy's weights cost. So there is none: a step's reference log-probs
are computed in one go, before its first update, and only then is the model on the GPU, or a share of it.

    kind                  between its passes                during its passes
    of adapters (LoRA)    is the policy, adapters off       the same
    parked                whole, in host memory             whole, on the GPU
    partitioned           a share on each rank's GPU        layer by layer, gathered from the ranks (ZeRO-3)
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from learner.config import LearnerConfig
from learner.shared_prefix import PackedSequence
from learner.zero import ZeroRank, load_partitioned

Reference = Callable[[], AbstractContextManager[Callable[[PackedSequence], torch.Tensor]]]
"""Enters the reference model's passes: a context that gives its log-probs [T] of a packed sequence; all ranks."""


def reference_of(zero: ZeroRank, config: LearnerConfig) -> Reference:
    """The reference model of a rank; all ranks."""
    if config.lora:
        return lambda: adapters_off(zero)
    if config.reference_kind == "partitioned":
        engine = load_partitioned(zero)
        return lambda: _passes(engine)
    parked = Parked(zero)
    return parked.present


@contextmanager
def adapters_off(zero: ZeroRank) -> Iterator[Callable[[PackedSequence], torch.Tensor]]:
    """The policy without its adapters. Their products are computed and multiplied by 0, so that the order of modules,
    by which ZeRO-3 gathers parameters, stays what it is in training."""
    scales = [layer.scaling for layer in zero.reasoner.model.modules() if isinstance(layer, LoraLayer)]
    kept = [dict(scale) for scale in scales]
    for scale in scales:
        scale.update(dict.fromkeys(scale, 0.0))
    try:
        with _passes(zero.engine) as logprobs:
            yield logprobs
    finally:
        for scale, values in zip(scales, kept, strict=True):
            scale.update(values)


class Parked:
    """A model whose weights wait in host memory, page-locked beside a GPU, and are copied to the device for its passes
    alone. On a CPU nothing is moved."""

    def __init__(self, zero: ZeroRank, hold: Callable[[torch.Tensor], torch.Tensor] | None = None) -> None:
        """hold: lays a tensor of the host where it waits; None for `parked`."""
        self._device = torch.device(zero.device)
        # Built on the CPU, so that the GPU never holds both models at the start.
        self._policy = zero.around(zero.loaded("cpu"), "cpu").eval().requires_grad_(False)
        # Buffers are small, and some are computed from their device.
        for module in self._policy.modules():
            module._buffers = {name: b if b is None else b.to(self._device) for name, b in module._buffers.items()}
        for parameter in self._policy.parameters():
            parameter.data = hold(parameter.data) if hold else parked(parameter.data, self._device)

    @contextmanager
    def present(self) -> Iterator[Callable[[PackedSequence], torch.Tensor]]:
        """The passes, with the weights on the device."""
        waiting = [parameter.data for parameter in self._policy.parameters()]
        for parameter in self._policy.parameters():
            parameter.data = parameter.data.to(self._device, non_blocking=True)
        try:
            with _passes(self._policy) as logprobs:
                yield logprobs
        finally:
            for parameter, data in zip(self._policy.parameters(), waiting, strict=True):
                parameter.data = data


def parked(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor as it waits in host memory: page-locked where a GPU reads it, which doubles the rate of the copy."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


@contextmanager
def _passes(model: Any) -> Iterator[Callable[[PackedSequence], torch.Tensor]]:
    def logprobs(packed: PackedSequence) -> torch.Tensor:
        found: torch.Tensor = model(packed).logprobs
        return found

    with torch.no_grad():
        yield logprobs
