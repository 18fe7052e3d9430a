"""A reasoner and a segmenter for tests of what is in front of them: no Ray, no weights, the same answers each time.

    models = FakeModels()                                        # answers at once
    models = FakeModels(seconds=0.2)                             # each call takes so long
    models = FakeModels(gate=asyncio.Event())                    # each call waits until the test sets the event
    models = FakeModels(failures={"draw": Overloaded("full")})   # one method raises
    models = FakeModels(completion="no answer")                  # what the reasoner writes

The answer depends on the image's size alone: `box_of` and `points_of` say what it is. It is written in the model frame,
which is twice the original here, so that an answer that nobody converts is seen. Masks are filled boxes.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from serving.messages import Ask, Drawn, Picture, Prompt, UnknownImage
from umrg.answers import Answer, format_answer
from umrg.frames import Box, Frame, Frames, PointPair, Size
from umrg.group import Completion, GroupSamples, SamplingParams
from umrg.masks import encode_rle
from umrg.mistake import Mistake

THOUGHTS = "The spine is seen in the middle, and it thins with age."
SCORE = 0.875
_PIECE = 7
_RADIUS = 2
_SPREAD = 3


def box_of(width: int, height: int, shift: int = 0) -> Box:
    """The fake's box, XYXY in original pixels. shift: of a sampled completion, to the right."""
    return width // 4 + shift, height // 4, width // 2 + shift, height // 2


