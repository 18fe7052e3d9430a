"""A check of a reasoner's folder by file names, JSON and safetensors headers, before anything is started.

A folder that passes has all files that transformers and vLLM load.
"""

import json
from pathlib import Path
from typing import Any

from umrg.foreign_files import first_bytes, what_it_is, what_it_is_but_text
from umrg.mistake import Mistake
from umrg.safetensors_header import read_header

ARCHITECTURES = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl")

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"

_OBJECTS = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json"),
    *("added_tokens.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("chat_template.json",),
)
"""Optional JSON files that transformers or vLLM read."""

_IMAGE_PROCESSOR = "Qwen2VLImageProcessor"

_TEXTS = ("merges.txt", "chat_template.jinja")


def check_reasoner_folder(folder: Path) -> None:
    """Raise ValueError, naming the file, if a folder holds no reasoner that can be loaded: because of another
    architecture, missing or damaged files, Git LFS pointers in place of files, or weights in another format."""
    if not (folder / "config.json").is_file():
        raise Mistake(f"{folder} is not a model folder ({_instead(folder)}); give a Hugging Face folder")
    try:
        kind = read_object(folder / "config.json").get("model_type")
        if kind not in ARCHITECTURES:
            raise Mistake(
                f"its architecture is {kind or 'not said'} (config.json); supported are {', '.join(ARCHITECTURES)}"
            )
        for name in _OBJECTS:
            if (folder / name).exists():
                read_object(folder / name)
        for name in _TEXTS:
            if (folder / name).exists() and (what := what_it_is_but_text(folder / name)):
                raise Mistake(f"{folder / name} is {what}")
        _check_tokenizer(folder)
        _check_processor(folder)
        _check_weights(folder)
    except ValueError as error:
        reason = str(error).removeprefix(f"{folder}/")
        raise Mistake(f"{folder} cannot be loaded as a reasoner: {reason}") from error


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError, naming the file, if it does not hold one."""
    first_bytes(path)
    data = path.read_bytes()
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError) as error:
        kind = what_it_is(path) or "no JSON"
        # A file that begins like JSON is damaged JSON, whatever else it looks like.
        kind = "damaged JSON; get it again" if data.lstrip()[:1] in (b"{", b"[") else kind
        raise Mistake(f"{path} is {kind}") from error
    if not isinstance(tree, dict):
        raise Mistake(f"{path} must hold keys and values, not a {type(tree).__name__}")
    return tree


def _instead(folder: Path) -> str:
    """What a folder without a config.json is, for the error message."""
    if not folder.exists():
        return "it is not there"
    if not folder.is_dir():
        return "it is a file"
    if (folder / "adapter_config.json").exists():
        return "no config.json, but an adapter's: it has to be merged into its base model first"
    if (folder / "config.yaml").exists():
        return "no config.json: a run that has left no model yet; one of its checkpoints may have one"
    return "no config.json"


def _check_tokenizer(folder: Path) -> None:
    there = {path.name for path in folder.iterdir()}
    if "tokenizer.json" not in there and not {"vocab.json", "merges.txt"} <= there:
        raise Mistake("it has no tokenizer.json; copy the tokenizer's files of the model that it was made from")
    if "tokenizer_config.json" not in there:
        raise Mistake("it has no tokenizer_config.json, which says what ends an answer; copy that of its base model")


def _check_processor(folder: Path) -> None:
    """Raise ValueError unless the image processor is the one whose resizing is that of `umrg.frames.ResizeRule`."""
    # In the order in which transformers reads them: processor_config.json takes precedence.
    for name, part in (("processor_config.json", "image_processor"), ("preprocessor_config.json", None)):
        tree = read_object(folder / name) if (folder / name).exists() else {}
        images = tree.get(part) if part else tree
        if isinstance(images, dict) and images:
            kind = images.get("image_processor_type", _IMAGE_PROCESSOR)
            if kind not in (_IMAGE_PROCESSOR, f"{_IMAGE_PROCESSOR}Fast", f"{_IMAGE_PROCESSOR}Pil"):
                raise Mistake(
                    f"{name} has image_processor_type {kind!r}; only {_IMAGE_PROCESSOR} cuts images as the model does"
                )
            return
    raise Mistake(
        "it has no preprocessor_config.json (nor an image_processor in processor_config.json), which says how images "
        "are resized; copy that of its base model"
    )


def _check_weights(folder: Path) -> None:
    index, weights = folder / INDEX, folder / WEIGHTS
    if weights.exists():
        read_header(weights)
    if index.exists():
        _check_shards(folder, read_object(index))
    elif not weights.exists():
        others = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".gguf"))
        if others:
            raise Mistake(
                f"its weights are {others[0]}, and safetensors are wanted; in transformers, "
                "`AutoModelForImageTextToText.from_pretrained(FOLDER).save_pretrained(NEW)` writes them"
            )
        raise Mistake(f"it has no {WEIGHTS} (nor {INDEX}); copy the weights into it")


def _check_shards(folder: Path, index: dict[str, Any]) -> None:
    """Raise ValueError unless the files that an index names exist, are complete and have the tensors it assigns to
    them."""
    places = index.get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()) or not places:
        raise Mistake(f"{folder / INDEX} has no weight_map that names a file for each tensor; get it again")
    files = sorted(set(places.values()))
    if missing := [name for name in files if not (folder / name).exists()]:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise Mistake(f"{INDEX} names files that are not there: {missing[0]}{more}; get them too")
    found = {name: read_header(folder / name).shapes.keys() for name in files}
    if lost := [tensor for tensor, name in places.items() if tensor not in found[name]]:
        raise Mistake(f"{places[lost[0]]} has no tensor {lost[0]}, which {INDEX} says it has; get both again")
