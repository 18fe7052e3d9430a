"""The mask decoder of Segment Anything (Kirillov et al., 2023, arXiv:2304.02643), rearranged so that it costs less.

Its two-way transformer lets T tokens, about nine of a prompt, and the N positions of an image, some thousands, attend
to each other. The positions are what costs: with h heads of width d, each projection of them is of N by h·d by C. Since
T is less than d, it is cheaper to move the projections to the tokens:

    scores   (x W_k) · q      =  x · (W_k q)            values   A (x W_v)  =  (A x) W_v
    scores   (x W_q) · k      =  x · (W_q k)            output   A v W_o    =  A (v W_o)

for positions x and attention weights A. What remains at the positions are products with h·T columns. In the first layer
the positions of all prompts about one image are the same: there they are projected, once. Transposed convolutions whose
stride is their size are products too, and of the alternative masks only the one of highest score is made.

The results are those of the original modules up to rounding; a core takes a third of their time for SAM's sizes
(`python -m bench.segmenter`).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import ConvTranspose2d, LayerNorm, Linear
from torch.nn.functional import gelu, layer_norm, linear

Map = Callable[[Tensor], Tensor]

_FINEST_ON_CPU = 2**21
"""Numbers of the finest level, 8 MiB, that are made at a time on a CPU, one prompt at least. Larger blocks leave the
processor's caches, and are new pages of the system's each time instead of memory that was used before."""


class Attention:
    """Attention between tokens and positions, or among tokens. positions: [N, C], what is added to those of the
    image."""

    def __init__(self, query: Linear, key: Linear, value: Linear, out: Linear, heads: int, positions: Tensor) -> None:
        self._query, self._key, self._value, self._out, self._heads = query, key, value, out, heads
        self._width = query.out_features // heads
        self._query_of, self._key_of = self._by_head(query.weight), self._by_head(key.weight)  # [h, d, C]
        self._value_of, self._value_bias = self._by_head(value.weight), value.bias.view(heads, 1, -1)
        self._out_of = out.weight.T.reshape(heads, self._width, -1)  # [h, d, C]
        self._placed_queries = self._split(query(positions[None]))[0]  # [h, N, d]
        # The bias of keys adds the same to all positions, which softmax does not see.
        self._placed_keys = positions @ self._key_of.mT

    def among(self, tokens: Tensor, values: Tensor) -> Tensor:
        """[B, T, C], what tokens see of one another."""
        queries, keys = self._split(self._query(tokens)), self._split(self._key(tokens))
        weights = (queries @ keys.mT * self._width**-0.5).softmax(-1)
        return self._joined(weights @ self._split(self._value(values)))

    def of_image(self, tokens: Tensor, image: Tensor) -> Tensor:
        """[B, T, C], what tokens [B, T, C] see of images [B, N, C], or of the one [1, N, C] of all of them."""
        queries = self._split(self._query(tokens)) * self._width**-0.5  # [B, h, T, d]
        if len(image) == 1:
            keys = self._placed_keys + image @ self._key_of.mT
            values = image @ self._value_of.mT + self._value_bias
            scores = _per_head(queries, keys.mT)
            return self._joined(_per_head(scores.softmax(-1), values))
        scores = _per_head(queries, self._placed_keys.mT).flatten(1, 2)  # [B, h T, N]
        scores.baddbmm_(_per_head(queries, self._key_of).flatten(1, 2), image.mT)
        seen = (scores.softmax(-1) @ image).view(*queries.shape[:3], -1)  # of C, not yet values
        return self._joined(_per_head(seen, self._value_of.mT) + self._value_bias)

    def of_tokens(self, image: Tensor, tokens: Tensor, values: Tensor) -> Tensor:
        """[B, N, C], images and what they see of tokens [B, T, C] with values [B, T, C]. image: as in `of_image`."""
        keys = self._split(self._key(tokens)) * self._width**-0.5  # [B, h, T, d]
        if len(image) == 1:
            scores = _per_head(keys, (self._placed_queries + image @ self._query_of.mT).mT)
        else:
            scores = _per_head(keys, self._placed_queries.mT)  # [B, h, T, N]
            scores.flatten(1, 2).baddbmm_(_per_head(keys, self._query_of).flatten(1, 2), image.mT)
        weights = scores.softmax(2).flatten(1, 2)
        moved = _per_head(self._split(self._value(values)), self._out_of)  # [B, h, T, C]
        moved[:, 0] += self._out.bias  # the weights of a head sum to one
        return torch.baddbmm(image.expand(len(keys), -1, -1), weights.mT, moved.flatten(1, 2))

    def _by_head(self, weight: Tensor) -> Tensor:
        return weight.view(self._heads, self._width, -1)

    def _split(self, projected: Tensor) -> Tensor:
        """[B, n, h d] as [B, h, n, d]."""
        return projected.view(*projected.shape[:-1], self._heads, self._width).transpose(1, 2)

    def _joined(self, seen: Tensor) -> Tensor:
        """The output projection of [B, h, T, d]."""
        joined: Tensor = self._out(seen.transpose(1, 2).flatten(2))
        return joined


def _per_head(tokens: Tensor, matrices: Tensor) -> Tensor:
    """[B, h, T, m], contiguous, of tokens [B, h, T, d] and each head's matrix [d, m], which is not copied for each
    prompt."""
    batch, heads, count, _ = tokens.shape
    product = tokens.transpose(0, 1).reshape(heads, batch * count, -1) @ matrices
    return product.view(heads, batch, count, -1).transpose(0, 1).contiguous()


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer of the two-way transformer."""

    among_tokens: Attention
    of_image: Attention
    mlp: Map
    of_tokens: Attention
    norms: Sequence[LayerNorm]
    """After each of the four."""
    first: bool
    """Whether the tokens come as they are: they are attended to without their prompts added, and replaced."""

    def __call__(self, tokens: Tensor, image: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, T, C] and images [B, N, C]. prompts: [B, T, C], the tokens as they were at the start."""
        first, second, third, fourth = self.norms
        if self.first:
            tokens = first(self.among_tokens.among(tokens, tokens))
        else:
            tokens = first(tokens + self.among_tokens.among(tokens + prompts, tokens))
        tokens = second(tokens + self.of_image.of_image(tokens + prompts, image))
        tokens = third(tokens + self.mlp(tokens))
        return tokens, fourth(self.of_tokens.of_tokens(image, tokens + prompts, tokens))


def layers(modules: Iterable[Any], attention: Callable[[Any], Attention], *, norm: str) -> list[Layer]:
    """The layers of a transformer of segment-anything or transformers. attention: of one of their modules. norm: what
    the four norms are called, before their number."""
    return [
        Layer(
            among_tokens=attention(each.self_attn),
            of_image=attention(each.cross_attn_token_to_image),
            mlp=each.mlp,
            of_tokens=attention(each.cross_attn_image_to_token),
            norms=[getattr(each, f"{norm}{i}") for i in (1, 2, 3, 4)],
            first=each.skip_first_layer_pe,
        )
        for each in modules
    ]


@dataclass(frozen=True, kw_only=True)
class Upscaling:
    """From [B, N, C] to four times the resolution, in the order of positions: [B, N, 4, 4, C / 8], with the quarters of
    a position and their quarters."""

    first: ConvTranspose2d
    norm: Any
    """A layer norm over channels, of which weight, bias and eps are read."""
    second: ConvTranspose2d

    def __call__(self, image: Tensor, finer: Sequence[Tensor]) -> Tensor:
        """finer: what is added after the first and before it is normalised, [B, N, 4, C / 4], and after the second,
        [B, N, 4, 4, C / 8], if the model has such; or [1, …] of all."""
        doubled = quartered(image, self.first)
        if finer:
            doubled += finer[0]
        normal = layer_norm(doubled, doubled.shape[-1:], self.norm.weight, self.norm.bias, self.norm.eps)
        again = quartered(gelu(normal), self.second)
        if finer:
            again += finer[1]
        return gelu(again)


def quartered(image: Tensor, convolution: ConvTranspose2d) -> Tensor:
    """[…, 4, C'] of […, C]: a transposed convolution of size and stride 2, whose outputs do not overlap."""
    assert convolution.kernel_size == convolution.stride == (2, 2) and convolution.bias is not None
    weight = convolution.weight.permute(2, 3, 1, 0).flatten(0, 2)  # [2 2 C', C]
    return linear(image, weight, convolution.bias.repeat(4)).view(*image.shape[:-1], 4, -1)


def _by_quarters(pixels: Tensor, times: int) -> Tensor:
    """[B, C, h, w] in the order of positions, which have four quarters, which have, where `times` is 2, four again."""
    batch, channels, height, width = pixels.shape
    side = 1 << times
    split = pixels.view(batch, channels, height // side, *(2,) * times, width // side, *(2,) * times)
    rows, columns = range(2, 3 + times), range(3 + times, 4 + 2 * times)
    order = [axis for pair in zip(rows, columns, strict=True) for axis in pair]
    return split.permute(0, *order, 1).reshape(batch, -1, *(4,) * times, channels)


@dataclass(frozen=True, kw_only=True)
class MaskDecoder:
    """The decoder of masks. Like everything here it works in inference mode, on tensors of one precision and device."""

    layers: Sequence[Layer]
    last: Attention
    """Of the tokens to the image, after the layers."""
    last_norm: LayerNorm
    upscaling: Upscaling
    outputs: Sequence[Tensor]
    """[o, C] each, the tokens that go before those of a prompt: the last are one for each mask, and before these is
    that of the scores."""
    hypernetworks: Sequence[Map]
    """From the token of a mask to the weights of its channels."""
    scores: Map
    """From the token of the scores to the score of each mask."""
    alternatives: bool
    """Whether a prompt gets the best of the alternative masks, which are all but the first, or the first."""

    def __call__(self, image: Tensor, finer: Sequence[Tensor], prompts: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, 4h, 4w] of each prompt's mask, and its score [B].

        image: [B, C, h, w], or [1, C, h, w] if all prompts are about one image. finer: none, or of the same images at
        twice and four times the resolution, [B, C / 4, 2h, 2w] and [B, C / 8, 4h, 4w]. prompts: [B, T, C].
        """
        height, width = image.shape[2:]
        outputs = torch.cat(list(self.outputs))
        tokens = given = torch.cat([outputs.expand(len(prompts), -1, -1), prompts], dim=1)
        positions = image.flatten(2).mT.contiguous()
        for layer in self.layers:
            tokens, positions = layer(tokens, positions, given)
        tokens = self.last_norm(tokens + self.last.of_image(tokens + given, positions))
        masks = len(self.hypernetworks)
        start = len(outputs) - masks
        kept = slice(1, None) if self.alternatives else slice(0, 1)
        scores = self.scores(tokens[:, start - 1])[:, kept]
        best, rows = scores.argmax(1), torch.arange(len(scores), device=scores.device)
        weights = torch.stack([made(tokens[:, start + i]) for i, made in enumerate(self.hypernetworks)], dim=1)
        logits = self._drawn(positions, finer, weights[:, kept][rows, best])
        logits = logits.view(-1, height, width, 2, 2, 2, 2).permute(0, 1, 3, 5, 2, 4, 6)
        return logits.reshape(-1, 4 * height, 4 * width), scores[rows, best]

    def _drawn(self, positions: Tensor, finer: Sequence[Tensor], weights: Tensor) -> Tensor:
        """Logits [B, 16 N, 1] by position, quarter and quarter of that. weights: [B, c], of the channels."""
        levels = [_by_quarters(level, times) for times, level in enumerate(finer, 1)]
        finest = 16 * positions.shape[1] * weights.shape[1]  # numbers of a prompt
        step = max(1, _FINEST_ON_CPU // finest) if positions.device.type == "cpu" else len(positions)
        parts = []
        for part in (slice(start, start + step) for start in range(0, len(positions), step)):
            own = [level if len(level) == 1 else level[part] for level in levels]
            parts.append(self.upscaling(positions[part], own).flatten(1, 3) @ weights[part, :, None])
        return torch.cat(parts)
