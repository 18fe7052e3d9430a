"""The prompter: a Qwen-VL folder's processor and prompt spec, which make the same prompt for rollout, learner,
evaluation and serving. Imports no model code."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from jinja2 import TemplateError
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    Qwen2_5_VLProcessor,
    Qwen2VLProcessor,
    Qwen3VLProcessor,
)

from umrg.answers import TAGS, format_answer
from umrg.frames import Frame, Frames, ResizeRule, Size
from umrg.mistake import Mistake
from umrg.prompts import PromptSpec, chat_messages, prompt_messages
from umrg.reasoner_folder import check_reasoner_folder
from umrg.rows import reasoning_fault
from umrg.sample import Sample

_PROCESSORS = {"qwen2_vl": Qwen2VLProcessor, "qwen2_5_vl": Qwen2_5_VLProcessor, "qwen3_vl": Qwen3VLProcessor}
"""Processor classes by architecture. As in vLLM, the class that a folder's files name is ignored."""


@dataclass(frozen=True, kw_only=True)
class EncodedImage:
    """An image as input of the model."""

    pixel_values: torch.Tensor
    """Patches, float32 [patches, features]."""
    grid_thw: torch.Tensor
    """Number of patches along time, height and width, int64 [1, 3]."""
    tokens: int
    """Number of placeholder tokens that the image occupies in a prompt."""
    frames: Frames
    """The image's coordinate frames."""


@dataclass(frozen=True, kw_only=True)
class EncodedPrompt:
    """A prompt as input of the model."""

    token_ids: torch.Tensor
    """int64 [P], with one image placeholder for each token of the image."""
    image: EncodedImage


