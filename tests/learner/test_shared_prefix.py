"""The shared-prefix forward gives the numbers of one sequence per completion."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.attention import use_shared_prefix
from learner.sft import reference_branches
from learner.shared_prefix import Branches, TokenScores, branch_scores, micro_batches, pack, shares
from reasoner.model import Reasoner, load_reasoner
from reasoner.prompter import EncodedPrompt
from umrg.images import encode_png
from umrg.sample import Sample

pytestmark = pytest.mark.numeric

TINY = Path(__file__).parents[2] / "models" / "tiny-reasoner"


@pytest.fixture(scope="module")
def reasoner() -> Reasoner:
    loaded = load_reasoner(TINY)
    use_shared_prefix(loaded.model)
    return loaded


def scores(reasoner: Reasoner, trees: Sequence[Branches]) -> TokenScores:
    return branch_scores(reasoner.model, pack(trees, reasoner.model))


def picture(seed: int, height: int = 112, width: int = 140):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def a_prompt(reasoner: Reasoner, query: str, seed: int) -> EncodedPrompt:
    return reasoner.encode(query, reasoner.encode_image(picture(seed)))


def answers(reasoner: Reasoner, *texts: str) -> list[torch.Tensor]:
    return [reasoner.completion_ids(text) for text in texts]


def logprobs_alone(reasoner: Reasoner, prompt: EncodedPrompt, answer: torch.Tensor) -> torch.Tensor:
    """transformers' own forward over prompt and answer, with its own positions and causal mask."""
    ids = torch.cat([prompt.token_ids, answer])[None]
    logits: torch.Tensor = reasoner.model(
        input_ids=ids,
        mm_token_type_ids=(ids == reasoner.model.config.image_token_id).int(),
        pixel_values=prompt.image.pixel_values,
        image_grid_thw=prompt.image.grid_thw,
    ).logits[0, len(prompt.token_ids) - 1 : -1]
    return logits.log_softmax(-1).gather(1, answer[:, None])[:, 0]


def a_tree(reasoner: Reasoner, words: int, sides: tuple[int, int], lengths: Sequence[int], seed: int) -> Branches:
    """A query of `words` words about an image, and completions of random tokens. A completion of length 1 is the end
    token alone; one of the greatest length, 24, has no end token."""
    rng = np.random.default_rng(seed)
    image = reasoner.encode_image(picture(seed, *sides))
    usual = sorted(set(range(100, 900)) - set(reasoner.vision_tokens))
    branches = [
        torch.tensor([*rng.choice(usual, length - 1), reasoner.end_token_id if length < 24 else rng.choice(usual)])
        for length in lengths
    ]
    return Branches(prefix=reasoner.encode(" ".join(["where"] * words), image), branches=branches)


random_trees = st.lists(
    st.tuples(
        st.integers(1, 20),
        st.tuples(st.integers(56, 112), st.integers(56, 112)),
        st.lists(st.integers(1, 24), min_size=1, max_size=5),
        st.integers(0, 1000),
    ),
    min_size=1,
    max_size=3,
)


@pytest.fixture(scope="module")
def exact() -> Reasoner:
    """In double precision, except for the norms, to show exact equality. In float32 the order of summation, which
    depends on the processor, changes log-probs and gradients by 1e-5."""
    loaded = load_reasoner(TINY, dtype=torch.float64)
    use_shared_prefix(loaded.model)
    return loaded


@settings(max_examples=20)
@given(drawn=random_trees, room=st.integers(0, 60))
def test_log_probs_and_gradients_are_those_of_single_sequences(reasoner, exact, drawn, room):
    """For any size of image, query, tree and completions, and however they are packed and split."""
    trees = [a_tree(reasoner, *each) for each in drawn]
    # The smallest budget that holds each prompt with its longest completion, and some room.
    budget = room + max(len(tree.prefix.token_ids) + max(map(len, tree.branches)) for tree in trees)
    sequences = micro_batches(trees, budget)
    assert all(sum(map(len, sequence)) <= budget for sequence in sequences)
    parts = [part for sequence in sequences for part in sequence]
    assert sum(len(b) for part in parts for b in part.branches) == sum(len(b) for tree in trees for b in tree.branches)
    weights = torch.randn(sum(len(b) for p in parts for b in p.branches), generator=torch.Generator().manual_seed(0))
    for model, tolerance, gradient_tolerance in ((exact, 1e-10, 1e-5), (reasoner, 1e-4, 1e-4)):
        shared = torch.cat([scores(model, sequence).logprobs for sequence in sequences])
        alone = torch.cat([logprobs_alone(model, part.prefix, branch) for part in parts for branch in part.branches])
        torch.testing.assert_close(shared, alone, atol=tolerance, rtol=0)
        packed, plain = (_gradients(model, values @ weights.to(values.dtype)) for values in (shared, alone))
        for name, gradient in plain.items():
            difference = (packed[name] - gradient).abs().max()
            assert difference <= gradient_tolerance * gradient.abs().max() + 1e-12, name


