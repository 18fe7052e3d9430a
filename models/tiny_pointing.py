"""Third stage of training the tiny reasoner: the language model learns to locate what the query asks for.

Linear heads read the last prompt token's hidden state before the last layer. One predicts a distribution over the image
tokens, whose target is the fraction of each token that the coarse box covers. The other classifies each of the eight
coordinates of box and points into bins of 4 pixels. In the language-model loss of supervised fine-tuning, the
coordinates' digits are a small part among many tokens that are easy to predict. Trained directly, on short prompts and
with image features that are computed once, localisation is learnt much sooner, and the last layer only has to write it
as digits. The heads are discarded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from rich.progress import track
from torch.nn import functional

from learner.attention import use_shared_prefix
from learner.shared_prefix import Branches, pack
from models.tiny_vision import covered_cells
from reasoner.model import Reasoner
from reasoner.prompter import EncodedImage, EncodedPrompt
from umrg.dataset import Dataset
from umrg.frames import Frame
from umrg.sample import Sample

BINS = 56  # per coordinate, of 4 pixels in an image of side 224
COORDINATES = 8  # four of the box and two of each point


@dataclass(frozen=True, kw_only=True)
class PointingRecipe:
    """Hyperparameters of this stage."""

    steps: int = 900
    images: int = 6000
    """How many images are used, with all their queries."""
    batch: int = 24
    """Images per step."""
    lr: float = 1e-3
    weight_decay: float = 0.01
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class _Queries:
    """The queries about one image, with their targets."""

    prompts: Branches
    """The prompts, which share the image as their prefix."""
    tokens: torch.Tensor
    """Features [n, d] of the image tokens from the vision tower."""
    covered: torch.Tensor
    """Target distribution [queries, n] over the image tokens."""
    bins: torch.Tensor
    """Target bins [queries, 8] of the coordinates."""


def learn_to_point(reasoner: Reasoner, dataset: Dataset, recipe: PointingRecipe) -> float:
    """Train the language model in place. Returns the fraction of queries, over the last 20 steps, whose most likely
    image token overlaps the box. All images must have the same size."""
    images = dataset.rows_by_image()
    rng = np.random.default_rng(recipe.seed)
    chosen = rng.permutation(len(images))[: recipe.images]
    queries = [_queries(reasoner, dataset.samples(images[i])) for i in track(chosen, "looking")]
    text = reasoner.model.model.language_model.train()
    places = queries[0].covered.shape[1]
    head = torch.nn.Linear(text.config.hidden_size, places + COORDINATES * BINS)
    parameters = [*text.parameters(), *head.parameters()]
    adam = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, recipe.lr, total_steps=recipe.steps, pct_start=0.1)
    hits = []
    for step in track(range(recipe.steps), "pointing"):
        batch = [queries[i] for i in rng.integers(len(queries), size=recipe.batch)]
        found = head(_last_states(reasoner, batch))
        covered, bins = torch.cat([q.covered for q in batch]), torch.cat([q.bins for q in batch])
        logits = found[:, :places]
        measured = found[:, places:].unflatten(1, (COORDINATES, BINS))
        pointing = -(logits.log_softmax(-1) * covered).sum(-1).mean()
        measuring = functional.cross_entropy(measured.flatten(0, 1), bins.flatten())
        loss = pointing + measuring
        adam.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        schedule.step()
        hits.append((covered.gather(1, logits.argmax(-1, keepdim=True)) > 0).float().mean().item())
        if (step + 1) % 50 == 0:
            print(
                f"step {step + 1}/{recipe.steps}  hits {np.mean(hits[-50:]):.3f}  measuring {measuring.item():.3f}",
                flush=True,
            )
    return float(np.mean(hits[-20:]))


def _queries(reasoner: Reasoner, samples: Sequence[Sample]) -> _Queries:
    image = reasoner.encode_image(samples[0].image())
    with torch.no_grad():
        tokens = reasoner.model.model.visual(image.pixel_values, image.grid_thw).pooler_output
    prompts = [reasoner.encode(sample.query, image).token_ids for sample in samples]
    start = int((prompts[0] == reasoner.model.config.image_token_id).nonzero().max()) + 1
    # Each branch has one scored token, the end token, and the state that predicts it is that of the last prompt token.
    end = torch.tensor([reasoner.end_token_id])
    covered = torch.stack([torch.from_numpy(covered_cells(image, sample.box)).mean(dim=1) for sample in samples])
    return _Queries(
        prompts=Branches(
            prefix=EncodedPrompt(token_ids=prompts[0][:start], image=image),
            branches=[torch.cat([prompt[start:], end]) for prompt in prompts],
            unscored=[len(prompt) - start for prompt in prompts],
        ),
        tokens=tokens,
        covered=covered / covered.sum(dim=1, keepdim=True),
        bins=torch.stack([_bins(image, sample) for sample in samples]),
    )


def _bins(image: EncodedImage, sample: Sample) -> torch.Tensor:
    frames = image.frames
    box = frames.box(sample.box, Frame.ORIGINAL, Frame.MODEL)
    first, second = frames.points(sample.points, Frame.ORIGINAL, Frame.MODEL)
    side = max(frames.model.width, frames.model.height)
    return (torch.tensor([*box, *first, *second]) * BINS / side).long().clamp(0, BINS - 1)


def _last_states(reasoner: Reasoner, batch: Sequence[_Queries]) -> torch.Tensor:
    """State [queries, d] of each prompt's last token before the last layer, normalised as at that layer's input."""
    use_shared_prefix(reasoner.model)
    packed = pack([queries.prompts for queries in batch], reasoner.model)
    states = reasoner.model.model(
        input_ids=packed.token_ids,
        position_ids=packed.position_ids,
        shared_prefix=packed.layout,
        mm_encoder_outputs={"image": SimpleNamespace(pooler_output=[queries.tokens for queries in batch])},
        output_hidden_states=True,
        use_cache=False,
    ).hidden_states[-2]
    last = states[0, packed.sources]
    return functional.rms_norm(last, last.shape[-1:])
