"""Experts built from segment-anything's modules: SAM, MedSAM, and the bundled tiny expert."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from segment_anything import modeling
from segment_anything.modeling import ImageEncoderViT, PromptEncoder, Sam, TwoWayTransformer
from skimage.transform import resize
from torch import Tensor
from torch.nn import functional

from actors.experts.promptable import Promptable, Rows
from actors.experts.protocol import Embedding, Preprocess
from actors.experts.sam_config import SamConfig
from actors.experts.two_way import Attention, MaskDecoder, Upscaling, layers
from umrg.frames import Size
from umrg.mistake import Mistake

# segment-anything's own constants: ImageNet's mean and standard deviation in levels of 0 to 255.
_PIXEL_MEAN = (123.675, 116.28, 103.53)
_PIXEL_STD = (58.395, 57.12, 57.375)


def build_sam(config: SamConfig) -> Sam:
    """A Segment Anything model of these sizes, in float32 with random weights."""
    side, grid = config.image_side, config.grid
    return Sam(
        image_encoder=ImageEncoderViT(
            depth=config.encoder_depth,
            embed_dim=config.encoder_dim,
            img_size=side,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
            num_heads=config.encoder_heads,
            patch_size=config.patch,
            use_rel_pos=True,
            global_attn_indexes=config.global_layers,
            window_size=config.window,
            out_chans=config.prompt_dim,
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=config.prompt_dim,
            image_embedding_size=(grid, grid),
            input_image_size=(side, side),
            mask_in_chans=16,
        ),
        mask_decoder=modeling.MaskDecoder(
            num_multimask_outputs=config.multimask_outputs,
            transformer=TwoWayTransformer(
                depth=2,
                embedding_dim=config.prompt_dim,
                mlp_dim=config.decoder_mlp_dim,
                num_heads=config.decoder_heads,
            ),
            transformer_dim=config.prompt_dim,
            iou_head_hidden_dim=config.prompt_dim,
        ),
        pixel_mean=list(_PIXEL_MEAN),
        pixel_std=list(_PIXEL_STD),
    )


def content_size(original: Size, side: int) -> Size:
    """Size of an image whose longest side is scaled to `side`, rounded as by segment-anything's `ResizeLongestSide`
    (halves up), but at least 1 px."""
    scale = side / original.long_side
    return Size(*(max(1, int(length * scale + 0.5)) for length in (original.width, original.height)))


class SamExpert(Promptable):
    """A Segment Anything model as an expert (see `actors.experts.protocol.Expert`).

    preprocess: `published` scales the longest side to that of the input, normalises by fixed pixel statistics and pads,
    as SamPredictor does. `native` is MedSAM's own: it squeezes the image into the square input, scales its values to
    [0, 1], takes boxes only, and upsamples probabilities instead of logits.

    multimask: with True, each prompt gets the mask of highest score among the decoder's alternatives; this is the
    default if the decoder has alternatives, as in the published evaluation. With False it gets the decoder's single
    mask; this is the default for `native`, because MedSAM trains only that one.

    dtype: precision of the image encoder, which does nearly all the work; prompts and masks are always float32.
    """

    def __init__(
        self,
        sam: Sam,
        config: SamConfig,
        *,
        name: str,
        preprocess: Preprocess = "published",
        multimask: bool | None = None,
        device: str = "cpu",
        dtype: str = "float32",
        rows: int | None = None,
    ) -> None:
        if multimask and not config.multimask_outputs:
            raise Mistake(f"{name} has a single mask a prompt; leave multimask off")
        published = preprocess == "published"
        super().__init__(
            sam,
            sam.image_encoder,
            name=name,
            preprocess=preprocess,
            takes_points=published,
            takes_masks=published,
            device=device,
            dtype=dtype,
            rows=rows,
        )
        self.config = config
        self.multimask = (config.multimask_outputs > 0 and published) if multimask is None else multimask
        self._sam = sam
        with torch.inference_mode():
            positions = sam.prompt_encoder.get_dense_pe().flatten(2)[0].mT.contiguous()
            self._decoder = mask_decoder(sam.mask_decoder, positions, alternatives=self.multimask)

    def _pixels(self, image: NDArray[np.uint8]) -> Tensor:
        if self.preprocess == "native":
            return _squeezed(image, self.config.image_side)
        content = self._content(Size(image.shape[1], image.shape[0]))
        # As `ResizeLongestSide.apply_image`, which would leave nothing of an image that is thinner than a pixel then.
        side = (content.width, content.height)
        scaled = np.array(Image.fromarray(image).resize(side, Image.Resampling.BILINEAR))
        pixels = torch.from_numpy(scaled).to(self._device).permute(2, 0, 1)[None]
        padded: Tensor = self._sam.preprocess(pixels)
        return padded

    def _content(self, original: Size) -> Size:
        side = self.config.image_side
        return Size(side, side) if self.preprocess == "native" else content_size(original, side)

    def _features(self, pixels: Tensor) -> tuple[Tensor, ...]:
        return (self._sam.image_encoder(pixels),)

    def _logits(self, features: Sequence[Tensor], rows: Rows) -> tuple[Tensor, Tensor]:
        points = None if rows.points is None else (rows.points, rows.labels)
        masks = None if rows.masks is None else rows.masks[:, None]
        sparse, dense = self._sam.prompt_encoder(points=points, boxes=rows.boxes, masks=masks)
        # Without a mask as prompt, the same is added everywhere, and one image of all prompts remains one.
        added = dense if rows.masks is not None else dense[:1]
        return self._decoder(features[0] + added, (), sparse)

    def _to_image(self, logits: Tensor, embedding: Embedding) -> Tensor:
        original = (embedding.original.height, embedding.original.width)
        if self.preprocess == "native":
            shares = functional.interpolate(logits[:, None].sigmoid(), original, mode="bilinear")
            return shares[:, 0] > 0.5
        # As `Sam.postprocess_masks`, which would also scale to the size that the masks have.
        side, content = self.config.image_side, embedding.content
        upsampled = functional.interpolate(logits[:, None], (side, side), mode="bilinear")
        upsampled = upsampled[..., : content.height, : content.width]
        if content != embedding.original:
            upsampled = functional.interpolate(upsampled, original, mode="bilinear")
        masks: Tensor = upsampled[:, 0] > self._sam.mask_threshold
        return masks


def mask_decoder(decoder: modeling.MaskDecoder, positions: Tensor, *, alternatives: bool) -> MaskDecoder:
    """segment-anything's decoder, rearranged. positions: [N, C], the encodings of the embedding's positions.
    alternatives: as `MaskDecoder` has it."""
    transformer = decoder.transformer

    def attention(module: Any) -> Attention:
        return Attention(
            module.q_proj, module.k_proj, module.v_proj, module.out_proj, module.num_heads, positions=positions
        )

    first, norm, _, second, _ = decoder.output_upscaling
    return MaskDecoder(
        layers=layers(transformer.layers, attention, norm="norm"),
        last=attention(transformer.final_attn_token_to_image),
        last_norm=transformer.norm_final_attn,
        upscaling=Upscaling(first=first, norm=norm, second=second),
        outputs=(decoder.iou_token.weight, decoder.mask_tokens.weight),
        hypernetworks=list(decoder.output_hypernetworks_mlps),
        scores=decoder.iou_prediction_head,
        alternatives=alternatives,
    )


def _squeezed(image: NDArray[np.uint8], side: int) -> Tensor:
    """float32 [1, 3, side, side] in [0, 1], without keeping the aspect ratio: the preprocessing of MedSAM's own
    inference (bicubic with anti-aliasing, truncated to uint8, then min-max scaled over the image)."""
    square = resize(image, (side, side), order=3, preserve_range=True, anti_aliasing=True).astype(np.uint8)
    low, high = int(square.min()), int(square.max())
    pixels = (square - low) / max(high - low, 1e-8)
    return torch.from_numpy(pixels).float().permute(2, 0, 1)[None]
