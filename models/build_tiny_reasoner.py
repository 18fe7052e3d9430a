"""Build the untrained tiny reasoner: a Qwen2.5-VL of a few million parameters with its own tokenizer and processor.

    python -m models.build_tiny_reasoner OUT [--seed 0]

writes a Hugging Face folder with random weights. `models.train_tiny_reasoner` trains it.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from phantoms import rows
from reasoner.model import Reasoner, with_model
from reasoner.prompter import prompter_of
from umrg.answers import TAGS, format_answer
from umrg.prompts import PromptSpec, PromptStyle, prompt_text

TRAINED_MODALITIES = ("CT", "X-ray")
"""A model this small cannot learn all ten modalities in reasonable time on two cores."""

VOCABULARY = 1024
ROPE_BASE = 10.0
"""Base of the rotary embedding, whose lowest frequencies encode rows and columns of the image. With the usual base, a
step of one image token to the right rotates them by at most 0.003, which a model this small cannot distinguish; with
this base, by 0.24."""

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def corpus(seed: int, count: int = 2000) -> Iterator[str]:
    """The text that the tokenizer is trained on: phantom queries and completions, and the full instructions once."""
    for style_think in (True, False):
        yield prompt_text("", PromptSpec(think=style_think))
    for row in rows(count, seed=seed, size=112):
        prompt, extra = row["prompt"], row["extra_info"]
        assert isinstance(prompt, list) and isinstance(extra, dict)
        yield prompt[0]["content"]
        yield format_answer(box=(0, 0, 0, 0), points=((0, 0), (0, 0)), think=extra["reasoning"])


def build_tokenizer(seed: int) -> Qwen2Tokenizer:
    """A byte-level BPE like Qwen's own: each digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    added = len(SPECIAL_TOKENS) + len(TAGS)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - added,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(seed), trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    qwen = Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(merge) for merge in learned["merges"]],
        unk_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=32768,
    )
    qwen.add_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS], special_tokens=True)
    qwen.add_tokens([AddedToken(tag, special=False) for tag in TAGS])
    assert len(qwen) <= VOCABULARY, len(qwen)
    return qwen


def build_processor(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLProcessor:
    """Qwen2.5-VL's own processor, with images of at most 1,280 tokens of 28×28 px."""
    sizes = {"min_pixels": 56 * 56, "max_pixels": 1280 * 28 * 28}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**sizes),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**sizes),
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: Qwen2Tokenizer, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """The model with random weights. The output head is not tied to the embeddings, because vLLM on CPU keeps a packed
    copy of a tied head, which a weight update does not reach."""
    torch.manual_seed(seed)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_BASE, "mrope_section": [8, 12, 12]},
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }
    depth = 5
    vision = {
        "depth": depth,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_heads": 4,
        "out_hidden_size": 256,
        "fullatt_block_indexes": list(range(depth)),
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        bos_token_id=ids["<|endoftext|>"], eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"]
    )
    return model


def build(seed: int) -> Reasoner:
    """The untrained tiny reasoner."""
    tokenizer = build_tokenizer(seed)
    model = build_model(tokenizer, seed)
    prompt = PromptSpec(style=PromptStyle.COMPACT)
    return with_model(prompter_of(model.config, build_processor(tokenizer), prompt), model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    reasoner = build(args.seed)
    reasoner.save(args.out)
    print(f"{sum(p.numel() for p in reasoner.model.parameters()):,} parameters in {args.out}")


if __name__ == "__main__":
    main()
