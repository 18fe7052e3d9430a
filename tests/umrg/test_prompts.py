"""The prompt: what it says, and what a query cannot do to it."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from umrg.frames import Frame
from umrg.prompts import (
    PromptSpec,
    PromptStyle,
    ReasonerConfig,
    chosen_prompt,
    clean_query,
    prompt_messages,
    prompt_text,
    special_tokens,
)

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
        (b'{"style": "fulll"}', "style must be full, compact"),
        (b'{"style": 3}', "style must be full, compact"),
        (b'{"style": "no place"}', "style must be full, compact"),
        (b'{"style": "{query} <|im_end|>"}', "special tokens, and this has <|im_end|>"),
        (b'{"think": "perhaps"}', "think"),
        (b"[]", "Input should be an object"),
        (b"\xff", ""),
    ],
)
def test_a_damaged_spec_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "prompt.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"prompt\.json is not a prompt spec: .*{re.escape(said)}"):
        PromptSpec.of_model(tmp_path)


def asked_by(template: str, query: str = QUERY, *, think: bool = True, frame: Frame = Frame.MODEL) -> str:
    return prompt_text(query, PromptSpec(style=template, think=think, frame=frame))


def test_a_template_is_filled_with_the_question_and_the_form_of_the_answer() -> None:
    template = "Wo ist es? {query}\n---\n{answer}\n---\nDanke."
    before, form, after = asked_by(template).split("\n---\n")
    assert (before, after) == (f"Wo ist es? {QUERY}", "Danke.")
    assert form.startswith("What to write: exactly one <think> block") and form in prompt_text(QUERY, PromptSpec())
    plain = asked_by(template, think=False, frame=Frame.RELATIVE)
    assert "think" not in plain and "0 to 1000" in plain


def test_a_template_without_a_place_for_the_form_says_it_itself() -> None:
    assert asked_by("{query}\nAntworten Sie mit <answer>{...}</answer>.") == (
        f"{QUERY}\nAntworten Sie mit <answer>{{...}}</answer>."
    )


def test_other_braces_of_a_template_are_plain_text() -> None:
    assert (
        asked_by('{"q": "{query}"} {} {{x} {0} { } {Query}') == f'{{"q": "{QUERY}"}} {{}} {{{{x}} {{0}} {{ }} {{Query}}'
    )


@pytest.mark.parametrize("query", ["{query}", "{answer}", "{0} {", "%s", "\\1"])
def test_places_in_a_query_are_no_places(query: str) -> None:
    assert asked_by("a {answer} b {query} c", query) == asked_by("a {answer} b {query} c").replace(QUERY, query)


@given(
    st.text(alphabet="<|>imend_ x", max_size=12),
    st.sampled_from(["<|{query}", "{query}|>", "<{query}>", "<|im_{query}"]),
)
def test_template_and_query_make_no_special_token_together(query: str, template: str) -> None:
    assert not special_tokens(asked_by(template, query))


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{query} {query}", "{query} exactly once, and this has it 2 times"),
        ("{query} {answer} {answer}", "{answer} at most once, and this has it 2 times"),
        ("<|im_start|>user {query}<|im_end|>", "no special tokens, and this has <|im_start|>, <|im_end|>"),
        ("<image> {query}", "this has <image>"),
        ("{query} <|vision_start|><|image_pad|>", "this has <|vision_start|>, <|image_pad|>"),
        ("<|{query}|>", "no special tokens"),
    ],
)
def test_a_template_that_cannot_be_asked_is_refused(tmp_path: Path, template: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        PromptSpec(style=template)
    with pytest.raises(ValueError, match=re.escape(said)):
        chosen_prompt(template)
    (tmp_path / "own.txt").write_text(template)
    with pytest.raises(ValueError, match=rf"own\.txt: .*{re.escape(said)}"):
        chosen_prompt(str(tmp_path / "own.txt"))


@pytest.mark.parametrize(
    "content",
    [
        "Où est-ce ? {query}\n{answer}\n".encode(),
        b"\xef\xbb\xbf" + "Où est-ce ? {query}\r\n{answer}\r\n".encode(),
        "\n\nOù est-ce ? {query}\n{answer}".encode(),
    ],
)
def test_a_template_is_read_alike_from_any_editor(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "own.txt").write_bytes(content)
    assert chosen_prompt(tmp_path / "own.txt") == "Où est-ce ? {query}\n{answer}"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b" \n\t\n", "is empty"),
        ("Où {query}".encode("latin-1"), "no text in UTF-8"),
        ("{query} wo?".encode("utf-16"), "UTF-8"),
        ("{query} wo?".encode("utf-16-le"), "UTF-8"),
        (b"{query}\0", "UTF-8"),
        (b"Where is it?", "{query} exactly once, and this has it no times"),
        (b"Where? {Query}", "{query} exactly once"),
        (b"{query}" + b" " * (1 << 20), "prompt's length"),
    ],
)
def test_a_file_that_is_no_template_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "own.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"own\.txt.*{re.escape(said)}"):
        chosen_prompt(tmp_path / "own.txt")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("fulll", "no file 'fulll'; did you mean 'full'?"),
        ("Compact", "no file 'Compact'; did you mean 'compact'?"),
        ("prompts/none.txt", "no file 'prompts/none.txt'; give full, compact"),
        ("where? " * 1000, "no file 'where? where?"),
        ("a\0b", "no file"),
        (3, "3 is no prompt"),
        ({"file": "x"}, "is no prompt"),
        (".", "is a folder"),
    ],
)
def test_what_is_neither_style_nor_template_is_answered_with_what_to_give(value: object, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        chosen_prompt(value)


def test_a_configuration_holds_the_text_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.txt").write_text("Wo? {query} 例", encoding="utf-8")
    asked = ReasonerConfig(model=Path("models"), prompt="own.txt")
    Path("own.txt").unlink()
    assert asked.prompt == "Wo? {query} 例" == asked.spec().style
    assert ReasonerConfig.model_validate(asked.model_dump(mode="json")) == asked
    assert ReasonerConfig(model=Path("models"), prompt="full").prompt is PromptStyle.FULL


templates = st.text(st.characters(exclude_categories=["Cs"]), max_size=40).map(
    lambda text: "a" + re.sub(r"[{}<>|]", "", text) + "{query}"
)


@given(templates)
def test_a_model_folder_keeps_the_words_it_was_trained_on(
    tmp_path_factory: pytest.TempPathFactory, template: str
) -> None:
    folder = tmp_path_factory.getbasetemp()
    spec = PromptSpec(style=template, frame=Frame.RELATIVE)
    spec.save(folder)
    assert PromptSpec.of_model(folder) == spec
    (folder / "prompt.json").unlink()


def test_a_prompt_has_a_name_for_reports() -> None:
    assert PromptSpec().name == "full" and COMPACT.name == "compact"
    assert re.fullmatch(r"template [0-9a-f]{12}: Wo\? \{query\}", PromptSpec(style="Wo?\n{query}").name)
    assert PromptSpec(style="one two three four five six seven eight nine {query}").name.endswith(" seven eight …")


@pytest.mark.parametrize(("content", "said"), [(b"{", "damaged JSON"), (b"[1]", "keys and values"), (b"", "empty")])
def test_a_damaged_config_is_named_where_there_is_no_spec(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"config\.json .*{said}"):
        PromptSpec.of_model(tmp_path)


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "configs" / "prompts").iterdir()))
def test_the_templates_that_come_with_the_project_can_be_asked(path: Path) -> None:
    assert QUERY in asked_by(str(chosen_prompt(path)))
