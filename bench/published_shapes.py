"""Work of the published sizes without a download: reasoner folders with random weights of real shapes, and scored
groups with the published lengths.

Shapes are those of `bench.architectures`. Tokenizer, processor and chat template are the bundled tiny
reasoner's, so a prompt is made as in a run; only its words mean nothing to the model.
"""

import io
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from reasoner.prompter import Prompter
    from rewards.scored import ScoredGroup

SHAPES = ("tiny", "Qwen2.5-VL-3B", "Qwen2.5-VL-7B")
"""The tiny reasoner, and those of `bench.architectures` whose images are cut as its are."""

TINY_REASONER = Path(__file__).parents[1] / "models" / "tiny-reasoner"


@dataclass(frozen=True, kw_only=True)
class Work:
    """The groups of one step, by their sizes."""

    groups: int
    n: int
    """Completions per group."""
    side: int
    """Of the square image, in pixels."""
    words: int
    """Of the query; one token each."""
    length: int
    """Tokens of a completion."""


PUBLISHED = Work(groups=8, n=16, side=840, words=690, length=200)
"""The released images are 840 pixels wide, 900 tokens; with the full instructions a prompt has about 1,600."""

REHEARSAL = Work(groups=2, n=4, side=112, words=20, length=12)
"""What a CPU can do in seconds."""


def write_reasoner(folder: Path, shape: str, *, layers: int | None = None, device: str = "cpu", seed: int = 0) -> Path:
    """A reasoner folder with random weights in bfloat16. shape: of `SHAPES`; `tiny` is the tiny reasoner itself.
    layers: of the language model, where all of them would not fit. Returns the folder."""
    assert shape in SHAPES, shape
    if shape == "tiny":
        return Path(shutil.copytree(TINY_REASONER, folder, dirs_exist_ok=True))
    import torch
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(_config(shape, layers), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    for name in ("chat_template.jinja", "processor_config.json", "prompt.json", "tokenizer.json"):
        shutil.copy(TINY_REASONER / name, folder / name)
    shutil.copy(TINY_REASONER / "tokenizer_config.json", folder / "tokenizer_config.json")
    return folder


def _config(shape: str, layers: int | None) -> Any:
    """A published configuration with the special tokens of the tiny reasoner, and an lm_head of its own, because
    engines keep a packed copy of a tied one."""
    from transformers import AutoConfig

    from bench.architectures import ARCHITECTURES

    config, tiny = ARCHITECTURES[shape](), AutoConfig.from_pretrained(TINY_REASONER)
    for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        setattr(config, name, getattr(tiny, name))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config.text_config, name, getattr(tiny.text_config, name))
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    if layers:
        config.text_config.num_hidden_layers = layers
        config.text_config.layer_types = config.text_config.layer_types[:layers]
    return config


def scored_groups(prompter: "Prompter", work: Work, *, seed: int = 0) -> list["ScoredGroup"]:
    """Scored groups that still have their images: random pictures, completions and rewards of the work's sizes."""
    from rewards.scored import ScoredAnswer, ScoredGroup
    from rewards.scoring import Reward
    from umrg.answers import parse_answer
    from umrg.group import Completion, Group, GroupSamples
    from umrg.sample import Sample

    rng = np.random.default_rng(seed)
    blank = Sample(
        id="0",
        query=" ".join(["where"] * work.words),
        image_bytes=b"",
        mask_bytes=(),
        box=(1.0, 1.0, 9.0, 9.0),
        points=((2.0, 2.0), (8.0, 8.0)),
        supercategory="unknown",
        category="unknown",
        modality="unknown",
    )
    groups = []
    for i in range(work.groups):
        sample = replace(blank, id=str(i), image_bytes=_picture(rng, work.side))
        prompt = prompter.encode(sample.query, prompter.encode_image(sample.image()))
        completions = tuple(
            Completion(text="", token_ids=tuple(ids), logprobs=(-5.0,) * work.length, policy_version=0, finished=True)
            for ids in rng.integers(100, 900, (work.n, work.length)).tolist()
        )
        answers = tuple(
            ScoredAnswer(reward=Reward(total=total, parts={}), answer=parse_answer(""), failure=None, metrics={})
            for total in rng.random(work.n).tolist()
        )
        groups.append(
            ScoredGroup(
                group=Group(run="bench", step=0, index=i, sample=sample),
                samples=GroupSamples(
                    prompt_ids=tuple(prompt.token_ids.tolist()), frames=prompt.image.frames, completions=completions
                ),
                answers=answers,
            )
        )
    return groups


def _picture(rng: np.random.Generator, side: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()
