"""One prompt, many answers, one pass: the same numbers as a sequence for each answer."""

from pathlib import Path

import numpy as np
import pytest
import torch

from learner.reasoner import EncodedPrompt, Reasoner, load_reasoner
from learner.sft import reference_branches
from learner.shared_prefix import Branches, branch_logprobs, pack_groups
from umrg.sample import Sample, encode_png

TINY = Path(__file__).parents[2] / "models" / "tiny-reasoner"


@pytest.fixture(scope="module")
def reasoner() -> Reasoner:
    return load_reasoner(TINY)


def picture(seed: int, height: int = 112, width: int = 140):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def a_prompt(reasoner: Reasoner, query: str, seed: int) -> EncodedPrompt:
    return reasoner.encode(query, reasoner.encode_image(picture(seed)))


def answers(reasoner: Reasoner, *texts: str) -> list[torch.Tensor]:
    return [reasoner.completion_ids(text) for text in texts]


def logprobs_alone(reasoner: Reasoner, prompt: EncodedPrompt, answer: torch.Tensor) -> torch.Tensor:
    """The plain way: transformers' own forward over prompt and answer, its own positions and causal mask."""
    ids = torch.cat([prompt.token_ids, answer])[None]
    logits: torch.Tensor = reasoner.model(
        input_ids=ids,
        mm_token_type_ids=(ids == reasoner.model.config.image_token_id).int(),
        pixel_values=prompt.image.pixel_values,
        image_grid_thw=prompt.image.grid_thw,
    ).logits[0, len(prompt.token_ids) - 1 : -1]
    return logits.log_softmax(-1).gather(1, answer[:, None])[:, 0]


def test_packed_groups_give_the_log_probs_of_single_sequences(reasoner):
    groups = [
        Branches(
            prefix=a_prompt(reasoner, "Which organ makes bile?", 1),
            branches=answers(reasoner, "", "<think>It is here.</think>", "[1,2,3]"),
        ),
        Branches(
            prefix=a_prompt(reasoner, "What?", 2),
            branches=answers(reasoner, "<answer>a much longer answer, 123 456</answer>"),
        ),
    ]
    with torch.no_grad():
        packed = branch_logprobs(reasoner.model, pack_groups(groups, reasoner.model))
        alone = [logprobs_alone(reasoner, group.prefix, branch) for group in groups for branch in group.branches]
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-5, rtol=0)


def test_gradients_are_those_of_single_sequences(reasoner):
    group = Branches(
        prefix=a_prompt(reasoner, "Which organ makes bile?", 3),
        branches=answers(reasoner, "one two", "<think>three</think>", "4"),
    )
    weights = torch.randn(sum(map(len, group.branches)), generator=torch.Generator().manual_seed(0))
    packed = _gradients(reasoner, branch_logprobs(reasoner.model, pack_groups([group], reasoner.model)) @ weights)
    alone = torch.cat([logprobs_alone(reasoner, group.prefix, branch) for branch in group.branches])
    plain = _gradients(reasoner, alone @ weights)
    for name, gradient in plain.items():
        scale = gradient.abs().max().clamp(min=1e-12)
        assert ((packed[name] - gradient).abs().max() / scale) < 1e-4, name


def _gradients(reasoner: Reasoner, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    reasoner.model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in reasoner.model.named_parameters() if p.grad is not None}


def test_queries_about_one_image_share_its_tokens(reasoner):
    """In supervised training the prefix ends with the image; the rest of each prompt is not scored."""
    encoded = encode_png(picture(4))
    samples = [
        Sample(
            id=str(i),
            query=query,
            image_bytes=encoded,
            mask_bytes=(),
            box=(1, 2, 30, 40),
            points=((5, 6), (7, 8)),
            supercategory="",
            category="",
            modality="",
            reasoning="It lies here.",
        )
        for i, query in enumerate(["Which organ makes bile?", "Where does blood turn red?", "What?"])
    ]
    together = reference_branches(reasoner, samples)
    apart = [reference_branches(reasoner, [sample]) for sample in samples]
    image_tokens = int((together.prefix.token_ids == reasoner.model.config.image_token_id).sum())
    assert image_tokens == together.prefix.image.tokens
    assert len(together) < sum(map(len, apart)) - image_tokens
    with torch.no_grad():
        shared = branch_logprobs(reasoner.model, pack_groups([together], reasoner.model))
        single = branch_logprobs(reasoner.model, pack_groups(apart, reasoner.model))
    torch.testing.assert_close(shared, single, atol=1e-5, rtol=0)


def test_temperature_scales_the_distribution(reasoner):
    group = Branches(prefix=a_prompt(reasoner, "What?", 5), branches=answers(reasoner, "12"))
    packed = pack_groups([group], reasoner.model)
    with torch.no_grad():
        cold, warm = (branch_logprobs(reasoner.model, packed, temperature=t).sum() for t in (1.0, 100.0))
    vocabulary = reasoner.model.config.text_config.vocab_size
    assert warm != cold
    assert warm.item() == pytest.approx(-np.log(vocabulary) * len(packed.targets), rel=0.05)
