"""One image: `medreasoner ground IMAGE "QUERY"`."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from actors.experts.drawing import draw_masks
from actors.experts.protocol import Expert
from actors.experts.registry import load_expert
from reasoner.model import Reasoner, load_reasoner
from umrg.answers import Answer, parse_answer
from umrg.atomic import written_aside
from umrg.images import decode_image, encode_png
from umrg.pictures import overlay
from umrg.prompts import ReasonerConfig, clean_query
from umrg.windowing import Window

MAX_TOKENS = 2048
_SHOWN = 200


@dataclass(frozen=True, kw_only=True)
class Grounding:
    """A reasoner's answer about one image and the expert's mask.

    answer: in original pixels. completion: the text as generated. image: uint8 [H, W, 3]. mask: bool [H, W], and
    score, the expert's prediction of its IoU; None where box and points were malformed.
    """

    answer: Answer
    completion: str
    image: NDArray[np.uint8]
    mask: NDArray[np.bool_] | None
    score: float | None

    def save(self, out: Path, name: str) -> list[Path]:
        """Write `<name>.overlay.png`, `<name>.json` and, where there is one, `<name>.mask.png` into `out`."""
        picture = overlay(self.image, mask=self.mask, box=self.answer.box, points=self.answer.points)
        files = {f"{name}.overlay.png": encode_png(picture), f"{name}.json": self._record()}
        if self.mask is not None:
            files[f"{name}.mask.png"] = encode_png(self.mask)
        for file, content in files.items():
            with written_aside(out / file) as aside:
                aside.write_bytes(content)
        return [out / file for file in files]

    def _record(self) -> bytes:
        answer = self.answer
        fields = {
            "reasoning": answer.think,
            "bbox": answer.box,
            "points": answer.points,
            "score": self.score,
            "completion": self.completion,
        }
        return (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()


def ground(image: NDArray[np.uint8], query: str, reasoner: Reasoner, expert: Expert) -> Grounding:
    """Ask about an image uint8 [H, W, 3], greedily, and let the expert draw the mask."""
    prompt = reasoner.encode(query, reasoner.encode_image(image))
    (completion,) = reasoner.generate([prompt], max_tokens=MAX_TOKENS)
    answer = parse_answer(completion).to_original(prompt.image.frames, reasoner.prompt.frame)
    mask, score = draw_masks(expert, expert.embed(image), [answer]).get(0, (None, None))
    return Grounding(answer=answer, completion=completion, image=image, mask=mask, score=score)


def ground_file(
    path: Path,
    query: str,
    *,
    model: Path,
    prompt: str | None,
    expert: str,
    checkpoint: Path | None,
    out: Path,
    window: Window | None = None,
    frame: int | None = None,
) -> tuple[Grounding, list[Path]]:
    """Ground a query in an image file and save what comes out. Checks the input before a model is loaded.

    prompt: in which words it asks (`ReasonerConfig`). window, frame: as `decode_image` takes them. Raises ValueError
    for what is no image, and OSError for a folder that cannot be written to.
    """
    if not clean_query(query):
        raise ValueError("the query is empty; ask about something in the image")
    image = decode_image(_read(path), str(path), window=window, frame=frame)
    asked = ReasonerConfig(model=model, prompt=prompt)
    segmenter = load_expert(expert, checkpoint=checkpoint)
    found = ground(image, query, load_reasoner(asked.model, asked.spec()), segmenter)
    return found, found.save(out, path.stem)


def beginning(completion: str) -> str:
    """What a terminal shows of an answer that cannot be used: a looping one fills pages."""
    if len(completion) <= _SHOWN:
        return repr(completion)
    return f"{completion[:_SHOWN]!r} … ({len(completion)} characters; all of them are in the JSON file)"


def _read(path: Path) -> bytes:
    try:
        # A device or a pipe might never end.
        if path.is_file():
            return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); give the path of an image") from error
    raise ValueError(f"{path} is not a file; give the path of an image")
