"""What experts of the Segment Anything family have in common: checks, frames, and passes of few shapes.

To add one of another architecture, write its class upon `Promptable` in a module of its own: how it prepares an image,
what its encoder and its decoder compute, and how logits become a mask of the image.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import pad

from actors.experts.protocol import Decoded, Embedding, NotFinite, Preprocess, Prompts
from actors.experts.weights import weights_digest
from umrg.frames import Size, rescale
from umrg.mistake import Mistake

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

PREPARED = 1
"""Version of the code that prepares images: of decoding (`umrg.images`), scaling and normalising them. Raise it when an
image's embedding changes, so that none that was kept before is used."""

_IMAGES_AT_ONCE = 8
"""In one pass of an encoder on a GPU."""
_ROWS_ON_CPU = 8
"""Most prompts of a pass on a CPU, where a pass has the prompts of one request. Larger ones gain nothing there: what
they compute leaves the processor's caches."""
ROWS_ON_GPU = 32
"""Prompts of every pass on a GPU, of as many requests as it takes."""
_UPSAMPLED_AT_ONCE = 2**24
"""Pixels of masks in float32 at a time; sixteen masks of 100 megapixels would take 6 GiB."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The prompts of one pass, in the expert frame and in float32 on its device."""

    boxes: Tensor | None
    """[B, 4] XYXY."""
    points: Tensor | None
    """[B, k, 2] XY."""
    labels: Tensor | None
    """[B, k], of all points: 1 foreground, 0 background."""
    masks: Tensor | None
    """[B, h, w], low-resolution logits."""

    def __len__(self) -> int:
        return len(next(each for each in self._tensors() if each is not None))

    def __getitem__(self, part: slice) -> "Rows":
        boxes, points, labels, masks = (each if each is None else each[part] for each in self._tensors())
        return Rows(boxes=boxes, points=points, labels=labels, masks=masks)

    def padded(self, count: int) -> "Rows":
        """With rows of zeros after them, `count` in all."""
        missing = count - len(self)
        boxes, points, labels, masks = (
            each if each is None else pad(each, (0, 0) * (each.ndim - 1) + (0, missing)) for each in self._tensors()
        )
        return Rows(boxes=boxes, points=points, labels=labels, masks=masks)

    @classmethod
    def joined(cls, rows: "Sequence[Rows]") -> "Rows":
        """One after another; they are of the same kinds."""
        columns = zip(*(each._tensors() for each in rows), strict=True)
        boxes, points, labels, masks = (
            torch.cat([each for each in column if each is not None]) if column[0] is not None else None
            for column in columns
        )
        return cls(boxes=boxes, points=points, labels=labels, masks=masks)

    @property
    def kinds(self) -> tuple[tuple[int, ...] | None, ...]:
        """Shapes of a prompt's parts."""
        return tuple(None if each is None else tuple(each.shape[1:]) for each in self._tensors())

    def _tensors(self) -> tuple[Tensor | None, ...]:
        return self.boxes, self.points, self.labels, self.masks


