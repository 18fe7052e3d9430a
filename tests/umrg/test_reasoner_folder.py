"""A reasoner's folder: what is wrong with it is said in one sentence that names the file, from headers alone."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from umrg.reasoner_folder import check_reasoner_folder, read_object

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 21181240\n"
INDEX = "model.safetensors.index.json"
Change = Callable[[Path], object]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The names that a Hugging Face folder has, with as little in them as is looked at."""
    path = tmp_path / "model"
    path.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (path / name).write_text("{}")
    (path / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    (path / "chat_template.jinja").write_text("{{ messages }}")
    (path / "preprocessor_config.json").write_text('{"image_processor_type": "Qwen2VLImageProcessor"}')
    save_file({"a": np.ones(4)}, path / "model.safetensors")
    return path


def sharded(folder: Path) -> None:
    """The same with its weights in two files and an index."""
    (folder / "model.safetensors").unlink()
    shards = {"model-00001-of-00002.safetensors": "a", "model-00002-of-00002.safetensors": "b"}
    for name, tensor in shards.items():
        save_file({tensor: np.ones(4)}, folder / name)
    (folder / INDEX).write_text(json.dumps({"weight_map": {tensor: name for name, tensor in shards.items()}}))


def put(name: str, text: str) -> Change:
    return lambda folder: (folder / name).write_text(text)


def drop(*names: str) -> Change:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def make(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).mkdir()

    return change


def instead(name: str, other: str) -> Change:
    return lambda folder: (folder / name).rename(folder / other)


def both(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


def cut(name: str) -> Change:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-5])


def nested(images: object) -> Change:
    """As today's transformers writes it, in one file for the whole processor."""
    whole = json.dumps({"image_processor": images, "video_processor": {}})
    return both(drop("preprocessor_config.json"), put("processor_config.json", whole))


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: None,
        sharded,
        put("config.json", '{"model_type": "qwen2_vl"}'),
        put("config.json", '{"model_type": "qwen3_vl"}'),
        both(drop("tokenizer.json"), put("vocab.json", "{}"), put("merges.txt", "a b")),
        drop("generation_config.json"),
        put("preprocessor_config.json", '{"image_processor_type": "Qwen2VLImageProcessorFast"}'),
        put("preprocessor_config.json", '{"size": {"shortest_edge": 3136, "longest_edge": 12845056}}'),
        nested({"image_processor_type": "Qwen2VLImageProcessor"}),
        put("trainer_state.json", "no JSON, and nobody's concern"),
    ],
)
def test_a_folder_with_all_that_is_needed_passes(folder: Path, change: Change) -> None:
    change(folder)
    check_reasoner_folder(folder)


