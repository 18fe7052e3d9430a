"""A completion's text in pieces, however its tokens cut its characters."""

from functools import cache

from hypothesis import given
from hypothesis import strategies as st

from reasoner.prompter import Prompter, Writing, load_prompter
from tests.conftest import TINY_REASONER


@cache
def prompter() -> Prompter:
    return load_prompter(TINY_REASONER)


def pieces(ids, size=1):
    """What is told after each so many tokens, and at the end."""
    writing = Writing(prompter())
    return [writing.add(ids[i : i + size]) for i in range(0, len(ids), size)] + [writing.end()]


def test_a_character_is_told_when_its_last_token_has_come():
    ids = prompter().processor.tokenizer.encode("a€😀b")
    assert [piece for piece in pieces(ids) if piece] == ["a", "€", "😀", "b"]


def test_what_ends_within_a_character_is_told_at_the_end():
    ids = prompter().processor.tokenizer.encode("a€")[:-1]
    assert pieces(ids) == ["a", "", "", "\ufffd"]


def test_special_tokens_are_not_told_and_tags_are():
    ids = prompter().processor.tokenizer.encode("<think>x</think><|im_end|>")
    assert pieces(ids) == ["<think>", "x", "</think>", "", ""]


@given(text=st.text(max_size=40), size=st.integers(1, 5))
def test_pieces_of_any_text_together_are_the_text(text, size):
    ids = prompter().processor.tokenizer.encode(text)
    assert "".join(pieces(ids, size)) == prompter().completion_text(ids)


@given(ids=st.lists(st.integers(0, 1023), max_size=40), size=st.integers(1, 5))
def test_pieces_of_any_tokens_together_are_their_text(ids, size):
    """Of tokens that are no characters too."""
    told = ""
    for piece in pieces(ids, size):
        told += piece
        assert prompter().completion_text(ids).startswith(told)
    assert told == prompter().completion_text(ids)
