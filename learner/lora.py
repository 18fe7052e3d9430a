"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685) by peft: W + alpha / rank · B A, of which A and B learn.

Engines, checkpoints and exports are given merged weights under the names of the model's own folder; the adapter alone
is written beside them, as peft reads it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import peft
import torch

from learner.config import LoraConfig

TARGETS = r"model\.language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
"""The modules that get an adapter: every matrix product of the language model's layers."""
_NAME = "default"
_BASE = ".base_layer"


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One tensor of the model's own folder. parameters: the one that it is, or base [out, in], A [rank, in] and
    B [out, rank], of which it is made."""

    name: str
    parameters: tuple[torch.nn.Parameter, ...]
    scale: float = 0.0

    @property
    def nbytes(self) -> int:
        """Of the tensor, also where ZeRO has partitioned the parameter."""
        base = self.parameters[0]
        return int(getattr(base, "ds_numel", base.numel())) * int(base.element_size())

    def tensor(self) -> torch.Tensor:
        """A copy on the CPU; the parameters must be whole."""
        base, *adapter = (parameter.detach() for parameter in self.parameters)
        if adapter:
            a, b = adapter
            base = (base.float() + self.scale * (b.float() @ a.float())).to(base.dtype)
        return base.to("cpu", copy=True).contiguous()


def add_adapters(model: Any, config: LoraConfig) -> None:
    """Freeze the model, and give its language part adapters, which learn. B begins at 0, so nothing changes yet."""
    model.requires_grad_(False)
    peft.inject_adapter_in_model(_peft_config(config), model, adapter_name=_NAME)


def weights(model: Any) -> Iterator[Weight]:
    """The model's weights under the names of its own folder, adapters merged."""
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        if name.endswith(f"{_BASE}.weight"):
            layer = model.get_submodule(name.removesuffix(f"{_BASE}.weight"))
            adapter = (layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight)
            yield Weight(name=name.replace(_BASE, ""), parameters=(parameter, *adapter), scale=layer.scaling[_NAME])
        else:
            yield Weight(name=name.replace(_BASE, ""), parameters=(parameter,))


def adapter_weights(model: Any) -> Iterator[Weight]:
    """The adapters alone, under the names that peft's own folders have."""
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            yield Weight(name=f"base_model.model.{name.replace(f'.{_NAME}', '')}", parameters=(parameter,))


def adapter_config(config: LoraConfig, model: str) -> bytes:
    """`adapter_config.json` of peft's folders. model: of which folder the adapter is."""
    with TemporaryDirectory() as folder:
        settings = _peft_config(config)
        settings.base_model_name_or_path = model
        settings.inference_mode = True
        settings.save_pretrained(folder)
        return (Path(folder) / "adapter_config.json").read_bytes()


def starts_without_gradient(name: str) -> bool:
    """Whether a parameter has none at the first update: A's is a product with B, which begins at 0."""
    return ".lora_A." in name


def _peft_config(config: LoraConfig) -> peft.LoraConfig:
    return peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=TARGETS)