BROKEN: list[tuple[Change, str]] = [
    (drop("config.json"), "is not a model folder (no config.json)"),
    (both(drop("config.json"), put("adapter_config.json", "{}")), "an adapter's: it has to be merged"),
    (both(drop("config.json"), put("config.yaml", "{}")), "a run that has left no model yet"),
    (put("config.json", "{"), "config.json is damaged JSON"),
    (put("config.json", "[1]"), "config.json must hold keys and values, not a list"),
    (put("config.json", ""), "config.json is an empty file"),
    (put("config.json", POINTER), "config.json is a Git LFS pointer"),
    (put("config.json", "<html>"), "config.json is a web page"),
    (put("config.json", "{}"), "its architecture is not said (config.json); supported are qwen2_5_vl"),
    (put("config.json", '{"model_type": "llama"}'), "its architecture is llama (config.json)"),
    (put("config.json", '{"model_type": ["qwen2_vl"]}'), "its architecture is ['qwen2_vl']"),
    (put("tokenizer.json", POINTER), "tokenizer.json is a Git LFS pointer, not the file itself; get that with"),
    (put("tokenizer.json", ""), "tokenizer.json is an empty file"),
    (drop("tokenizer.json"), "has no tokenizer.json; copy the tokenizer's files"),
    (both(drop("tokenizer.json"), put("vocab.json", "{}")), "has no tokenizer.json"),
    (drop("tokenizer_config.json"), "has no tokenizer_config.json"),
    (put("tokenizer_config.json", "[]"), "tokenizer_config.json must hold keys and values"),
    (put("generation_config.json", POINTER), "generation_config.json is a Git LFS pointer"),
    (put("chat_template.jinja", POINTER), "chat_template.jinja is a Git LFS pointer"),
    (put("chat_template.jinja", ""), "chat_template.jinja is an empty file"),
    (put("chat_template.json", "<html>"), "chat_template.json is a web page"),
    (drop("preprocessor_config.json"), "has no preprocessor_config.json (nor an image_processor"),
    (put("preprocessor_config.json", "{}"), "has no preprocessor_config.json"),
    (put("preprocessor_config.json", POINTER), "preprocessor_config.json is a Git LFS pointer"),
    (instead("preprocessor_config.json", "video_preprocessor_config.json"), "has no preprocessor_config.json"),
    (nested({}), "has no preprocessor_config.json"),
    (nested({"image_processor_type": "CLIPImageProcessor"}), "processor_config.json has image_processor_type 'CLIPIm"),
    (
        put("preprocessor_config.json", '{"image_processor_type": "Qwen2_5_VLImageProcessor"}'),
        "preprocessor_config.json has image_processor_type 'Qwen2_5_VLImageProcessor'; only Qwen2VLImageProcessor",
    ),
    (drop("model.safetensors"), "has no model.safetensors (nor model.safetensors.index.json)"),
    (put("model.safetensors", POINTER), "model.safetensors is a Git LFS pointer"),
    (put("model.safetensors", ""), "model.safetensors is an empty file"),
    (put("model.safetensors", "<!doctype html>"), "model.safetensors is a web page"),
    (cut("model.safetensors"), "model.safetensors is cut short"),
    (
        instead("model.safetensors", "pytorch_model.bin"),
        "its weights are pytorch_model.bin, and safetensors are wanted",
    ),
    (instead("model.safetensors", "model-q4.gguf"), "its weights are model-q4.gguf"),
    (both(drop("model.safetensors"), make("model.safetensors")), "model.safetensors is a folder"),
]
BROKEN_SHARDS: list[tuple[Change, str]] = [
    (drop("model-00002-of-00002.safetensors"), "names files that are not there: model-00002-of-00002.safetensors; get"),
    (
        drop("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
        "not there: model-00001-of-00002.safetensors and 1 more",
    ),
    (put("model-00002-of-00002.safetensors", POINTER), "model-00002-of-00002.safetensors is a Git LFS pointer"),
    (cut("model-00001-of-00002.safetensors"), "model-00001-of-00002.safetensors is cut short"),
    (put(INDEX, POINTER), f"{INDEX} is a Git LFS pointer"),
    (put(INDEX, '{"weight_map": {'), f"{INDEX} is damaged JSON"),
    (put(INDEX, "[]"), f"{INDEX} must hold keys and values"),
    (put(INDEX, "{}"), f"{INDEX} has no weight_map"),
    (put(INDEX, '{"weight_map": {"a": 3}}'), f"{INDEX} has no weight_map"),
    (put(INDEX, '{"weight_map": {"z": "model-00001-of-00002.safetensors"}}'), "has no tensor z, which"),
    (drop(INDEX), "has no model.safetensors"),
]


def refusal(folder: Path) -> str:
    with pytest.raises(ValueError, match=re.escape(str(folder))) as caught:
        check_reasoner_folder(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("change", "said"), BROKEN)
def test_what_is_wrong_with_a_folder_is_named(folder: Path, change: Change, said: str) -> None:
    change(folder)
    assert said in refusal(folder)


@pytest.mark.parametrize(("change", "said"), BROKEN_SHARDS)
def test_what_is_wrong_with_shards_is_named(folder: Path, change: Change, said: str) -> None:
    sharded(folder)
    change(folder)
    assert said in refusal(folder)


def test_a_folder_that_is_none_is_named(tmp_path: Path) -> None:
    assert "it is not there" in refusal(tmp_path / "none")
    (tmp_path / "file").write_text("x")
    assert "it is a file" in refusal(tmp_path / "file")


def test_keys_that_nest_without_end_are_damaged_json(tmp_path: Path) -> None:
    (tmp_path / "deep.json").write_text('{"a":' * 100_000)
    with pytest.raises(ValueError, match="damaged JSON"):
        read_object(tmp_path / "deep.json")
