"""Experts of the published sizes on a GPU, with random weights."""

import numpy as np
import pytest
import torch

from actors.experts.protocol import Prompts
from bench.expert_shapes import SHAPES, SIDE, SMALL, asked, random_expert
from tests.gpu.conftest import ON_GPU, held

pytestmark = pytest.mark.gpu

NAMES = [name for name in (SHAPES if ON_GPU else SMALL) if name != "vit_h"]
DEVICE = "cuda" if ON_GPU else "cpu"
LENGTH = SIDE if ON_GPU else 112
ANSWERS = 16


@pytest.fixture(autouse=True)
def memory():
    """Each test begins with an empty GPU, and leaves one to the next."""
    before = held()
    yield
    assert held() - before < 1 << 20, "a test's tensors outlive it"


def flat(embedding):
    return torch.cat([level.cpu().flatten() for level in embedding.features])


def distance(found, wanted):
    """Relative to the norm of what is wanted."""
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_in_float32_draws_what_a_cpu_draws(name):
    """Up to rounding. Masks are compared from the same embedding, since random weights leave many logits near zero."""
    work = asked(ANSWERS, side=LENGTH)
    here, there = random_expert(name), random_expert(name, device=DEVICE)
    embedding = here.embed(work.image)
    assert distance(flat(there.embed(work.image)), flat(embedding)) < 1e-3
    prompts = work.prompts(embedding)
    (wanted,), (found,) = here.decode_all([prompts]), there.decode_all([prompts])
    assert found.drawn.device.type == DEVICE
    np.testing.assert_allclose(found.scores, wanted.scores, atol=1e-4)
    # Where two alternatives have nearly the same score, rounding may choose the other.
    off = np.abs(found.logits - wanted.logits).max((1, 2)) / np.abs(wanted.logits).max((1, 2))
    assert np.median(off) < 1e-4
    assert np.median((found.masks != wanted.masks).mean((1, 2))) < 1e-3


@pytest.mark.parametrize(("dtype", "bound"), [("float16", 1e-2), ("bfloat16", 5e-2)])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_embeds_nearly_what_float32_does(name, dtype, bound):
    image = asked(1, side=LENGTH).image
    exact, rounded = (random_expert(name, device=DEVICE, dtype=each).embed(image) for each in ("float32", dtype))
    assert all(level.dtype == torch.float32 for level in rounded.features)
    assert 0 < distance(flat(rounded), flat(exact)) < bound


@pytest.mark.parametrize("name", NAMES)
def test_a_request_has_the_same_masks_whatever_is_decoded_beside_it(name):
    """First, last and across the border of a pass; beside prompts of its own kind and of another."""
    expert = random_expert(name, device=DEVICE)
    works = [asked(count, side=LENGTH, seed=count) for count in (5, 16, 30)]
    mine, *others = [work.prompts(expert.embed(work.image)) for work in works]
    boxes = Prompts(embedding=others[0].embedding, boxes=others[0].boxes)
    (alone,) = expert.decode_all([mine])
    for requests in ([mine, *others], [*others, mine], [others[1], boxes, mine], [boxes, mine, others[0]]):
        together = expert.decode_all(requests)[next(i for i, each in enumerate(requests) if each is mine)]
        assert torch.equal(together.drawn, alone.drawn)
        assert np.array_equal(together.logits, alone.logits) and np.array_equal(together.scores, alone.scores)


@pytest.mark.parametrize("name", NAMES)
def test_images_are_embedded_together_as_alone(name):
    """Up to rounding; none keeps the memory of the others."""
    expert = random_expert(name, device=DEVICE)
    images = [asked(1, side=LENGTH, seed=i).image[: LENGTH - 8 * i] for i in range(3)]
    for image, together in zip(images, expert.embed_all(images), strict=True):
        alone = expert.embed(image)
        assert distance(flat(together), flat(alone)) < 5e-3
        assert (together.original, together.content) == (alone.original, alone.content)
        assert sum(level.untyped_storage().nbytes() for level in together.features) == together.nbytes


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_left_of_what_was_embedded_and_decoded(name):
    expert = random_expert(name, device=DEVICE)

    def once():
        work = asked(ANSWERS, side=LENGTH)
        assert len(expert.decode_all([work.prompts(expert.embed(work.image))])[0].masks) == ANSWERS

    once()
    before = held()
    for _ in range(3):
        once()
    assert held() - before < 1 << 16