@dataclass(frozen=True, kw_only=True)
class Prompter:
    """A folder's processor and prompt spec, which turn a query about an image into the model's prompt."""

    processor: Any
    """The folder's transformers processor."""
    prompt: PromptSpec
    """The prompt and the coordinate frame of the answers."""
    image_token_id: int
    """Id of the image placeholder token."""
    vision_tokens: tuple[int, ...]
    """Ids of all image and video tokens (placeholders, start and end marks), which are never sampled."""
    positions: int
    """The model's maximum sequence length, prompt and completion together."""

    @property
    def end_token_id(self) -> int:
        """The token that ends a completion."""
        return int(self.processor.tokenizer.eos_token_id)

    @property
    def resize(self) -> ResizeRule:
        """How the processor resizes images, which determines the model frame."""
        size, processor = self.processor.image_processor.size, self.processor.image_processor
        return ResizeRule(
            factor=processor.patch_size * processor.merge_size,
            min_pixels=size["shortest_edge"],
            max_pixels=size["longest_edge"],
        )

    @property
    def size(self) -> dict[str, int]:
        """The bounds of `resize` as Hugging Face's image processors, and with them vLLM, take them: areas in pixels,
        although they are called edges."""
        return {"shortest_edge": self.resize.min_pixels, "longest_edge": self.resize.max_pixels}

    @property
    def vllm_arguments(self) -> dict[str, dict[str, dict[str, int]]]:
        """vLLM's `mm_processor_kwargs`: its own processor of the folder then resizes images as this one does, and the
        memory that it plans for is that of the largest image within these bounds."""
        # For images alone: as bounds of films too, which vLLM plans for although there are none, small ones break it.
        return {"images_kwargs": {"size": self.size}}

    def chat_text(self, query: str) -> str:
        """The prompt as text with a single image placeholder, which is the input of vLLM."""
        return self._rendered(prompt_messages(query, self.prompt))

    def raw_text(self, text: str, system: str | None = None) -> str:
        """As `chat_text`, for the whole text of a user's message (`umrg.prompts.chat_messages`). Raises ValueError if
        the chat template does not take the messages."""
        try:
            rendered = self._rendered(chat_messages(text, system))
        except TemplateError as error:
            raise Mistake(f"the model's chat template does not take these messages: {error}") from error
        if rendered.count(self.processor.image_token) != 1:
            raise Mistake(
                "the model's chat template makes no place for the image beside a system message; leave it out"
            )
        return rendered

    def thinking(self, think: bool | None) -> Self:
        """The same with a prompt that asks for reasoning, or for none; None for this one."""
        return self if think is None else replace(self, prompt=self.prompt.but(think=think))

    @cached_property
    def opening(self) -> str:
        """The part of every completion that the chat template writes itself: `<think>`, in some templates with its
        closing tag, and the white space after it; empty if the model writes the whole completion."""
        question = "What?"
        messages = [{"role": "user", "content": [{"type": "text", "text": question}]}]
        text = self._rendered(messages)
        # Only the text after the question counts, because a system prompt may mention the tags.
        _, opening, rest = text.rpartition(question)[2].partition("<think>")
        return opening + rest

    def frames(self, original: Size) -> Frames:
        """The coordinate frames of an image of this size."""
        return Frames(original=original, model=self.resize.model_size(original))

    def encode_image(self, image: NDArray[np.uint8]) -> EncodedImage:
        """Encode an image uint8 [H, W, 3] RGB."""
        processor = self.processor.image_processor
        inputs = processor(images=[Image.fromarray(image)], return_tensors="pt")
        grid = inputs["image_grid_thw"]
        return EncodedImage(
            pixel_values=inputs["pixel_values"],
            grid_thw=grid,
            tokens=int(grid.prod()) // processor.merge_size**2,
            frames=Frames(
                original=Size(image.shape[1], image.shape[0]),
                model=Size(int(grid[0, 2]) * processor.patch_size, int(grid[0, 1]) * processor.patch_size),
            ),
        )

    def encode(self, query: str, image: EncodedImage) -> EncodedPrompt:
        """Encode a query about an image. The ids equal those of the complete processor."""
        placeholder = self.processor.image_token
        text = self.chat_text(query).replace(placeholder, placeholder * image.tokens)
        ids = self.processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
        return EncodedPrompt(token_ids=ids, image=image)

    def image_tokens(self, original: Size) -> int:
        """Number of placeholder tokens for an image of this size. Raises ValueError for an aspect ratio that the
        processor refuses."""
        model = self.frames(original).model
        return model.width * model.height // self.resize.factor**2

    def prompt_tokens(self, query: str, original: Size) -> int:
        """Number of prompt tokens of a query about an image of this size. Raises ValueError as `image_tokens` does."""
        return self.text_tokens(self.chat_text(query), original)

    def text_tokens(self, text: str, original: Size) -> int:
        """Number of prompt tokens of a prompt's text (`chat_text`, `raw_text`) with an image of this size. Raises
        ValueError as `image_tokens` does."""
        ids = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        # The text contains one of the placeholders already.
        return len(ids) - 1 + self.image_tokens(original)

    def completion_ids(self, text: str) -> torch.Tensor:
        """Token ids [L] that a model has to generate for a completion: without `opening`, and with the end token.
        Raises ValueError if the completion does not begin with what the chat template writes."""
        ids = self.processor.tokenizer(self._continuation(text), add_special_tokens=False)["input_ids"]
        return torch.tensor([*ids, self.end_token_id])

    def completion_text(self, token_ids: Sequence[int]) -> str:
        """The completion for the token ids that a model generated: it begins with `opening` and has no special tokens.
        The think and answer tags are kept, although some tokenizers declare them as special."""
        kept = [token for token in token_ids if token not in self._left_out]
        return self.opening + str(self.processor.tokenizer.decode(kept))

    def reference_answer(self, sample: Sample) -> str:
        """The completion that a row's reference is, in the frame of the answers. Raises ValueError if a reasoning trace
        is asked for and cannot be learnt from."""
        frames, frame = self.frames(sample.size), self.prompt.frame
        if self.prompt.think and (fault := reasoning_fault(sample.reasoning)):
            raise Mistake(f"{sample.name} has {fault}")
        return format_answer(
            box=frames.box(sample.box, Frame.ORIGINAL, frame),
            points=frames.points(sample.points, Frame.ORIGINAL, frame),
            think=sample.reasoning if self.prompt.think else None,
        )

    def _rendered(self, messages: list[dict[str, Any]]) -> str:
        return str(self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))

    @cached_property
    def _left_out(self) -> frozenset[int]:
        tokenizer = self.processor.tokenizer
        special = (token for token, added in tokenizer.added_tokens_decoder.items() if added.special)
        tags = tokenizer.convert_tokens_to_ids([tag for tag in TAGS if tag in tokenizer.get_vocab()])
        return frozenset({*special, *tokenizer.all_special_ids} - {*tags})

    def _continuation(self, text: str) -> str:
        opened, closed, thinks = bool(self.opening), "</think>" in self.opening, text.startswith("<think>")
        if opened and thinks == closed:
            what, remedy = ("closes an empty", "think=false") if closed else ("opens", "think=true")
            raise Mistake(f"the chat template {what} <think> itself; set {remedy}, or use another chat template")
        return text.removeprefix("<think>") if opened else text