def test_a_budget_for_less_than_one_answer_says_what_to_raise(reasoner):
    tree = a_tree(reasoner, 3, (112, 112), [20], 0)
    with pytest.raises(ValueError, match=r"do not fit into learner.micro_batch_tokens, 30; raise it"):
        micro_batches([tree], 30)


@given(work=st.lists(st.integers(0, 5000), min_size=1, max_size=40), ranks=st.integers(1, 8))
def test_ranks_have_about_the_same_work(work, ranks):
    """Every group once, and no rank more than Graham's bound; one rank takes all in their order."""
    taken = shares(work, ranks)
    assert sorted(i for share in taken for i in share) == list(range(len(work)))
    assert shares(work, 1) == [list(range(len(work)))]
    loads = [sum(work[i] for i in share) for share in taken]
    at_least = max(max(work), sum(work) / ranks)  # what no division could do better than
    assert max(loads) <= at_least + max(work) * (1 - 1 / ranks)


def test_dealt_by_work_beats_dealt_by_number():
    work = [3000, 100, 3000, 100, 3000, 100]
    by_work = max(sum(work[i] for i in share) for share in shares(work, 2))
    by_number = max(sum(work[rank::2]) for rank in range(2))
    assert by_work == 6000 and by_number == 9000


def test_groups_without_work_are_dealt_by_number():
    assert [len(share) for share in shares([0] * 8, 4)] == [2, 2, 2, 2]


def test_logits_in_chunks_are_logits_at_once(reasoner, monkeypatch):
    tree = a_tree(reasoner, 3, (112, 112), [20, 3, 24], 0)
    whole = branch_scores(reasoner.model, pack([tree], reasoner.model), entropy_learns=True)
    gradients = _gradients(reasoner, whole.logprobs.sum() + whole.entropy.sum())
    monkeypatch.setattr("learner.shared_prefix.LOGITS_BYTES", 4 * 7 * reasoner.model.config.text_config.vocab_size)
    chunked = branch_scores(reasoner.model, pack([tree], reasoner.model), entropy_learns=True)
    torch.testing.assert_close(chunked, whole, atol=1e-5, rtol=1e-5)
    for name, gradient in _gradients(reasoner, chunked.logprobs.sum() + chunked.entropy.sum()).items():
        assert (gradients[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, name


def test_entropy_is_that_of_the_sampling_distribution(reasoner):
    tree = a_tree(reasoner, 3, (112, 112), [9], 0)
    forbidden = torch.tensor(reasoner.vision_tokens)
    with torch.no_grad():
        packed = pack([tree], reasoner.model)
        flat = branch_scores(reasoner.model, packed, temperature=1e6, forbidden=forbidden).entropy
    allowed = reasoner.model.config.text_config.vocab_size - len(forbidden)
    torch.testing.assert_close(flat, torch.full((9,), float(np.log(allowed))), atol=1e-4, rtol=0)


def test_bfloat16_stays_within_its_own_rounding(reasoner):
    """The shared forward in bfloat16 is no farther from float32 than one sequence per completion in bfloat16 is, up to
    a factor: both round alike, in another order."""
    rounded = load_reasoner(TINY, dtype=torch.bfloat16)
    tree = a_tree(reasoner, 9, (112, 112), [20, 7, 24], 0)
    with torch.no_grad():
        exact = scores(reasoner, [tree]).logprobs
        alone = torch.cat([logprobs_alone(rounded, tree.prefix, branch).float() for branch in tree.branches])
        use_shared_prefix(rounded.model)
        shared = scores(rounded, [tree]).logprobs
    assert shared.dtype == torch.float32
    assert (shared - exact).abs().mean() < 2 * (alone - exact).abs().mean() + 1e-3


def _gradients(reasoner: Reasoner, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    reasoner.model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in reasoner.model.named_parameters() if p.grad is not None}


def test_queries_about_one_image_share_its_tokens(reasoner):
    """In supervised training the prefix is what the prompts share; the rest of each prompt is not scored."""
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
        shared = scores(reasoner, [together]).logprobs
        single = scores(reasoner, apart).logprobs
    torch.testing.assert_close(shared, single, atol=1e-4, rtol=0)


def test_temperature_scales_the_distribution(reasoner):
    tree = Branches(prefix=a_prompt(reasoner, "What?", 5), branches=answers(reasoner, "12"))
    packed = pack([tree], reasoner.model)
    with torch.no_grad():
        cold, warm = (branch_scores(reasoner.model, packed, temperature=t).logprobs.sum() for t in (1.0, 100.0))
    vocabulary = reasoner.model.config.text_config.vocab_size
    assert warm != cold
    assert warm.item() == pytest.approx(-np.log(vocabulary) * len(packed.targets), rel=0.05)
