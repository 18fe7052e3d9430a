"""Experts built from segment-anything's modules: SAM, MedSAM, and the bundled tiny expert."""

from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from segment_anything.utils.transforms import ResizeLongestSide
from skimage.transform import resize
from torch import Tensor
from torch.nn import functional

from actors.experts.protocol import Decoded, Embedding, Preprocess
from actors.experts.sam_config import SamConfig
from actors.experts.weights import weights_digest
from umrg.frames import Size, rescale
from umrg.mistake import Mistake

# segment-anything's own constants: ImageNet's mean and standard deviation in levels of 0 to 255.
_PIXEL_MEAN = (123.675, 116.28, 103.53)
_PIXEL_STD = (58.395, 57.12, 57.375)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
        mask_decoder=MaskDecoder(
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


class SamExpert:
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
    ) -> None:
        if dtype not in DTYPES:
            raise Mistake(f"an expert's dtype is one of {', '.join(DTYPES)}, not {dtype!r}")
        if multimask and not config.multimask_outputs:
            raise Mistake(f"{name} has a single mask a prompt; leave multimask off")
        self.name = name
        self.preprocess: Preprocess = preprocess
        self.config = config
        default = config.multimask_outputs > 0 and preprocess == "published"
        self.multimask = default if multimask is None else multimask
        self._sam = sam.to(device).eval().requires_grad_(False)
        self._sam.image_encoder.to(DTYPES[dtype])
        self._dtype = DTYPES[dtype]

    @property
    def takes_points(self) -> bool:
        return self.preprocess == "published"

    def embed(self, image: NDArray[np.uint8]) -> Embedding:
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise Mistake(f"an image is uint8 [H, W, 3], this one is {image.dtype} {list(image.shape)}")
        original = Size(width=image.shape[1], height=image.shape[0])
        side = self.config.image_side
        with torch.inference_mode():
            if self.preprocess == "native":
                content, pixels = Size(side, side), _squeezed(image, side).to(self._sam.device)
            else:
                content, pixels = content_size(original, side), self._padded(image)
            features = self._sam.image_encoder(pixels.to(self._dtype)).float()
        return Embedding(features=features, original=original, content=content)

    def decode(
        self,
        embedding: Embedding,
        *,
        boxes: NDArray[np.floating] | None = None,
        points: NDArray[np.floating] | None = None,
        batch: int = 32,
    ) -> Decoded:
        """See `Expert.decode`. batch: how many prompts are decoded at a time; it affects only memory."""
        n = _prompt_count(boxes, points)
        if points is not None and not self.takes_points:
            raise Mistake("MedSAM's native preprocessing takes boxes only; drop the points, or use `published`")
        frame_boxes = self._in_expert_frame(boxes, embedding)
        frame_points = self._in_expert_frame(points, embedding)
        low = 4 * self.config.grid
        decoded = Decoded(
            masks=np.empty((n, embedding.original.height, embedding.original.width), dtype=np.bool_),
            scores=np.empty(n, dtype=np.float32),
            logits=np.empty((n, low, low), dtype=np.float32),
        )
        with torch.inference_mode():
            for start in range(0, n, batch):
                part = slice(start, min(start + batch, n))
                logits, scores = self._best(
                    embedding.features,
                    None if frame_boxes is None else frame_boxes[part],
                    None if frame_points is None else frame_points[part],
                )
                decoded.logits[part] = logits.cpu().numpy()
                decoded.scores[part] = scores.cpu().numpy()
                decoded.masks[part] = self._upsampled(logits, embedding).cpu().numpy()
        return decoded

    def digest(self) -> str:
        return weights_digest(self._sam.state_dict())

    def _padded(self, image: NDArray[np.uint8]) -> Tensor:
        """float32 [1, 3, side, side]: the longest side scaled, normalised, and padded on the right and below."""
        scaled = ResizeLongestSide(self.config.image_side).apply_image(image)
        pixels = torch.from_numpy(scaled).to(self._sam.device).permute(2, 0, 1)[None]
        padded: Tensor = self._sam.preprocess(pixels)
        return padded

    def _in_expert_frame(self, coordinates: NDArray[np.floating] | None, embedding: Embedding) -> Tensor | None:
        if coordinates is None:
            return None
        scaled = rescale(coordinates, embedding.original, embedding.content)
        return torch.from_numpy(scaled).to(device=self._sam.device, dtype=torch.float32)

    def _best(self, features: Tensor, boxes: Tensor | None, points: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits [n, h, w] and score [n] of each prompt's best mask. Coordinates in the expert frame."""
        labels = None if points is None else torch.ones(points.shape[:2], device=points.device)
        sparse, dense = self._sam.prompt_encoder(
            points=None if points is None else (points, labels), boxes=boxes, masks=None
        )
        logits, scores = self._sam.mask_decoder(
            image_embeddings=features,
            image_pe=self._sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=self.multimask,
        )
        best = scores.argmax(dim=1)
        row = torch.arange(len(best), device=best.device)
        return logits[row, best], scores[row, best]

    def _upsampled(self, logits: Tensor, embedding: Embedding) -> Tensor:
        """Masks, bool [n, H, W] in original pixels, of low-resolution logits [n, h, w]."""
        original = (embedding.original.height, embedding.original.width)
        if self.preprocess == "native":
            shares = functional.interpolate(logits[:, None].sigmoid(), original, mode="bilinear")
            return shares[:, 0] > 0.5
        content = (embedding.content.height, embedding.content.width)
        upsampled: Tensor = self._sam.postprocess_masks(logits[:, None], content, original)
        return upsampled[:, 0] > float(self._sam.mask_threshold)


def _squeezed(image: NDArray[np.uint8], side: int) -> Tensor:
    """float32 [1, 3, side, side] in [0, 1], without keeping the aspect ratio: the preprocessing of MedSAM's own
    inference (bicubic with anti-aliasing, truncated to uint8, then min-max scaled over the image)."""
    square = resize(image, (side, side), order=3, preserve_range=True, anti_aliasing=True).astype(np.uint8)
    low, high = int(square.min()), int(square.max())
    pixels = (square - low) / max(high - low, 1e-8)
    return torch.from_numpy(pixels).float().permute(2, 0, 1)[None]


def _prompt_count(boxes: NDArray[np.floating] | None, points: NDArray[np.floating] | None) -> int:
    """The number of prompts. Raises ValueError if there are none, or if a shape or a number is invalid."""
    if boxes is None and points is None:
        raise Mistake("an expert needs a prompt: give boxes, points, or both")
    if boxes is not None and (boxes.ndim != 2 or boxes.shape[1] != 4):
        raise Mistake(f"boxes are [n, 4] (XYXY), these are {list(boxes.shape)}")
    if points is not None and (points.ndim != 3 or points.shape[2] != 2 or points.shape[1] == 0):
        raise Mistake(f"points are [n, k, 2] (XY) with k at least 1, these are {list(points.shape)}")
    if boxes is not None and points is not None and len(boxes) != len(points):
        raise Mistake(f"a prompt of both has a box and its points; these are {len(boxes)} boxes, {len(points)} points")
    given = [prompt for prompt in (boxes, points) if prompt is not None]
    if not all(np.isfinite(prompt).all() for prompt in given):
        raise Mistake("boxes and points must be finite numbers")
    return len(given[0])