class Writing:
    """A completion's text while it is being written. The pieces together are what `completion_text` makes of all ids,
    and none is ever revised."""

    def __init__(self, prompter: Prompter) -> None:
        self._prompter = prompter
        self._ids: list[int] = []
        self._told = ""

    def add(self, token_ids: Sequence[int]) -> str:
        """The text that more ids add to what was told before; "" where they end within a character."""
        self._ids += token_ids
        # Of a character of several tokens the tokenizer makes replacement characters until the last one has come.
        return self._new(self._prompter.completion_text(self._ids).rstrip("\ufffd"))

    def end(self) -> str:
        """What is left to tell of the whole completion."""
        return self._new(self._prompter.completion_text(self._ids))

    def _new(self, text: str) -> str:
        if not text.startswith(self._told):
            return ""
        piece, self._told = text[len(self._told) :], text
        return piece


def load_prompter(folder: Path, spec: PromptSpec | None = None) -> Prompter:
    """Load the processor of a Qwen-VL folder. spec: the prompt; None for that of the folder.

    Raises ValueError if it is not such a folder, if files that its model needs are missing or damaged, or if its
    processor does not match its model.
    """
    with loading(folder):
        return prompter_of_folder(folder, spec)


def prompter_of(config: Any, processor: Any, prompt: PromptSpec) -> Prompter:
    """A prompter from a model's configuration and its processor."""
    tokenizer = processor.tokenizer
    marks = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>")
    known = {int(tokenizer.convert_tokens_to_ids(mark)) for mark in marks if mark in tokenizer.get_vocab()}
    return Prompter(
        processor=processor,
        prompt=prompt,
        image_token_id=int(config.image_token_id),
        vision_tokens=tuple(sorted({int(config.image_token_id), int(config.video_token_id), *known})),
        positions=int(config.text_config.max_position_embeddings),
    )


