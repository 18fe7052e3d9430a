"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685) by peft: W + alpha / rank · B A, where A and B learn.

Engines, checkpoints and exports get merged weights under the parameter names of the model's own folder. Checkpoints
also hold the adapter alone, in peft's format.
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
"""Modules that get an adapter: all projections of the language model's layers, attention and MLP."""

# peft names its first adapter so, and moves the adapted layer to the attribute `base_layer`. Both are part of the
# parameters' names in the live model, and neither is in those of a folder.
_NAME = "default"
_BASE = ".base_layer"


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One tensor of the model's own folder."""

    name: str
    """In the folder."""
    parameters: tuple[torch.nn.Parameter, ...]
    """The parameter that it is, or those that it is merged from: base [out, in], A [rank, in] and B [out, rank]."""
    scale: float = 0.0
    """Of the product B A, in the merged tensor."""

    @property
    def nbytes(self) -> int:
        """Size of the whole tensor, also if ZeRO-3 has partitioned it."""
        base = self.parameters[0]
        # A partitioned parameter has no elements; DeepSpeed keeps its number in `ds_numel`.
        return int(getattr(base, "ds_numel", base.numel())) * int(base.element_size())

    def tensor(self) -> torch.Tensor:
        """The parameter itself or, with an adapter, their sum; partitioned parameters must have been gathered."""
        base, *adapter = (parameter.detach() for parameter in self.parameters)
        if adapter:
            a, b = adapter
            base = (base.float() + self.scale * (b.float() @ a.float())).to(base.dtype)
        return base


def add_adapters(model: Any, config: LoraConfig) -> None:
    """Freeze the model and add trainable adapters to its language model. B starts at 0, so outputs do not change."""
    model.requires_grad_(False)
    peft.inject_adapter_in_model(_peft_config(config), model, adapter_name=_NAME)


def weights(model: Any) -> Iterator[Weight]:
    """The model's weights under the names of its own folder, with adapters merged."""
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
    """The adapters alone, under the names of peft's own folders."""
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            yield Weight(name=f"base_model.model.{name.replace(f'.{_NAME}', '')}", parameters=(parameter,))


def adapter_config(config: LoraConfig, model: str) -> bytes:
    """The bytes of peft's `adapter_config.json`. model: folder of the base model."""
    with TemporaryDirectory() as folder:
        settings = _peft_config(config)
        settings.base_model_name_or_path = model
        settings.inference_mode = True
        settings.save_pretrained(folder)
        return (Path(folder) / "adapter_config.json").read_bytes()


def starts_without_gradient(name: str) -> bool:
    """Whether a parameter's gradient is 0 at the first update: that of A is a product with B, which starts at 0."""
    return ".lora_A." in name


def _peft_config(config: LoraConfig) -> peft.LoraConfig:
    return peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=TARGETS)
