"""What files are that were handed over in place of others."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

from umrg.foreign_files import first_bytes, what_it_is
from umrg.safetensors_header import read_header

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 375042383\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "an empty file"),
        (POINTER, "a Git LFS pointer.*git lfs pull"),
        (b"/annex/objects/SHA256E-s375042383--4d7a.pth\n", "a git-annex pointer"),
        (b"<!DOCTYPE html><title>Sign in</title>", r"a web page \(HTML\)"),
        (b"\xef\xbb\xbf\n <HTML>", r"a web page \(HTML\)"),
        (b"PK\x03\x04rest", "a zip archive"),
        (b"\x1f\x8b\x08", "a gzip archive"),
        (b"GGUF\x03", "a GGUF file"),
        (b"Invalid username or password.", "a text file that begins 'Invalid username or password.'"),
        ("Zugriff verweigert für ".encode() * 100, "a text file that begins 'Zugriff verweigert"),
    ],
)
def test_a_file_is_called_what_it_is(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "file").write_bytes(content)
    assert re.match(said, what_it_is(tmp_path / "file") or "")


@pytest.mark.parametrize("content", [b"\x80\x02}q", b"\x80", bytes(40), b"\xff\xd8\xff\xe0", b"a\x00b"])
def test_of_other_bytes_nothing_is_said(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    assert what_it_is(tmp_path / "file") is None


def test_what_is_no_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no file"):
        first_bytes(tmp_path / "none")
    with pytest.raises(ValueError, match="is a folder"):
        first_bytes(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="is no ordinary file"):
        first_bytes(tmp_path / "pipe")


def test_what_may_not_be_read_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("secret")

    def refuse(path: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied")

    # Whoever runs the tests as root may read everything.
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ValueError, match="file cannot be read: Permission denied"):
        first_bytes(tmp_path / "file")


def test_a_header_tells_shapes_and_metadata(tmp_path: Path) -> None:
    sizes = {"a": (2, 3), "empty": (0, 4), "s": ()}
    tensors = {name: np.zeros(size, dtype=np.float32) for name, size in sizes.items()}
    save_file(tensors, tmp_path / "f.safetensors", metadata={"name": "x"})
    header = read_header(tmp_path / "f.safetensors")
    assert header.shapes == sizes
    assert header.metadata == {"name": "x"}


WHOLE = save({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, dtype=np.float16)})


@given(length=st.integers(0, len(WHOLE) - 1))
def test_a_file_that_is_cut_anywhere_is_no_safetensors_file(
    tmp_path_factory: pytest.TempPathFactory, length: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.safetensors"
    path.write_bytes(WHOLE[:length])
    with pytest.raises(ValueError, match=r"cut\.safetensors (is cut short|is an empty file|is a text|is not)"):
        read_header(path)


@given(at=st.integers(0, len(WHOLE) - 1), byte=st.integers(0, 255))
def test_a_changed_byte_gives_a_header_or_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, at: int, byte: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "changed.safetensors"
    path.write_bytes(WHOLE[:at] + bytes([byte]) + WHOLE[at + 1 :])
    try:
        read_header(path)
    except ValueError as error:
        assert "changed.safetensors" in str(error) and "\n" not in str(error)


@pytest.mark.parametrize(
    "tree",
    [
        [],
        {"a": 1},
        {"a": {"shape": [2], "data_offsets": [0]}},
        {"a": {"shape": "x", "data_offsets": [0, 8]}},
        {"a": {"shape": [2], "data_offsets": [8, 0]}},
        {"a": {"shape": [2], "data_offsets": ["0", "8"]}},
        {"__metadata__": 3},
    ],
)
def test_a_header_that_says_nothing_sound_is_damaged(tmp_path: Path, tree: object) -> None:
    text = json.dumps(tree).encode()
    (tmp_path / "f").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(ValueError, match=r"damaged header|is not a safetensors file"):
        read_header(tmp_path / "f")


def test_a_pointer_in_place_of_weights_is_called_that(tmp_path: Path) -> None:
    (tmp_path / "f.safetensors").write_bytes(POINTER)
    with pytest.raises(ValueError, match="is a Git LFS pointer"):
        read_header(tmp_path / "f.safetensors")
