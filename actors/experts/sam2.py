"""Experts of the image part of Segment Anything 2.1 (Ravi et al., 2024, arXiv:2408.00714): SAM 2.1 and MedSAM2 (Ma et
al., 2025, arXiv:2504.03600), built from transformers' modules."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from actors.experts.promptable import Promptable, Rows
from actors.experts.protocol import Embedding, Preprocess
from actors.experts.sam2_config import Sam2Config
from actors.experts.two_way import Attention, MaskDecoder, Upscaling, layers
from umrg.frames import Size

Sam2Model = Any
"""transformers' class, which has no annotations."""

# sam2's own constants: ImageNet's mean and standard deviation in shares of 1.
_PIXEL_MEAN = (0.485, 0.456, 0.406)
_PIXEL_STD = (0.229, 0.224, 0.225)

_LARGEST_LOGIT = 32.0
"""sam2's predictor clamps the logits that it hands out, and so those that come back as a prompt."""
_TOP_LEFT, _BOTTOM_RIGHT = 2, 3
"""Labels of points that are a box's corners."""


def build_sam2(config: Sam2Config) -> Sam2Model:
    """The image part of a SAM 2.1 model of these sizes, in float32 with random weights."""
    import transformers  # takes longer to import than torch, and other experts need none of it

    dims = [config.encoder_dim << stage for stage in range(4)]
    backbone = {
        "hidden_size": config.encoder_dim,
        "num_attention_heads": config.encoder_heads,
        "blocks_per_stage": list(config.blocks),
        "embed_dim_per_stage": dims,
        "num_attention_heads_per_stage": [config.encoder_heads << stage for stage in range(4)],
        "window_size_per_stage": list(config.windows),
        "global_attention_blocks": list(config.global_layers),
        "window_positional_embedding_background_size": [config.background] * 2,
    }
    vision = {
        "backbone_config": backbone,
        "backbone_channel_list": dims[::-1],
        "fpn_hidden_size": config.prompt_dim,
    }
    decoder = {
        "hidden_size": config.prompt_dim,
        "mlp_dim": config.decoder_mlp_dim,
        "num_attention_heads": config.decoder_heads,
        "iou_head_hidden_dim": config.prompt_dim,
    }
    return transformers.Sam2Model(
        transformers.Sam2Config(
            vision_config=vision,
            prompt_encoder_config={"hidden_size": config.prompt_dim, "image_size": config.image_side},
            mask_decoder_config=decoder,
        )
    )


class Sam2Expert(Promptable):
    """A SAM 2.1 model as an expert (see `actors.experts.protocol.Expert`), as sam2's own image predictor uses it.

    The image is squeezed into the square input. A box is two points of their own labels before the other points. Each
    prompt gets the mask of highest score among three alternatives, whatever the model thinks of there being an object.
    `Decoded.logits` are not clamped.

    dtype: precision of the image encoder, which does nearly all the work; prompts and masks are always float32.
    """

    def __init__(
        self,
        model: Sam2Model,
        config: Sam2Config,
        *,
        name: str,
        preprocess: Preprocess = "published",
        device: str = "cpu",
        dtype: str = "float32",
        rows: int | None = None,
    ) -> None:
        super().__init__(
            model, model.vision_encoder, name=name, preprocess=preprocess, device=device, dtype=dtype, rows=rows
        )
        self.config = config
        self._sam2 = model
        with torch.inference_mode():
            self._mean, self._std = (
                torch.tensor(each, device=device).view(-1, 1, 1) for each in (_PIXEL_MEAN, _PIXEL_STD)
            )
            positions = model.get_image_wide_positional_embeddings().flatten(2)[0].mT.contiguous()
            self._decoder = mask_decoder(model.mask_decoder, positions)

    def _pixels(self, image: NDArray[np.uint8]) -> Tensor:
        side = self.config.image_side
        pixels = torch.from_numpy(image).to(self._device).permute(2, 0, 1)[None] / 255
        return (interpolate(pixels, (side, side), mode="bilinear", antialias=True) - self._mean) / self._std

    def _content(self, original: Size) -> Size:
        return Size(self.config.image_side, self.config.image_side)

    def _features(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """At a sixteenth, an eighth and a quarter of the input's resolution."""
        encoder, decoder = self._sam2.vision_encoder, self._sam2.mask_decoder
        stages = encoder.backbone(pixels).intermediate_hidden_states
        # The neck itself would also encode positions, for which an image alone has no use.
        coarsest, coarse, finer, finest = (
            convolution(stage.permute(0, 3, 1, 2))
            for convolution, stage in zip(encoder.neck.convs, reversed(stages), strict=True)
        )
        coarse = coarse + interpolate(coarsest, scale_factor=2.0, mode="nearest")
        without_memory = self._sam2.no_memory_embedding.view(1, -1, 1, 1)
        return coarse.float() + without_memory, decoder.conv_s1(finer.float()), decoder.conv_s0(finest.float())

    def _logits(self, features: Sequence[Tensor], rows: Rows) -> tuple[Tensor, Tensor]:
        points, labels = _as_points(rows)
        sparse, dense = self._sam2.prompt_encoder(
            input_points=points[:, None],
            input_labels=labels[:, None],
            input_boxes=None,
            input_masks=None if rows.masks is None else _clamped(rows.masks)[:, None],
        )
        # Without a mask as prompt, the same is added everywhere, and one image of all prompts remains one.
        added = dense if rows.masks is not None else dense[:1]
        return self._decoder(features[0] + added, features[1:], sparse[:, 0])

    def _to_image(self, logits: Tensor, embedding: Embedding) -> Tensor:
        original = (embedding.original.height, embedding.original.width)
        return interpolate(logits[:, None], original, mode="bilinear")[:, 0] > 0


def _as_points(rows: Rows) -> tuple[Tensor, Tensor]:
    """Points [B, k, 2] and labels [B, k] of all that is not a mask, the box's corners first."""
    points, labels = [], []
    if rows.boxes is not None:
        points.append(rows.boxes.view(-1, 2, 2))
        corners = torch.tensor([_TOP_LEFT, _BOTTOM_RIGHT], device=rows.boxes.device)
        labels.append(corners.expand(len(rows.boxes), -1))
    if rows.points is not None and rows.labels is not None:
        points.append(rows.points)
        labels.append(rows.labels.long())
    return torch.cat(points, dim=1), torch.cat(labels, dim=1)


def _clamped(masks: Tensor) -> Tensor:
    return masks.clamp(-_LARGEST_LOGIT, _LARGEST_LOGIT)


def mask_decoder(decoder: Any, positions: Tensor) -> MaskDecoder:
    """transformers' decoder, rearranged, without its score of there being an object. positions: [N, C], the encodings
    of the positions of the embedding's coarsest level."""
    transformer = decoder.transformer

    def attention(module: Any) -> Attention:
        return Attention(
            module.q_proj,
            module.k_proj,
            module.v_proj,
            module.o_proj,
            module.num_attention_heads,
            positions=positions,
        )

    return MaskDecoder(
        layers=layers(transformer.layers, attention, norm="layer_norm"),
        last=attention(transformer.final_attn_token_to_image),
        last_norm=transformer.layer_norm_final_attn,
        upscaling=Upscaling(first=decoder.upscale_conv1, norm=decoder.upscale_layer_norm, second=decoder.upscale_conv2),
        outputs=(decoder.obj_score_token.weight, decoder.iou_token.weight, decoder.mask_tokens.weight),
        hypernetworks=list(decoder.output_hypernetworks_mlps),
        scores=decoder.iou_prediction_head,
        alternatives=True,
    )
