"""The prompt, built in one place for rollout, learner, evaluation and serving."""

import difflib
import hashlib
import json
import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, PlainValidator, PositiveInt, ValidationError, model_validator

from umrg.atomic import write_text
from umrg.config import Config, ModelFolder
from umrg.foreign_files import first_bytes
from umrg.frames import Frame
from umrg.mistake import Mistake
from umrg.reasoner_folder import read_object

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
    """The built-in prompts."""

    FULL = "full"
    """The instructions that a general model needs."""
    COMPACT = "compact"
    """The query alone, for a model that was trained on it."""


QUERY, ANSWER = "{query}", "{answer}"
"""A template's placeholders for the query and for the description of the answer format."""

_LONGEST_TEMPLATE = 1 << 20
"""In bytes: large enough for any prompt, and small enough to refuse other files, such as weights, at once."""
_SAID_WORDS = 8
"""How many words of a template its name shows."""


def _style(value: object) -> PromptStyle | str:
    """A style from its name, or a template's text. Raises ValueError for anything else."""
    if isinstance(value, str) and value in list(PromptStyle):
        return PromptStyle(value)
    if isinstance(value, str) and QUERY in value:
        return _sound_template(value)
    raise Mistake(f"must be full, compact, or a template's text with {QUERY} in it")


def _sound_template(text: str) -> str:
    for place, least in ((QUERY, 1), (ANSWER, 0)):
        if not least <= (count := text.count(place)) <= 1:
            wanted = "exactly once" if least else "at most once"
            raise Mistake(f"a template has {place} {wanted}, and this has it {count or 'no'} times")
    # The placeholders are filled before the check, because a filled placeholder can complete a special token.
    if found := special_tokens(text.replace(QUERY, "x").replace(ANSWER, "x")):
        named = ", ".join(dict.fromkeys(found))
        raise Mistake(f"a template has no special tokens, and this has {named}; remove them")
    return text


def read_template(path: Path) -> str:
    """The template in a text file, without the white space around it. Raises ValueError if the file is not a valid
    template."""
    start = first_bytes(path, _LONGEST_TEMPLATE)
    if len(start) == _LONGEST_TEMPLATE or b"\0" in start:
        raise Mistake(f"{path} is no text of a prompt's length in UTF-8; give a template")
    try:
        # Windows editors write a byte order mark and CRLF line ends.
        text = start.decode("utf-8-sig").replace("\r\n", "\n").strip()
    except UnicodeDecodeError as error:
        raise Mistake(f"{path} is no text in UTF-8; save it as that") from error
    if not text:
        raise Mistake(f"{path} is empty; a template says what is asked, with {QUERY} where the question goes")
    try:
        return _sound_template(text)
    except ValueError as error:
        raise Mistake(f"{path}: {error}") from None