def points_of(width: int, height: int) -> PointPair:
    """The fake's key points, XY in original pixels."""
    return (width // 3, height // 3), (width // 2, height // 2)


def mask_of(box: Box, width: int, height: int) -> NDArray[np.bool_]:
    """The fake's mask of a box, bool [H, W]: the box, filled."""
    mask = np.zeros((height, width), dtype=np.bool_)
    x1, y1, x2, y2 = (max(0, round(edge)) for edge in box)
    mask[y1 : y2 + 1, x1 : x2 + 1] = True
    return mask


@dataclass(kw_only=True)
class FakeModels:
    """`serving.messages.Models`, in this process."""

    seconds: float = 0.0
    """How long each call takes, and each piece of a stream."""
    gate: asyncio.Event | None = None
    """What each call waits for before it does anything."""
    failures: Mapping[str, Exception] = field(default_factory=dict)
    """What a method, by name, raises; `stream` does so once `pieces_before_failure` pieces were written."""
    pieces_before_failure: int = 2
    completion: str | None = None
    """What the reasoner writes, in place of its answer."""
    think: bool = True
    """Whether the answer has thoughts where the request does not say."""
    frame: Frame = Frame.MODEL
    """The frame in which the reasoner answers."""
    policy_version: int = 7
    kept: dict[str, Size] = field(default_factory=dict)
    """Sizes of the images whose embeddings are kept, by id."""
    calls: list[str] = field(default_factory=list)
    """Names of the methods that were called, in order."""
    asks: list[Ask] = field(default_factory=list)
    """What the reasoner was asked."""
    pictures: list[Picture] = field(default_factory=list)
    """The images that came, in order."""
    cancelled: list[str] = field(default_factory=list)
    """Names of the methods whose caller went away while they worked."""

    async def sample(self, picture: Picture, ask: Ask) -> GroupSamples:
        await self._work("sample", picture, ask)
        self._fail("sample")
        return self._samples(picture, ask)

    async def stream(self, picture: Picture, ask: Ask) -> AsyncIterator[str | GroupSamples]:
        await self._work("stream", picture, ask)
        samples = self._samples(picture, ask)
        text = samples.completions[0].text
        for written, start in enumerate(range(0, len(text), _PIECE)):
            if written == self.pieces_before_failure:
                self._fail("stream")
            yield text[start : start + _PIECE]
            await self._pause("stream")
        self._fail("stream")
        yield samples

    async def embed(self, picture: Picture) -> None:
        await self._work("embed", picture)
        self._fail("embed")
        self._keep(picture)

    async def draw(self, picture: Picture, answers: Sequence[Answer]) -> Drawn | None:
        """The mask of the first usable answer; confidence is the IoU of all that were given, none of an unusable."""
        await self._work("draw", picture)
        self._fail("draw")
        size = self._keep(picture)
        boxes = [answer.box if answer.promptable else None for answer in answers]
        masks = [mask_of(box, size.width, size.height) for box in boxes if box is not None]
        if not masks:
            return None
        union, common = np.any(masks, axis=0).sum(), np.all(masks, axis=0).sum()
        agreement = float(common / union) * len(masks) / len(answers)
        return Drawn(
            mask=encode_rle(masks[0]),
            width=size.width,
            height=size.height,
            score=SCORE,
            chosen=next(i for i, box in enumerate(boxes) if box is not None),
            confidence=agreement if len(answers) > 1 else None,
        )

    async def segment(self, image_id: str, picture: Picture | None, prompt: Prompt) -> Drawn:
        """The box, filled, with a small square around each point within the mask, without those outside it."""
        await self._work("segment", picture)
        self._fail("segment")
        if prompt.box is None and not prompt.points:
            raise Mistake("the prompt is empty; give a box, points, or both")
        if picture is not None:
            self._keep(picture)
        if image_id not in self.kept:
            raise UnknownImage(f"nothing is kept of the image {image_id}; send it again")
        size = self.kept[image_id]
        mask = np.zeros((size.height, size.width), dtype=np.bool_)
        if prompt.box is not None:
            mask |= mask_of(prompt.box, size.width, size.height)
        for (x, y), label in zip(prompt.points, prompt.labels, strict=True):
            mask[mask_of((x - _RADIUS, y - _RADIUS, x + _RADIUS, y + _RADIUS), size.width, size.height)] = label == 1
        return Drawn(mask=encode_rle(mask), width=size.width, height=size.height, score=SCORE)

    async def ready(self) -> None:
        await self._work("ready")
        self._fail("ready")

    async def _work(self, name: str, picture: Picture | None = None, ask: Ask | None = None) -> None:
        self.calls.append(name)
        self.pictures += [] if picture is None else [picture]
        self.asks += [] if ask is None else [ask]
        await self._pause(name)

    async def _pause(self, name: str) -> None:
        try:
            if self.gate is not None:
                await self.gate.wait()
            await asyncio.sleep(self.seconds)
        except asyncio.CancelledError:
            self.cancelled.append(name)
            raise

    def _fail(self, name: str) -> None:
        if name in self.failures:
            raise self.failures[name]

    def _keep(self, picture: Picture) -> Size:
        return self.kept.setdefault(picture.id, _size(picture))

    def _samples(self, picture: Picture, ask: Ask) -> GroupSamples:
        original = _size(picture)
        frames = Frames(original=original, model=Size(2 * original.width, 2 * original.height))
        texts = [self._text(frames, ask, shift) for shift in _shifts(ask.sampling)]
        completions = tuple(
            Completion(
                text=text,
                token_ids=tuple(range(1, 1 + len(text.split()))),
                logprobs=(-0.5,) * len(text.split()),
                policy_version=self.policy_version,
                finished=True,
            )
            for text in texts
        )
        return GroupSamples(prompt_ids=(1, 2, 3), frames=frames, completions=completions)

    def _text(self, frames: Frames, ask: Ask, shift: int) -> str:
        if self.completion is not None:
            return self.completion
        width, height = frames.original.width, frames.original.height
        return format_answer(
            box=frames.box(box_of(width, height, shift), Frame.ORIGINAL, self.frame),
            points=frames.points(points_of(width, height), Frame.ORIGINAL, self.frame),
            think=THOUGHTS if (self.think if ask.think is None else ask.think) else None,
        )


def _shifts(sampling: SamplingParams) -> list[int]:
    """How far each completion's box lies to the right: the same for a seed, and 0 for the greedy completion."""
    if sampling.temperature == 0:
        return [0] * sampling.n
    return [((sampling.seed or 0) + i) % _SPREAD for i in range(sampling.n)]


def _size(picture: Picture) -> Size:
    height, width = picture.pixels.shape[:2]
    return Size(width, height)