class Promptable(ABC):
    """An expert (`actors.experts.protocol.Expert`) but for what its model does.

    model: the whole of it; only its weights are hashed. encoder: what embeds images, in `dtype`; everything else is in
    float32. takes_points, takes_masks: as `Expert` has them. rows: prompts of each pass of the decoder, whatever they
    belong to; by default as the device likes it.
    """

    def __init__(
        self,
        model: Module,
        encoder: Module,
        *,
        name: str,
        preprocess: Preprocess = "published",
        takes_points: bool = True,
        takes_masks: bool = True,
        device: str = "cpu",
        dtype: str = "float32",
        rows: int | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise Mistake(f"an expert's dtype is one of {', '.join(DTYPES)}, not {dtype!r}")
        self.name = name
        self.preprocess: Preprocess = preprocess
        self.takes_points, self.takes_masks = takes_points, takes_masks
        self._model = model.to(device).eval().requires_grad_(False)
        encoder.to(DTYPES[dtype])
        # A GPU would round what float32 convolutions and products are of to ten bits, and masks would not be those of a
        # CPU. Products are not rounded by default, but NVIDIA's own containers have them so.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        self._device, self._dtype = torch.device(device), DTYPES[dtype]
        self._rows = rows if rows is not None or self._device.type == "cpu" else ROWS_ON_GPU

    @property
    def images_at_once(self) -> int:
        # A CPU computes the larger ones no faster together; they would only keep prompts waiting, and their sums might
        # be rounded otherwise than training's.
        return 1 if self._device.type == "cpu" else _IMAGES_AT_ONCE

    @abstractmethod
    def _pixels(self, image: NDArray[np.uint8]) -> Tensor:
        """The prepared image, float32 [1, 3, side, side], of uint8 [H, W, 3]."""

    @abstractmethod
    def _content(self, original: Size) -> Size:
        """Size of the scaled image within the input, without padding."""

    @abstractmethod
    def _features(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """[b, C, h, w] each, of prepared images [b, 3, side, side] in the encoder's precision."""

    @abstractmethod
    def _logits(self, features: Sequence[Tensor], rows: Rows) -> tuple[Tensor, Tensor]:
        """Logits [B, h, w] of each prompt's best mask, and its score [B]. features: float32, [B, C, h, w] each; or
        [1, C, h, w] where all prompts are about one image."""

    @abstractmethod
    def _to_image(self, logits: Tensor, embedding: Embedding) -> Tensor:
        """Masks, bool [n, H, W] in original pixels, of logits [n, h, w]."""

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
        masks: NDArray[np.floating] | None = None,
    ) -> Decoded:
        prompts = Prompts(embedding=embedding, boxes=boxes, points=points, labels=labels, masks=masks)
        (decoded,) = self.decode_all([prompts])
        return decoded

    def decode_all(self, requests: Sequence[Prompts]) -> list[Decoded]:
        for request in requests:
            self._check(request)
        with torch.inference_mode():
            rows = [self._in_expert_frame(request) for request in requests]
            found: list[Decoded | None] = [None] * len(requests)
            for alike in self._together(rows):
                decoded = self._decoded([requests[i].embedding for i in alike], [rows[i] for i in alike])
                for i, each in zip(alike, decoded, strict=True):
                    found[i] = each
        return [each for each in found if each is not None]

    def digest(self) -> str:
        return weights_digest(self._model.state_dict())

    def fingerprint(self) -> str:
        prepared = self._pixels(np.zeros((2, 3, 3), dtype=np.uint8)).shape
        of_class = (type(self).__module__, type(self).__qualname__, tuple(prepared))
        told = (of_class, self.digest(), self.preprocess, self._dtype, self._device.type, PREPARED)
        return hashlib.sha256(repr(told).encode()).hexdigest()

    def _embedded(self, images: Sequence[NDArray[np.uint8]]) -> list[Embedding]:
        """The embeddings of one pass of the encoder."""
        originals = [Size(width=image.shape[1], height=image.shape[0]) for image in images]
        with torch.inference_mode():
            rows = [self._pixels(image).to(self._device) for image in images]
            padding = next_power_of_two(len(rows)) - len(rows)
            pixels = torch.cat(rows + padding * [torch.zeros_like(rows[0])])
            levels = [level.float() for level in self._features(pixels.to(self._dtype))]
            if not all(bool(level[: len(rows)].isfinite().all()) for level in levels):
                raise self._not_finite()
        alone = len(pixels) == 1
        return [
            Embedding(
                # A view would keep the others' memory too.
                features=tuple(level if alone else level[i : i + 1].clone() for level in levels),
                original=original,
                content=self._content(original),
            )
            for i, original in enumerate(originals)
        ]

    def _together(self, rows: Sequence[Rows]) -> Iterator[list[int]]:
        """The requests that share passes, by their indices: on a CPU each has its own."""
        if self._rows is None:
            yield from ([i] for i in range(len(rows)))
            return
        alike: dict[object, list[int]] = {}
        for i, each in enumerate(rows):
            alike.setdefault(each.kinds, []).append(i)
        yield from alike.values()

    def _decoded(self, embeddings: Sequence[Embedding], requests: Sequence[Rows]) -> Iterable[Decoded]:
        """Prompts of the same kinds, through the decoder one pass after another. embeddings: one for each request."""
        features = [tuple(level.to(self._device).float() for level in each.features) for each in embeddings]
        owners = [i for i, each in enumerate(requests) for _ in range(len(each))]
        rows = Rows.joined(requests)
        logits, scores = [], []
        for start in range(0, len(rows), most := self._rows or _ROWS_ON_CPU):
            part = rows[start : start + most]
            count = self._rows or next_power_of_two(len(part))
            # Whether rows are of one image is seen in no fixed pass, whose numbers would be rounded otherwise.
            of_rows = features[0] if self._rows is None else _of_rows(features, owners[start : start + most], count)
            found = self._logits(of_rows, part.padded(count))
            logits.append(found[0][: len(part)])
            scores.append(found[1][: len(part)])
        sizes = [len(each) for each in requests]
        parts = zip(embeddings, torch.cat(logits).split(sizes), torch.cat(scores).split(sizes), strict=True)
        decoded = [
            Decoded(
                drawn=self._drawn(low, embedding),
                scores=score.cpu().numpy(),
                logits=low.cpu().numpy(),
            )
            for embedding, low, score in parts
        ]
        # A mask of logits that are none is empty, which would be a bad answer's.
        if not all(np.isfinite(each.scores).all() and np.isfinite(each.logits).all() for each in decoded):
            raise self._not_finite()
        return decoded

    def _not_finite(self) -> NotFinite:
        return NotFinite(
            f"{self.name} computes numbers that are not finite in {str(self._dtype).removeprefix('torch.')}; set "
            "segmenter.dtype to float32 or, if it is, check the weights"
        )

    def _drawn(self, logits: Tensor, embedding: Embedding) -> Tensor:
        """Masks, bool [n, H, W], few enough at a time."""
        size = embedding.original
        step = max(1, _UPSAMPLED_AT_ONCE // (size.height * size.width))
        return torch.cat([self._to_image(part, embedding) for part in logits.split(step)])

    def _in_expert_frame(self, prompts: Prompts) -> Rows:
        """Prompts as the decoder takes them, with the labels of all points."""
        embedding, points, labels = prompts.embedding, prompts.points, prompts.labels
        if points is not None and labels is None:
            labels = np.ones(points.shape[:2], dtype=np.int64)
        boxes, placed = (
            None if given is None else rescale(given, embedding.original, embedding.content)
            for given in (prompts.boxes, points)
        )
        tensors = (
            None if each is None else torch.from_numpy(np.ascontiguousarray(each)).to(self._device, torch.float32)
            for each in (boxes, placed, labels, prompts.masks)
        )
        boxes_, points_, labels_, masks_ = tensors
        return Rows(boxes=boxes_, points=points_, labels=labels_, masks=masks_)

    def _check(self, prompts: Prompts) -> None:
        """Raise ValueError for what cannot be decoded."""
        count = _prompt_count(prompts)
        if prompts.points is not None and not self.takes_points:
            raise Mistake(f"{self.name} takes boxes only with preprocess {self.preprocess!r}; drop the points")
        _check_labels(prompts)
        if prompts.masks is None:
            return
        if not self.takes_masks:
            raise Mistake(f"{self.name} takes no mask as a prompt with preprocess {self.preprocess!r}; drop it")
        low = [4 * side for side in prompts.embedding.features[0].shape[2:]]
        if list(prompts.masks.shape) != [count, *low] or not np.isfinite(prompts.masks).all():
            raise Mistake(
                f"a mask as prompt is finite logits as they were decoded before, here {[count, *low]}; these are "
                f"{list(prompts.masks.shape)}"
            )


def next_power_of_two(count: int) -> int:
    """The smallest of 1, 2, 4, 8 … that is at least `count`, which is at least 1."""
    return 1 << (count - 1).bit_length()


def _of_rows(features: Sequence[tuple[Tensor, ...]], owners: Sequence[int], count: int) -> list[Tensor]:
    """Each level of the features of `count` rows, by the indices of their owners; those beyond them are padding."""
    chosen = [*owners, *[owners[-1]] * (count - len(owners))]
    return [torch.cat([features[i][level] for i in chosen]) for level in range(len(features[chosen[0]]))]


def _check_image(image: NDArray[np.uint8]) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise Mistake(f"an image is uint8 [H, W, 3], this one is {image.dtype} {list(image.shape)}")


def _check_labels(prompts: Prompts) -> None:
    labels, points = prompts.labels, prompts.points
    if labels is None:
        return
    if points is None:
        raise Mistake("labels are of points; give the points, or drop the labels")
    if labels.shape != points.shape[:2]:
        raise Mistake(f"each point has a label; these are labels {list(labels.shape)} of points {list(points.shape)}")
    if not np.isin(labels, (0, 1)).all():
        raise Mistake("a label is 1 for foreground or 0 for background")


def _prompt_count(prompts: Prompts) -> int:
    """The number of prompts. Raises ValueError if there are none, or if a shape or a number is invalid."""
    boxes, points = prompts.boxes, prompts.points
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
    if not len(given[0]):
        raise Mistake("an expert needs a prompt; there is none among these")
    return len(given[0])
