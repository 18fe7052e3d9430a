"""Folders of other ages and states than the bundled one: read as the library reads them, or refused when loaded."""

import json
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from reasoner.model import load_reasoner
from reasoner.prompter import Prompter, load_prompter
from umrg.frames import Size
from umrg.prompts import PromptSpec

TINY = Path(__file__).parents[2] / "models" / "tiny-reasoner"
AREA = {"shortest_edge": 3136, "longest_edge": 100352}


def tiny_with(folder: Path, images: dict[str, Any], *, nested: bool) -> Path:
    """A copy whose image processor says other things. nested: in processor_config.json, as today's transformers writes
    it; else in a preprocessor_config.json of its own, as older ones did."""
    shutil.copytree(TINY, folder, copy_function=lambda source, target: Path(target).symlink_to(source))
    whole = json.loads((TINY / "processor_config.json").read_text())
    own = {key: value for key, value in whole.pop("image_processor").items() if key != "size"} | images
    (folder / "processor_config.json").unlink()
    if nested:
        (folder / "processor_config.json").write_text(json.dumps({**whole, "image_processor": own}))
    else:
        (folder / "preprocessor_config.json").write_text(json.dumps(own))
    return folder


READ: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "size with edges": ({"size": AREA}, (3136, 100352)),
    "pixels beside": ({"min_pixels": 6272, "max_pixels": 50176}, (6272, 50176)),
    "pixels and size of pixels": (
        {"min_pixels": 6272, "max_pixels": 50176, "size": {"min_pixels": 1, "max_pixels": 2}},
        (6272, 50176),
    ),
    "pixels over edges": ({"max_pixels": 50176, "size": AREA}, (3136, 50176)),
    "longest edge and least pixels": ({"min_pixels": 6272, "size": {"longest_edge": 50176}}, (6272, 50176)),
    "pixels that are null": ({"min_pixels": None, "max_pixels": None, "size": AREA}, (3136, 100352)),
    "no size": ({}, (3136, 1003520)),
    "fast, as it was called": ({"image_processor_type": "Qwen2VLImageProcessorFast", "size": AREA}, (3136, 100352)),
    "slow, as it is called": ({"image_processor_type": "Qwen2VLImageProcessorPil", "size": AREA}, (3136, 100352)),
    "crop and pad, which it does not heed": (
        {"do_center_crop": True, "crop_size": {"height": 56, "width": 56}, "do_pad": True, "size": AREA},
        (3136, 100352),
    ),
}
SIZES = [(1, 1), (1, 200), (200, 1), (28, 28), (13, 9), (700, 500), (447, 449), (30, 1400), (1400, 30), (56, 55)]


@pytest.mark.parametrize(
    ("kind", "nested"), [*((kind, False) for kind in READ), ("size with edges", True), ("pixels beside", True)]
)
def test_a_processor_of_another_age_resizes_as_we_count(tmp_path: Path, kind: str, nested: bool) -> None:
    images, area = READ[kind]
    prompter = load_prompter(tiny_with(tmp_path / "model", images, nested=nested))
    assert (prompter.resize.min_pixels, prompter.resize.max_pixels) == area
    for width, height in SIZES:
        image = prompter.encode_image(np.zeros((height, width, 3), dtype=np.uint8))
        assert image.frames.model == prompter.resize.model_size(Size(width, height)), (width, height)
        assert image.tokens == prompter.image_tokens(Size(width, height))


@cache
def any_prompter() -> Prompter:
    """One of its own, for a test that changes it."""
    return load_prompter(TINY)


@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 600), height=st.integers(1, 600), least=st.integers(1, 60_000), more=st.integers(0, 60_000))
def test_whatever_the_areas_the_processor_resizes_as_we_count(width: int, height: int, least: int, more: int) -> None:
    assume(max(width, height) <= 200 * min(width, height))
    prompter = any_prompter()
    prompter.processor.image_processor.size = {"shortest_edge": least, "longest_edge": least + more}
    image = prompter.encode_image(np.zeros((height, width, 3), dtype=np.uint8))
    assert image.frames.model == prompter.resize.model_size(Size(width, height))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "size of pixels": (
        {"size": {"min_pixels": 3136, "max_pixels": 200704}},
        'write the least and the largest area, in pixels: "size": {"shortest_edge": 3136, "longest_edge": 200704}',
    ),
    "longest edge alone": ({"size": {"longest_edge": 200704}}, 'has size {"longest_edge": 200704}'),
    "shortest edge alone": ({"size": {"shortest_edge": 3136}}, 'has size {"shortest_edge": 3136}'),
    "height and width": ({"size": {"height": 224, "width": 224}}, 'has size {"height": 224, "width": 224}'),
    "a number": ({"size": 224}, "by which transformers resizes nothing"),
    "a list": ({"size": [224, 224]}, "by which transformers resizes nothing"),
    "other keys": ({"size": {"area": 3136}}, "size must have one of"),
    "all keys at once": ({"size": {**AREA, "min_pixels": 1, "max_pixels": 2}}, "size must have one of"),
    "text": ({"size": {"shortest_edge": "3136", "longest_edge": "200704"}}, "both are whole numbers"),
    "fractions": ({"size": {"shortest_edge": 3136.0, "longest_edge": 200704.0}}, "both are whole numbers"),
    "zero": ({"size": {"shortest_edge": 0, "longest_edge": 200704}}, "both are whole numbers"),
    "the wrong way round": ({"size": {"shortest_edge": 200704, "longest_edge": 3136}}, "the least first"),
    "no resize": ({"do_resize": False, "size": AREA}, "has do_resize false"),
    "another patch": (
        {"patch_size": 16},
        "the processor cuts patches of (16, 2, 2) (size, merge, temporal), the model",
    ),
    "another merge": ({"merge_size": 1}, "the processor cuts patches of (14, 1, 2)"),
    "another time": ({"temporal_patch_size": 1}, "the processor cuts patches of (14, 2, 1)"),
    "a patch as text": ({"patch_size": "14"}, "the processor cuts patches of ('14', 2, 2)"),
    "another class": ({"image_processor_type": "CLIPImageProcessor"}, "has image_processor_type 'CLIPImageProcessor'"),
}


