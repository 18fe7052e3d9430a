"""The grounder in Python. `medreasoner ground` and the README use it:

    from serving import Grounder

    grounder = Grounder.load("runs/demo", "tiny")
    grounding = grounder.ground("image.png", "Which organ pumps the blood?")

Importing this module imports neither torch nor transformers; `Grounder.load` does.
"""

import errno
import io
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from umrg.answers import Answer, parse_answer
from umrg.atomic import write_bytes, written_aside
from umrg.frames import Box, PointPair
from umrg.images import decode_image, encode_png
from umrg.mistake import Mistake
from umrg.pictures import overlay
from umrg.prompts import ReasonerConfig, clean_query
from umrg.windowing import Percentiles, Window

if TYPE_CHECKING:
    from actors.experts.protocol import Expert
    from reasoner.model import Reasoner

MAX_TOKENS = 2048
"""Longest completion by default, in tokens. A service has its own limit, `rollout.max_tokens`."""

_DTYPES = ("float32", "bfloat16")
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")
_SHOWN = 200


@dataclass(frozen=True, kw_only=True)
class Grounding:
    """The answer to a query about one image: what the reasoner wrote, and the mask that the expert drew from it."""

    answer: Answer
    """The parsed completion, in original pixels."""
    completion: str
    """The completion as generated."""
    image: NDArray[np.uint8]
    """The image [H, W, 3] that was asked about."""
    mask: NDArray[np.bool_] | None
    """The mask [H, W]; None where the answer has no usable box and points."""
    score: float | None
    """The expert's own estimate of the mask's IoU; None where there is no mask."""

    @property
    def reasoning(self) -> str | None:
        return self.answer.think

    @property
    def box(self) -> Box | None:
        """XYXY in original pixels, inclusive maximum; None where malformed."""
        return self.answer.box

    @property
    def points(self) -> PointPair | None:
        """The two key points, XY in original pixels; None where malformed."""
        return self.answer.points

    def overlay(self) -> NDArray[np.uint8]:
        """The image with mask, box and points drawn on it, uint8 [h, w, 3]."""
        return overlay(self.image, mask=self.mask, box=self.box, points=self.points)

    def save(self, folder: str | Path, name: str) -> list[Path]:
        """Write `<name>.overlay.png`, `<name>.json` and, where there is one, `<name>.mask.png` into a folder."""
        picture, record, mask = _files(Path(folder), name)
        files = {picture: encode_png(self.overlay()), record: self._record()}
        if self.mask is not None:
            files[mask] = encode_png(self.mask)
        for path, content in files.items():
            write_bytes(path, content)
        return list(files)

    def _record(self) -> bytes:
        fields = {
            "reasoning": self.reasoning,
            "bbox": self.box,
            "points": self.points,
            "score": self.score,
            "completion": self.completion,
        }
        return (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()


class Grounder:
    """A reasoner and a frozen expert, loaded into this process.

    It decodes greedily, as the service does: in float32 both give the same answer, up to the shorter of their token
    limits; in bfloat16 the answers agree up to rounding, which may change single tokens.
    """

    def __init__(self, reasoner: "Reasoner", expert: "Expert") -> None:
        self.reasoner, self.expert = reasoner, expert

    @classmethod
    def load(
        cls,
        model: str | Path,
        expert: str | Path = "tiny",
        *,
        checkpoint: str | Path | None = None,
        prompt: str | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        device: str = "cpu",
        dtype: Literal["float32", "bfloat16"] = "float32",
    ) -> Self:
        """Load a reasoner and an expert.

        model: folder of a Qwen-VL model, or of a run or checkpoint that holds one. expert: name, folder or converted
        file of the expert. checkpoint: weights of a published expert. prompt: style, template or template file
        (`ReasonerConfig.prompt`); None for the model's own. min_pixels, max_pixels: the least and the largest area to
        which images are resized for the model; None for its processor's own. device: of both models. dtype: of the
        reasoner's weights; the expert computes in float32.
        Raises ValueError for what cannot be loaded; all but the weights themselves is checked before any are read.
        """
        if dtype not in _DTYPES:
            raise Mistake(f"a reasoner's dtype is one of {', '.join(_DTYPES)}, not {dtype!r}")
        config = ReasonerConfig(model=Path(model), prompt=prompt, min_pixels=min_pixels, max_pixels=max_pixels)
        spec = config.spec()

        # Seconds of imports, which a mistake above need not wait for.
        import torch

        from actors.experts.registry import check_expert, load_expert
        from reasoner.model import load_reasoner

        _check_device(device)
        weights = None if checkpoint is None else Path(checkpoint)
        check_expert(str(expert), weights, "published")
        reasoner = load_reasoner(config.model, spec, device=device, dtype=getattr(torch, dtype))
        return cls(reasoner, load_expert(str(expert), checkpoint=weights, device=device))

    def ground(
        self, image: str | Path | Image.Image | NDArray[np.uint8], query: str, *, max_tokens: int = MAX_TOKENS
    ) -> Grounding:
        """Answer a query about an image, and draw the mask.

        image: path of a file, PIL image, or array uint8 [H, W, 3] in RGB. Of a file with several pages, or with more
        than 8 bits a channel, `read_image` makes such an array. max_tokens: longest completion.
        Raises ValueError for what is no image, for an empty query, and for a prompt that is too long for the model.
        """
        from actors.experts.drawing import draw_masks

        check_query(query)
        pixels = _pixels(image)
        prompt = self.reasoner.encode(query, self.reasoner.encode_image(pixels))
        room = self.reasoner.positions - len(prompt.token_ids)
        if room < 1:
            raise Mistake(
                f"the prompt has {len(prompt.token_ids)} tokens, {prompt.image.tokens} of them for the image, and the "
                f"model has {self.reasoner.positions} positions; shorten the question or make the image smaller"
            )
        (completion,) = self.reasoner.generate([prompt], max_tokens=min(max_tokens, room))
        answer = parse_answer(completion).to_original(prompt.image.frames, self.reasoner.prompt.frame)
        mask, score = draw_masks(self.expert, self.expert.embed(pixels), [answer]).get(0, (None, None))
        return Grounding(answer=answer, completion=completion, image=pixels, mask=mask, score=score)


def check_query(query: str) -> None:
    """Raise ValueError for a query of which nothing is left once special tokens are removed."""
    if not clean_query(query):
        raise Mistake("the query is empty; ask about something in the image")


def read_image(
    path: str | Path, *, window: Window | Percentiles | None = None, frame: int | None = None
) -> NDArray[np.uint8]:
    """Read an image file as uint8 [H, W, 3]. window, frame: as `decode_image` takes them. Raises ValueError for what is
    no file or no image."""
    return decode_image(read_file(Path(path)), str(path), window=window, frame=frame)


def read_file(path: Path) -> bytes:
    """The bytes of an image file. Raises ValueError for what is no file."""
    try:
        # A device or a pipe might never end.
        if path.is_file():
            return path.read_bytes()
    except OSError as error:
        raise Mistake(f"{path} cannot be read ({error.strerror}); give the path of an image") from error
    raise Mistake(f"{path} is not a file; give the path of an image")


def check_pixels(image: NDArray[np.uint8]) -> None:
    """Raise ValueError for an array that is not uint8 [H, W, 3]."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise Mistake(f"an image is uint8 [H, W, 3], this one is {image.dtype} {list(image.shape)}")


def png_of_pil(image: Image.Image) -> bytes:
    """A PIL image as a PNG file, with its orientation and transparency. Raises ValueError where it has more than 8 bits
    a channel, or cannot be decoded."""
    if image.mode.startswith(("I", "F")):
        raise Mistake(f"the image has more than 8 bits a channel (mode {image.mode}); window it to 8 bits first")
    buffer = io.BytesIO()
    try:
        if image.mode not in _PNG_MODES:
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        image.save(buffer, "PNG", exif=image.getexif(), compress_level=1)
    except OSError as error:
        raise Mistake(f"the image cannot be decoded ({error})") from error
    return buffer.getvalue()


def check_savable(folder: Path, name: str) -> None:
    """Raise the OSError that `Grounding.save` would meet, and leave no trace: a model need not answer first."""
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        for path in _files(folder, name):
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
            with suppress(_ProbeEnded), written_aside(path) as aside:
                aside.touch()
                raise _ProbeEnded
    finally:
        for each in made:
            with suppress(OSError):
                each.rmdir()


def abridged(completion: str) -> str:
    """A completion as a terminal shows it: one that repeats itself up to the token limit would fill pages."""
    if len(completion) <= _SHOWN:
        return repr(completion)
    return f"{completion[:_SHOWN]!r} … ({len(completion)} characters; all of them are in the JSON file)"


class _ProbeEnded(Exception):
    """Ends a write before it is renamed into place."""


def _files(folder: Path, name: str) -> tuple[Path, Path, Path]:
    """Where overlay, record and mask are saved."""
    return folder / f"{name}.overlay.png", folder / f"{name}.json", folder / f"{name}.mask.png"


def _pixels(image: str | Path | Image.Image | NDArray[np.uint8]) -> NDArray[np.uint8]:
    if isinstance(image, (str, Path)):
        return read_image(image)
    if isinstance(image, Image.Image):
        # By way of a file, so that orientation, transparency and depth are treated as in every other image.
        return decode_image(png_of_pil(image), "the image")
    if not isinstance(image, np.ndarray):
        raise TypeError(f"an image is a path, a PIL image or an array, not {type(image).__name__}")
    check_pixels(image)
    return image


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise Mistake(f"the device {device!r} cannot be used ({reason}); give another, such as cpu") from error
