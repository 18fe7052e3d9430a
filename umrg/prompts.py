"""The prompt, built in one place for rollout, learner, evaluation and serving."""

import json
import re
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from umrg.atomic import written_aside
from umrg.config import Config, ModelFolder
from umrg.frames import Frame

_SPECIAL = re.compile(r"<\|[^<>|]*\|>|<(?:image|video)>")

_TASK = """\
You are looking at one medical image. It may be an X-ray, CT, MRI, ultrasound, endoscopy, fundus, OCT, pathology, \
dermoscopy or mammography image. A clinician asks about one region of it, and only hints at which: the question names \
a function, a symptom, a risk or a finding instead of the structure. Work out which anatomical or pathological region \
is meant, and locate it as exactly as you can.

Question: {query}
"""

_GUIDE = """
How to work:
1. Read the question as a clinician would. Name to yourself the function, complaint or disease that it alludes to, and \
the regions that come into question in this kind of image.
2. Look over the whole image in order. Note modality, view and orientation, then the outline, brightness, texture, \
symmetry and neighbourhood of each candidate region.
3. Weigh what you see against what was hinted at. Drop the candidates that the picture contradicts, and keep the one \
region that explains both.
4. Find the edges of that region on each side, and two places that lie safely within it.
5. If a later observation speaks against an earlier assumption, trust the image and correct yourself before you answer.
"""

_FORMAT_THINK = """
What to write: exactly one <think> block and, right after it, exactly one <answer> block, with nothing before, \
between or after them.
- <think>...</think>: the reasoning, in plain sentences: what the question alludes to, which visible features point to \
the region, and how its borders were found. Commit to one region; no hedging, and no coordinates of other regions.
- <answer>...</answer>: one JSON object with these keys and no others:
    "bbox": [x1, y1, x2, y2], the tightest box that holds the whole region, left, top, right and bottom edge;
    "points_1": [x, y], the place deepest inside the region;
    "points_2": [x, y], a second place inside the region, well away from the first.
"""

_FORMAT_ANSWER = """
What to write: exactly one <answer> block, with nothing before or after it.
- <answer>...</answer>: one JSON object with these keys and no others:
    "bbox": [x1, y1, x2, y2], the tightest box that holds the whole region, left, top, right and bottom edge;
    "points_1": [x, y], the place deepest inside the region;
    "points_2": [x, y], a second place inside the region, well away from the first.
"""

_RULES = """
Rules:
- {unit}, x to the right and y downwards from the top left corner.
- Always give a box and two points, also when the region is faint; the box must not be empty, and x1 < x2, y1 < y2.
- The box touches the region on all four sides and leaves the background out.
- The two points differ, and both lie on the region itself, not merely within the box.

Example of the form (the numbers are placeholders):
{example}"""

_EXAMPLE = '<answer>{"bbox": [x1, y1, x2, y2], "points_1": [x, y], "points_2": [x, y]}</answer>'

_UNITS = {
    Frame.MODEL: "Coordinates are whole pixels of the image as you see it",
    Frame.ORIGINAL: "Coordinates are whole pixels of the image at its original size",
    Frame.RELATIVE: "Coordinates are whole numbers from 0 to 1000 along each side of the image",
}


class PromptStyle(StrEnum):
    """`full`: the instructions a general model needs. `compact`: the bare query, for a model trained on it."""

    FULL = "full"
    COMPACT = "compact"


class PromptSpec(BaseModel):
    """How a reasoner is asked and in which frame it answers.

    A model folder of ours keeps it as `prompt.json`; a folder without one is asked in full, with thinking, and
    answers in model pixels, as Qwen2.5-VL does.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    style: PromptStyle = PromptStyle.FULL
    think: bool = True
    frame: Frame = Frame.MODEL

    @classmethod
    def of_model(cls, folder: Path) -> Self:
        """The spec kept in a model folder, or the default in the frame that its architecture speaks. Raises ValueError
        for a damaged file."""
        path = folder / "prompt.json"
        if not path.exists():
            return cls(frame=_frame_of(folder))
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ValueError(f"{path} is not a prompt spec: {where} {first['msg']}") from error

    def but(self, *, style: PromptStyle | None = None, think: bool | None = None, frame: Frame | None = None) -> Self:
        """The same, asked otherwise; None leaves a part as it is."""
        changes = {"style": style, "think": think, "frame": frame}
        return self.model_copy(update={name: value for name, value in changes.items() if value is not None})

    def save(self, folder: Path) -> None:
        with written_aside(folder / "prompt.json") as aside:
            aside.write_text(json.dumps(self.model_dump(mode="json"), indent=2) + "\n")


def _frame_of(folder: Path) -> Frame:
    path = folder / "config.json"
    kind = json.loads(path.read_text()).get("model_type", "") if path.is_file() else ""
    return Frame.RELATIVE if kind.startswith("qwen3_vl") else Frame.MODEL


class ReasonerConfig(Config):
    """Which reasoner is asked, and how.

    model: a Qwen-VL folder, or a run or a checkpoint that holds one. prompt, think, frame: asked otherwise than the
    folder's prompt.json says: in another style, with or without reasoning, in other coordinates.
    """

    model: ModelFolder
    prompt: PromptStyle | None = None
    think: bool | None = None
    frame: Frame | None = None

    def spec(self) -> PromptSpec:
        """How it is asked. Raises ValueError for a damaged prompt.json."""
        return PromptSpec.of_model(self.model).but(style=self.prompt, think=self.think, frame=self.frame)


def prompt_messages(query: str, spec: PromptSpec) -> list[dict[str, Any]]:
    """The chat messages that ask `query` of one image: an image slot, then the text.

    Special tokens are taken out of the query: a literal image placeholder would break the processor, and
    control tokens would end the user's turn.
    """
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt_text(query, spec)}]}]


def prompt_text(query: str, spec: PromptSpec) -> str:
    """The user's text, without the image."""
    query = clean_query(query)
    if spec.style is PromptStyle.COMPACT:
        return query
    example = f"<think>reasoning</think>{_EXAMPLE}" if spec.think else _EXAMPLE
    guide, form = (_GUIDE, _FORMAT_THINK) if spec.think else ("", _FORMAT_ANSWER)
    # The query goes in last, by concatenation: its braces mean nothing.
    before, after = _TASK.split("{query}")
    return before + query + after + guide + form + _RULES.format(unit=_UNITS[spec.frame], example=example)


def special_tokens(query: str) -> list[str]:
    """The literal special tokens that `clean_query` takes out of a query."""
    return _SPECIAL.findall(query)


def clean_query(query: str) -> str:
    """The query without special tokens, and with its white space folded."""
    previous = None
    while previous != query:
        previous, query = query, _SPECIAL.sub(" ", query)
    return " ".join(query.split())