def chosen_prompt(value: object) -> PromptStyle | str | None:
    """The style or template that the value of `prompt` selects: a style's name, a template's text, or the path of a
    file with a template. None selects the prompt of the model folder. Raises ValueError for anything else."""
    if value is None:
        return None
    if isinstance(value, str) and (value in list(PromptStyle) or QUERY in value):
        return _style(value)
    if not isinstance(value, (str, Path)):
        raise Mistake(f"{value!r} is no prompt; give full, compact, or a text file with {QUERY} in it")
    try:
        there = Path(value).exists()
    except (OSError, ValueError):  # too long for a path, or a character that paths cannot have
        there = False
    if there:
        return read_template(Path(value))
    near = difflib.get_close_matches(str(value).lower(), list(PromptStyle), n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"give full, compact, or a text file with {QUERY} in it"
    raise Mistake(f"there is no file {str(value)[:80]!r}; {hint}")


class PromptSpec(BaseModel):
    """The prompt of a reasoner and the coordinate frame of its answers.

    Models written by this project keep it as `prompt.json` in their folder. A folder without that file gets the
    defaults: full instructions, reasoning, and the coordinates that its architecture was trained on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    style: Annotated[PromptStyle | str, PlainValidator(_style)] = PromptStyle.FULL
    """A built-in style, or a template's text, in which `{query}` stands for the query and `{answer}`, which is
    optional, for the description of the answer format."""
    think: bool = True
    """Whether the prompt asks for reasoning before the answer."""
    frame: Frame = Frame.MODEL
    """The coordinate frame of the answers."""
    min_pixels: PositiveInt | None = None
    """Images are enlarged to at least this area; None for what the folder's processor says."""
    max_pixels: PositiveInt | None = None
    """Images are shrunk to at most this area; None for what the folder's processor says."""

    @classmethod
    def of_model(cls, folder: Path) -> Self:
        """The spec in a model folder's `prompt.json`, or the default in the coordinate frame of its architecture.
        Raises ValueError for a damaged file."""
        path = folder / "prompt.json"
        if not path.exists():
            return cls(frame=_frame_of(folder))
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            what = " ".join((*map(str, first["loc"]), first["msg"].removeprefix("Value error, ")))
            raise Mistake(f"{path} is not a prompt spec: {what}") from error

    @property
    def name(self) -> str:
        """The style's name or, for a template, its digest and first words."""
        if isinstance(self.style, PromptStyle):
            return self.style.value
        words = self.style.split()
        digest = hashlib.sha256(self.style.encode()).hexdigest()
        more = " …" if len(words) > _SAID_WORDS else ""
        return f"template {digest[:12]}: {' '.join(words[:_SAID_WORDS])}{more}"

    def but(
        self,
        *,
        style: PromptStyle | str | None = None,
        think: bool | None = None,
        frame: Frame | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> Self:
        """A copy with the given parts replaced; None keeps a part."""
        changes = {
            "style": style,
            "think": think,
            "frame": frame,
            "min_pixels": min_pixels,
            "max_pixels": max_pixels,
        }
        return self.model_copy(update={name: value for name, value in changes.items() if value is not None})

    def save(self, folder: Path) -> None:
        text = json.dumps(self.model_dump(mode="json", exclude_none=True), indent=2, ensure_ascii=False)
        write_text(folder / "prompt.json", text + "\n")


def _frame_of(folder: Path) -> Frame:
    path = folder / "config.json"
    kind = read_object(path).get("model_type", "") if path.is_file() else ""
    return Frame.RELATIVE if str(kind).startswith("qwen3_vl") else Frame.MODEL


class ReasonerConfig(Config):
    """Which reasoner is prompted, and how."""

    model: ModelFolder
    """Folder of a Qwen-VL model, or of a run or a checkpoint that holds one; in a run also a model's URI."""
    prompt: Annotated[PromptStyle | str | None, PlainValidator(chosen_prompt, json_schema_input_type=str | None)] = None
    """`full`, `compact`, a file that holds a template, or a template's text; null for what the model folder's
    prompt.json says. A file is read at once: a run resumes without it."""
    think: bool | None = None
    """Whether the prompt asks for reasoning; null for what prompt.json says."""
    frame: Frame | None = None
    """The coordinates that the model answers in; null for what prompt.json or the architecture says."""
    min_pixels: PositiveInt | None = None
    """Images are enlarged to at least this many pixels (width times height) for the model; null for what its processor
    says."""
    max_pixels: PositiveInt | None = None
    """Images are shrunk to at most this many pixels for the model, in sampling, learning and serving alike, and so is
    the frame of its answers; null for what its processor says. An image takes about one token for 28x28 pixels."""

    @model_validator(mode="after")
    def _bounds_in_order(self) -> Self:
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            raise Mistake(f"min_pixels {self.min_pixels} is above max_pixels {self.max_pixels}; lower it")
        return self

    def spec(self) -> PromptSpec:
        """The prompt spec. Raises ValueError for a damaged prompt.json."""
        return self.asked(PromptSpec.of_model(self.model))

    def asked(self, folder: PromptSpec) -> PromptSpec:
        """A folder's prompt spec with what this configuration changes."""
        return folder.but(
            style=self.prompt,
            think=self.think,
            frame=self.frame,
            min_pixels=self.min_pixels,
            max_pixels=self.max_pixels,
        )


def prompt_messages(query: str, spec: PromptSpec) -> list[dict[str, Any]]:
    """The chat messages that ask `query` about one image: an image slot, then the text.

    Special tokens are removed from the query: a literal image placeholder would break the processor, and control
    tokens would end the user's turn.
    """
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt_text(query, spec)}]}]


def chat_messages(text: str, system: str | None = None) -> list[dict[str, Any]]:
    """The chat messages of a client that brings its own text: an image slot, then the text as it is, without the task's
    instructions, and before both the system message, if there is one. Special tokens are removed from either."""
    content = [{"type": "image"}, {"type": "text", "text": without_special_tokens(text)}]
    before = [] if system is None else [{"role": "system", "content": without_special_tokens(system)}]
    return [*before, {"role": "user", "content": content}]


def prompt_text(query: str, spec: PromptSpec) -> str:
    """The text of the user's message."""
    query = clean_query(query)
    if spec.style is PromptStyle.COMPACT:
        return query
    # Concatenation instead of `str.format`, because the query may contain braces.
    if spec.style is PromptStyle.FULL:
        before, after = _TASK.split(QUERY)
        return before + query + after + (_GUIDE if spec.think else "") + _answer_form(spec)
    filled = {QUERY: query, ANSWER: _answer_form(spec).strip()}
    parts = re.split(f"({re.escape(QUERY)}|{re.escape(ANSWER)})", spec.style)
    # The query's last characters and the template's next ones could form a special token together.
    return without_special_tokens("".join(filled.get(part, part) for part in parts))


def _answer_form(spec: PromptSpec) -> str:
    """The description of the answer format, with the coordinate frame and an example."""
    example = f"<think>reasoning</think>{_EXAMPLE}" if spec.think else _EXAMPLE
    form = _FORMAT_THINK if spec.think else _FORMAT_ANSWER
    return form + _RULES.format(unit=_UNITS[spec.frame], example=example)


def special_tokens(query: str) -> list[str]:
    """The literal special tokens that `clean_query` removes from a query."""
    return _SPECIAL.findall(query)


def clean_query(query: str) -> str:
    """The query without special tokens, with each run of white space replaced by one space."""
    return " ".join(without_special_tokens(query).split())


def without_special_tokens(text: str) -> str:
    """The text with a space in the place of each special token."""
    previous = None
    # Removing one token can join its neighbours into another.
    while previous != text:
        previous, text = text, _SPECIAL.sub(" ", text)
    return text
