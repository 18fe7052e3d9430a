"""The prompt: what it says, and what a query cannot do to it."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from umrg.frames import Frame
from umrg.prompts import PromptSpec, PromptStyle, clean_query, prompt_messages, prompt_text

QUERY = "Which organ would be enlarged in long-standing alcohol use?"
COMPACT = PromptSpec(style=PromptStyle.COMPACT)


@pytest.mark.parametrize("spec", [PromptSpec(), PromptSpec(think=False), COMPACT])
def test_a_prompt_is_one_turn_of_an_image_and_a_text(spec: PromptSpec) -> None:
    [message] = prompt_messages(QUERY, spec)
    assert message["role"] == "user"
    image, text = message["content"]
    assert image == {"type": "image"}
    assert text == {"type": "text", "text": prompt_text(QUERY, spec)}


def test_the_full_prompt_asks_for_reasoning_and_an_answer() -> None:
    text = prompt_text(QUERY, PromptSpec())
    for word in (QUERY, "<think>", "</think>", "<answer>", "</answer>", '"bbox"', '"points_1"', '"points_2"'):
        assert word in text
    assert '<think>reasoning</think><answer>{"bbox": [x1, y1, x2, y2],' in text


def test_without_thinking_the_full_prompt_asks_for_the_answer_only() -> None:
    text = prompt_text(QUERY, PromptSpec(think=False))
    assert "think" not in text
    for word in (QUERY, "<answer>", "</answer>", '"bbox"', '"points_1"', '"points_2"'):
        assert word in text


def test_the_full_prompt_says_in_which_frame_to_answer() -> None:
    texts = {frame: prompt_text(QUERY, PromptSpec(frame=frame)) for frame in Frame}
    assert "0 to 1000" in texts[Frame.RELATIVE]
    assert "original size" in texts[Frame.ORIGINAL]
    assert "as you see it" in texts[Frame.MODEL]


def test_the_compact_prompt_is_the_query() -> None:
    assert prompt_text(f"  {QUERY}\n", COMPACT) == QUERY


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|im_end|>", "<|vision_start|>", "<image>", "<video>"])
def test_special_tokens_are_taken_out_of_the_query(token: str) -> None:
    assert clean_query(f"Which{token}organ {token}is it?") == "Which organ is it?"


@pytest.mark.parametrize(
    "query",
    [
        "a <|im<|x|>_end|> b",
        "a <|im<image>_end|> b",
        "a <|<|<|a|>|>|> b",
        "a <|image_pad|><|image_pad|> b",
        "a <|im\n_end|> b",
    ],
)
def test_special_tokens_within_special_tokens_are_taken_out_too(query: str) -> None:
    assert clean_query(query) == "a b"


parts = st.sampled_from(["<|", "|>", "<image>", "<video>", "im_end", "<im", "age>", "<", "|", ">", " ", "x"])


@given(st.lists(parts, max_size=20).map("".join))
def test_no_special_token_survives(query: str) -> None:
    cleaned = clean_query(query)
    assert "<image>" not in cleaned and "<video>" not in cleaned and "<|im_end|>" not in cleaned
    assert clean_query(cleaned) == cleaned


@pytest.mark.parametrize("query", ["{query}", "{unit} {example}", "{0} {", "}", "{{x}}", "%s $x"])
def test_braces_in_a_query_mean_nothing(query: str) -> None:
    text = prompt_text(query, PromptSpec())
    assert f"Question: {query}\n" in text
    assert text.replace(query, QUERY, 1) == prompt_text(QUERY, PromptSpec())


def test_an_ordinary_query_stays_as_it_is() -> None:
    query = "Is the ratio < 0.5 or > 0.7 | which side?"
    assert clean_query(query) == query


@pytest.mark.parametrize("style", PromptStyle)
@pytest.mark.parametrize("think", [True, False])
@pytest.mark.parametrize("frame", Frame)
def test_a_model_folder_keeps_its_spec(tmp_path: Path, style: PromptStyle, think: bool, frame: Frame) -> None:
    spec = PromptSpec(style=style, think=think, frame=frame)
    spec.save(tmp_path)
    assert PromptSpec.of_model(tmp_path) == spec


def test_a_folder_without_a_spec_is_asked_as_qwen_is(tmp_path: Path) -> None:
    assert PromptSpec.of_model(tmp_path) == PromptSpec(style=PromptStyle.FULL, think=True, frame=Frame.MODEL)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "Invalid JSON"),
        (b'{"thinking": true}', "thinking"),
        (b'{"frame": "mm"}', "frame"),
        (b"\xff", ""),
    ],
)
def test_a_damaged_spec_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "prompt.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"prompt\.json is not a prompt spec: .*{said}"):
        PromptSpec.of_model(tmp_path)
