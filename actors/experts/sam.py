"""Experts built from segment-anything's modules: SAM, MedSAM, and the bundled tiny expert."""

from collections.abc import Sequence
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

_IMAGES_AT_ONCE = 8
"""In one pass of an encoder on a GPU."""
_UPSAMPLED_AT_ONCE = 2**24
"""Pixels of masks in float32 at a time; sixteen masks of 100 megapixels would take 6 GiB."""

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
        with torch.inference_mode():
            self._positions: Tensor = self._sam.prompt_encoder.get_dense_pe()

    @property
    def takes_points(self) -> bool:
        return self.preprocess == "published"

    @property
    def images_at_once(self) -> int:
        # A CPU computes the larger ones no faster together; they would only keep prompts waiting, and their sums might
        # be rounded otherwise than training's.
        return 1 if self._sam.device.type == "cpu" else _IMAGES_AT_ONCE

    def embed(self, image: NDArray[np.uint8]) -> Embedding:
        (embedding,) = self.embed_all([image])
        return embedding

    def embed_all(self, images: Sequence[NDArray[np.uint8]]) -> list[Embedding]:
        for image in images:
            _check_image(image)
        step = self.images_at_once
        passes = (images[start : start + step] for start in range(0, len(images), step))
        return [embedding for each in passes for embedding in self._embedded(each)]

    def decode(
        self,
        embedding: Embedding,
        *,
        boxes: NDArray[np.floating] | None = None,
        points: NDArray[np.floating] | None = None,
        labels: NDArray[np.integer] | None = None,
        batch: int = 32,
    ) -> Decoded:
        """See `Expert.decode`. batch: how many prompts are decoded at a time; it affects only memory."""
        n = _prompt_count(boxes, points)
        if points is not None and not self.takes_points:
            raise Mistake("MedSAM's native preprocessing takes boxes only; drop the points, or use `published`")
        frame_labels = self._labels(labels, points)
        features = embedding.features.to(self._sam.device)
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
                    features,
                    None if frame_boxes is None else frame_boxes[part],
                    None if frame_points is None or frame_labels is None else (frame_points[part], frame_labels[part]),
                )
                decoded.logits[part] = logits.cpu().numpy()
                decoded.scores[part] = scores.cpu().numpy()
                self._upsample(logits, embedding, decoded.masks[part])
        return decoded

    def digest(self) -> str:
        return weights_digest(self._sam.state_dict())

    def _embedded(self, images: Sequence[NDArray[np.uint8]]) -> list[Embedding]:
        """The embeddings of one pass of the encoder."""
        side = self.config.image_side
        native = self.preprocess == "native"
        originals = [Size(width=image.shape[1], height=image.shape[0]) for image in images]
        with torch.inference_mode():
            rows = [_squeezed(image, side).to(self._sam.device) if native else self._padded(image) for image in images]
            padding = next_power_of_two(len(rows)) - len(rows)
            pixels = torch.cat(rows + padding * [torch.zeros_like(rows[0])])
            features = self._sam.image_encoder(pixels.to(self._dtype)).float()
        alone = len(features) == 1
        return [
            Embedding(
                features=features if alone else features[i : i + 1].clone(),  # a view would keep the others' memory too
                original=original,
                content=Size(side, side) if native else content_size(original, side),
            )
            for i, original in enumerate(originals)
        ]

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

    def _labels(self, labels: NDArray[np.integer] | None, points: NDArray[np.floating] | None) -> Tensor | None:
        """float32 [n, k], of all points."""
        if points is None:
            if labels is not None:
                raise Mistake("labels are of points; give the points, or drop the labels")
            return None
        if labels is None:
            return torch.ones(points.shape[:2], device=self._sam.device)
        if labels.shape != points.shape[:2]:
            raise Mistake(
                f"each point has a label; these are labels {list(labels.shape)} of points {list(points.shape)}"
            )
        if not np.isin(labels, (0, 1)).all():
            raise Mistake("a label is 1 for foreground or 0 for background")
        return torch.from_numpy(labels.astype(np.float32)).to(self._sam.device)

    def _best(
        self, features: Tensor, boxes: Tensor | None, points: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Logits [n, h, w] and score [n] of each prompt's best mask. Coordinates in the expert frame; points with their
        labels."""
        sparse, dense = self._sam.prompt_encoder(points=points, boxes=boxes, masks=None)
        logits, scores = self._sam.mask_decoder(
            image_embeddings=features,
            image_pe=self._positions,
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=self.multimask,
        )
        best = scores.argmax(dim=1)
        row = torch.arange(len(best), device=best.device)
        return logits[row, best], scores[row, best]

    def _upsample(self, logits: Tensor, embedding: Embedding, masks: NDArray[np.bool_]) -> None:
        """Write the masks of low-resolution logits [n, h, w] into bool [n, H, W], few enough at a time."""
        step = max(1, _UPSAMPLED_AT_ONCE // (embedding.original.height * embedding.original.width))
        for start in range(0, len(logits), step):
            part = slice(start, start + step)
            masks[part] = self._upsampled(logits[part], embedding).cpu().numpy()

    def _upsampled(self, logits: Tensor, embedding: Embedding) -> Tensor:
        """Masks, bool [n, H, W] in original pixels, of low-resolution logits [n, h, w]."""
        original = (embedding.original.height, embedding.original.width)
        if self.preprocess == "native":
            shares = functional.interpolate(logits[:, None].sigmoid(), original, mode="bilinear")
            return shares[:, 0] > 0.5
        content = (embedding.content.height, embedding.content.width)
        upsampled: Tensor = self._sam.postprocess_masks(logits[:, None], content, original)
        return upsampled[:, 0] > float(self._sam.mask_threshold)


def next_power_of_two(count: int) -> int:
    """The smallest of 1, 2, 4, 8 … that is at least `count`, which is at least 1."""
    return 1 << (count - 1).bit_length()


def _check_image(image: NDArray[np.uint8]) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise Mistake(f"an image is uint8 [H, W, 3], this one is {image.dtype} {list(image.shape)}")


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
