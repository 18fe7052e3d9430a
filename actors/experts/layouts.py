"""How the files of one origin name the tensors of a model.

image_encoder.trunk.blocks.0.mlp.layers.0.weight  ──►  vision_encoder.backbone.blocks.0.mlp.proj_in.weight
sam_prompt_encoder.point_embeddings.0 … 3.weight  ──►  prompt_encoder.point_embed.weight
memory_attention.norm.weight                      ──►  left out
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from actors.experts.weights import Shapes


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The names in files of one origin. By default they are the model's own."""

    sources: Callable[[str], tuple[str, ...]] = lambda name: (name,)
    """The file's tensors of which the model's tensor of a name consists: one, or several as its rows, one after
    another."""
    left_out: tuple[str, ...] = ()
    """What the names of those tensors begin with that the model has no use for."""

    def shapes(self, model: Shapes) -> Shapes:
        """What a file of this layout holds of a model, in the model's order."""
        held = dict[str, tuple[int, ...]]()
        for name, shape in model.items():
            sources = self.sources(name)
            part = shape if len(sources) == 1 else (shape[0] // len(sources), *shape[1:])
            held |= dict.fromkeys(sources, part)
        return held

    def used(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of a file without those that are left out."""
        return {name: tensor for name, tensor in weights.items() if not name.startswith(self.left_out)}

    def translated(self, weights: Mapping[str, Tensor], model: Shapes) -> dict[str, Tensor]:
        """Copies of the weights of a file, which has all of `shapes`, by the model's names, each with a storage of its
        own, as safetensors requires."""
        return {name: torch.cat([weights[source] for source in self.sources(name)]) for name in model}


Renaming = Sequence[tuple[str, str]]
"""Patterns and what replaces them, applied one after another."""


def _renamed(renaming: Renaming, name: str) -> tuple[str]:
    for pattern, replacement in renaming:
        name = re.sub(pattern, replacement, name)
    return (name,)


OWN = Layout()

_SAM_IN_TRANSFORMERS = (
    (r"^image_encoder\.blocks\.(\d+)\.norm", r"vision_encoder.layers.\1.layer_norm"),
    (r"^image_encoder\.patch_embed\.proj\.", "vision_encoder.patch_embed.projection."),
    (r"^image_encoder\.neck\.0\.", "vision_encoder.neck.conv1."),
    (r"^image_encoder\.neck\.1\.", "vision_encoder.neck.layer_norm1."),
    (r"^image_encoder\.neck\.2\.", "vision_encoder.neck.conv2."),
    (r"^image_encoder\.neck\.3\.", "vision_encoder.neck.layer_norm2."),
    (r"^image_encoder\.blocks\.", "vision_encoder.layers."),
    (r"^image_encoder\.", "vision_encoder."),
    (r"^prompt_encoder\.pe_layer\.positional_encoding_gaussian_matrix$",
     "shared_image_embedding.positional_embedding"),
    (r"\.point_embeddings\.", ".point_embed."),
    (r"\.mask_downscaling\.0\.", ".mask_embed.conv1."),
    (r"\.mask_downscaling\.1\.", ".mask_embed.layer_norm1."),
    (r"\.mask_downscaling\.3\.", ".mask_embed.conv2."),
    (r"\.mask_downscaling\.4\.", ".mask_embed.layer_norm2."),
    (r"\.mask_downscaling\.6\.", ".mask_embed.conv3."),
    (r"\.output_upscaling\.0\.", ".upscale_conv1."),
    (r"\.output_upscaling\.1\.", ".upscale_layer_norm."),
    (r"\.output_upscaling\.3\.", ".upscale_conv2."),
    (r"\.norm_final_attn\.", ".layer_norm_final_attn."),
    (r"(transformer\.layers\.\d+)\.norm", r"\1.layer_norm"),
    (r"(mlps\.\d+|_head)\.layers\.0\.", r"\1.proj_in."),
    (r"(mlps\.\d+|_head)\.layers\.2\.", r"\1.proj_out."),
    (r"(mlps\.\d+|_head)\.layers\.1\.", r"\1.layers.0."),
)  # fmt: skip

SAM_IN_TRANSFORMERS = Layout(
    sources=partial(_renamed, _SAM_IN_TRANSFORMERS),
    # A second copy.
    left_out=("prompt_encoder.shared_embedding.positional_embedding",),
)
"""Of a model of segment-anything's modules, as transformers' SamModel is saved."""

SAM_MED2D = Layout(sources=lambda name: (name.replace(".mlp.adapter.", ".Adapter."),))
"""SAM-Med2D's own."""

_SAM2 = (
    (r"^no_memory_embedding$", "no_mem_embed"),
    (r"^vision_encoder\.backbone\.", "image_encoder.trunk."),
    (r"^vision_encoder\.neck\.convs\.(\d+)\.", r"image_encoder.neck.convs.\1.conv."),
    (r"^(prompt_encoder\.shared_embedding|shared_image_embedding)\.positional_embedding$",
     "sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"),
    (r"^(prompt_encoder|mask_decoder)\.", r"sam_\1."),
    (r"\.patch_embed\.projection\.", ".patch_embed.proj."),
    (r"\.mask_embed\.conv1\.", ".mask_downscaling.0."),
    (r"\.mask_embed\.layer_norm1\.", ".mask_downscaling.1."),
    (r"\.mask_embed\.conv2\.", ".mask_downscaling.3."),
    (r"\.mask_embed\.layer_norm2\.", ".mask_downscaling.4."),
    (r"\.mask_embed\.conv3\.", ".mask_downscaling.6."),
    (r"\.upscale_conv1\.", ".output_upscaling.0."),
    (r"\.upscale_layer_norm\.", ".output_upscaling.1."),
    (r"\.upscale_conv2\.", ".output_upscaling.3."),
    (r"\.layer_norm_final_attn\.", ".norm_final_attn."),
    (r"\.layer_norm(\d)\.", r".norm\1."),
    (r"\.o_proj\.", ".out_proj."),
    (r"(mlps\.\d+|_head)\.layers\.0\.", r"\1.layers.1."),
    (r"(mlps\.\d+|_head)\.proj_out\.", r"\1.layers.2."),
    (r"\.proj_in\.", ".layers.0."),
    (r"\.proj_out\.", ".layers.1."),
)  # fmt: skip


def _sam2_sources(name: str) -> tuple[str, ...]:
    if name == "prompt_encoder.point_embed.weight":
        return tuple(f"sam_prompt_encoder.point_embeddings.{i}.weight" for i in range(4))
    return _renamed(_SAM2, name)


# What both leave out follows an object through a video.
SAM2 = Layout(
    sources=_sam2_sources,
    left_out=(
        "maskmem_tpos_enc",
        "memory_attention.",
        "memory_encoder.",
        "mask_downsample.",
        "no_mem_pos_enc",
        "no_obj_embed_spatial",
        "no_obj_ptr",
        "obj_ptr_proj.",
        "obj_ptr_tpos_proj.",
    ),
)
"""sam2's own, of a model of transformers' modules."""

SAM2_IN_TRANSFORMERS = Layout(
    left_out=(
        "mask_downsample.",
        "memory_attention.",
        "memory_encoder.",
        "memory_temporal_positional_encoding",
        "no_memory_positional_encoding",
        "no_object_pointer",
        "object_pointer_proj.",
        "occlusion_spatial_embedding_parameter",
        "temporal_positional_encoding_projection_layer.",
    ),
)
"""As transformers' Sam2Model or Sam2VideoModel is saved."""