def refusal(folder: Path, load: Callable[[Path], object] = load_prompter) -> str:
    with pytest.raises(ValueError, match=re.escape(f"{folder} cannot be loaded as a reasoner: ")) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "nested"), [*((kind, False) for kind in REFUSED), ("size of pixels", True), ("height and width", True)]
)
def test_a_processor_that_resizes_otherwise_is_refused(tmp_path: Path, kind: str, nested: bool) -> None:
    images, said = REFUSED[kind]
    assert said in refusal(tiny_with(tmp_path / "model", images, nested=nested))


def edited(folder: Path, name: str, **changes: object) -> None:
    tree = json.loads((folder / name).read_text())
    (folder / name).unlink()
    (folder / name).write_text(json.dumps({**tree, **changes}))


def replaced(folder: Path, name: str, text: str) -> None:
    (folder / name).unlink()
    (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: (f / "chat_template.jinja").unlink(), "has no chat_template.jinja"),
        (lambda f: replaced(f, "chat_template.jinja", "{{ messages[0].role }}"), "makes no place for one image"),
        (lambda f: replaced(f, "chat_template.jinja", "{% for %}"), "its chat template fails: Expected an expression"),
        (lambda f: replaced(f, "chat_template.jinja", "{{ messages[0].nothing.at_all }}"), "chat template fails"),
        (lambda f: edited(f, "tokenizer_config.json", eos_token=None), "names no eos_token"),
        (lambda f: edited(f, "tokenizer_config.json", eos_token=5), "transformers cannot read its files"),
        (lambda f: replaced(f, "tokenizer.json", "{}"), "tokenizer.json is not a tokenizer's"),
        (lambda f: edited(f, "config.json", text_config={"hidden_size": "wide"}), "hidden_size"),
        (lambda f: edited(f, "config.json", text_config=5), "text_config"),
        (lambda f: edited(f, "config.json", image_token_id=7), "the image token is 1018 in the processor, 7 here"),
        (lambda f: replaced(f, "model.safetensors", "version https://git-lfs.github.com/spec/v1"), "Git LFS pointer"),
        (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer.json"),
    ],
)
def test_what_is_wrong_with_a_folder_is_one_sentence(
    tmp_path: Path, change: Callable[[Path], object], said: str
) -> None:
    folder = tiny_with(tmp_path / "model", {"size": AREA}, nested=True)
    change(folder)
    assert said in refusal(folder, load_prompter) == refusal(folder, load_reasoner)


@pytest.mark.parametrize("named", ["Nobodys", "LlavaProcessor", "Qwen2VLProcessor"])
def test_the_processor_is_the_architectures_whatever_the_files_call_it(tmp_path: Path, named: str) -> None:
    folder = tiny_with(tmp_path / "model", {"size": AREA}, nested=True)
    edited(folder, "processor_config.json", processor_class=named)
    text = load_prompter(folder).chat_text("What?")
    assert text == load_prompter(TINY).chat_text("What?")


def test_a_saved_model_is_asked_in_the_words_of_its_template(tmp_path: Path) -> None:
    template = "Wo liegt, wonach gefragt ist? {query}\n{answer}"
    reasoner = load_reasoner(TINY, PromptSpec(style=template))
    reasoner.save(tmp_path / "model")
    again = load_prompter(tmp_path / "model")
    assert again.prompt.style == template
    assert reasoner.other_files()["prompt.json"] == (tmp_path / "model" / "prompt.json").read_bytes()
    assert "Wo liegt, wonach gefragt ist? Which organ?\nWhat to write:" in again.chat_text("Which organ?")