@contextmanager
def loading(folder: Path) -> Iterator[None]:
    """Check a folder, and turn the exceptions that transformers raises while loading it into ValueError."""
    check_reasoner_folder(folder)
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    except TemplateError as error:
        raise Mistake(f"{folder} cannot be loaded as a reasoner: its chat template fails: {error}") from error
    except (OSError, ValueError, RuntimeError, StrictDataclassError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise Mistake(f"{folder} cannot be loaded as a reasoner: {reason}") from error
    except (LookupError, TypeError, AttributeError) as error:
        # Raised for valid JSON with content that the library does not expect.
        reason = f"transformers cannot read its files ({type(error).__name__}: {error})"
        raise Mistake(f"{folder} cannot be loaded as a reasoner: {' '.join(reason.split())}") from error


def _check_tokenizer(file: Path) -> None:
    """Raise ValueError if a valid JSON file does not describe a tokenizer."""
    try:
        if file.exists():
            Tokenizer.from_file(str(file))
    except Exception as error:
        # The library raises plain Exception, so its subclasses are other errors.
        if type(error) is not Exception:
            raise
        raise Mistake(f"tokenizer.json is not a tokenizer's ({error}); copy that of its base model") from error


def prompter_of_folder(folder: Path, spec: PromptSpec | None) -> Prompter:
    """The prompter of a folder, to be called within `loading`, which turns errors into ValueError."""
    config = AutoConfig.from_pretrained(folder)
    _check_tokenizer(folder / "tokenizer.json")
    processor = _PROCESSORS[config.model_type].from_pretrained(folder)
    _check_processor(config, processor)
    _check_resize(config.vision_config, processor.image_processor)
    prompter = prompter_of(config, processor, spec or PromptSpec.of_model(folder))
    _bound(processor.image_processor, prompter)
    if processor.tokenizer.eos_token_id is None:
        raise Mistake("its tokenizer_config.json names no eos_token, which ends an answer")
    if processor.chat_template is None:
        raise Mistake("it has no chat_template.jinja (nor chat_template in tokenizer_config.json); copy its base's")
    if prompter.chat_text("?").count(processor.image_token) != 1:
        raise Mistake(f"its chat template makes no place for one image ({processor.image_token})")
    return prompter


def _bound(images: Any, prompter: Prompter) -> None:
    """Let an image processor keep the prompt spec's bounds on an image's area. Raises ValueError if they leave no room
    for an image."""
    spec, own = prompter.prompt, prompter.resize
    if spec.min_pixels is None and spec.max_pixels is None:
        return
    least, most = spec.min_pixels or own.min_pixels, spec.max_pixels or own.max_pixels
    if most < own.factor**2:
        raise Mistake(
            f"max_pixels is {most}, less than one image token's {own.factor}x{own.factor} px; give at least "
            f"{own.factor**2}"
        )
    if least > most:
        if spec.max_pixels and spec.min_pixels is None:
            least = most  # the folder's own lower bound gives way
        else:
            raise Mistake(f"min_pixels is {least}, above max_pixels, {most}; lower it")
    images.size = type(images.size)(shortest_edge=least, longest_edge=most)


def _check_processor(config: Any, processor: Any) -> None:
    vocabulary = len(processor.tokenizer)
    if vocabulary > config.text_config.vocab_size:
        raise Mistake(f"the tokenizer has {vocabulary} tokens, the model {config.text_config.vocab_size}")
    if processor.image_token_id != config.image_token_id:
        raise Mistake(f"the image token is {processor.image_token_id} in the processor, {config.image_token_id} here")


def _check_resize(vision: Any, images: Any) -> None:
    """Raise ValueError unless the image processor resizes as `ResizeRule` does, both in transformers and in vLLM."""
    expected = (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
    found = (images.patch_size, images.merge_size, images.temporal_patch_size)
    if found != expected:
        raise Mistake(f"the processor cuts patches of {found} (size, merge, temporal), the model expects {expected}")
    if not images.do_resize:
        raise Mistake("its image processor has do_resize false, and images come in any size; set it to true")
    size = dict(images.size)
    if size.keys() != {"shortest_edge", "longest_edge"}:
        edges = {"shortest_edge": size.get("min_pixels", "LEAST"), "longest_edge": size.get("max_pixels", "MOST")}
        raise Mistake(
            f"its image processor has size {json.dumps(size)}, by which transformers resizes nothing; write the least "
            f'and the largest area, in pixels: "size": {json.dumps(edges)}'
        )
    least, most = size["shortest_edge"], size["longest_edge"]
    if not (isinstance(least, int) and isinstance(most, int) and 0 < least <= most):
        raise Mistake(f"its image processor has size {json.dumps(size)}; both are whole numbers, the least first")
