"""What passes between the ingress and the two models, and how a request can fail there."""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from umrg.answers import Answer
from umrg.frames import Box
from umrg.group import GroupSamples, SamplingParams


@dataclass(frozen=True, kw_only=True, eq=False)
class Picture:
    """A decoded image on its way to the models. Compared by identity, as a key of what is kept as long as it is."""

    id: str
    """Names the image in the caches of both models. It depends on the file, on how it was decoded and on whose it is,
    so that nobody's request finds what another's key has sent."""
    pixels: NDArray[np.uint8]
    """uint8 [H, W, 3] RGB, upright."""


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What the reasoner is asked about an image."""

    text: str
    """The query; with `raw`, the whole text of the user's message. Special tokens are removed from either."""
    sampling: SamplingParams
    """How many completions of which length; greedy at temperature 0."""
    think: bool | None = None
    """Whether the prompt asks for reasoning; None for what the service's configuration says."""
    raw: bool = False
    """Whether the text is sent as it is, without the task's instructions, as a chat client has written it."""
    system: str | None = None
    """The system message; with `raw` only."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A box, points, or both, given by a caller for a mask, in original pixels."""

    box: Box | None
    """XYXY, inclusive maximum."""
    points: tuple[tuple[float, float], ...] = ()
    """XY."""
    labels: tuple[int, ...] = ()
    """Of each point: 1 within the mask, 0 outside it."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A mask that the expert drew."""

    mask: Mapping[str, object]
    """COCO's compressed run-length encoding, as `umrg.masks.encode_rle` gives it."""
    width: int
    height: int
    score: float
    """The expert's own estimate of the mask's IoU; of a consensus that of the chosen answer's mask."""
    chosen: int = 0
    """Index of the answer that stands for the consensus."""
    confidence: float | None = None
    """Agreement of several answers, 0 to 1 (`serving.consensus`); None for a single one."""


class Failed(RuntimeError):
    """A request that failed for no fault of its own. Each kind has its HTTP status in `serving.errors`."""


class Overloaded(Failed):
    """All queues are full: try again later."""


class Unavailable(Failed):
    """A replica died and no other took over: try again later."""


class TimedOut(Failed):
    """The request lasted longer than a request may."""


class UnknownImage(Failed):
    """No embedding is kept for an image id: the image must be sent again."""


class Models(Protocol):
    """The reasoner and the segmenter, as the routes ask them. `serving.upstream` asks the replicas.

    Every method raises ValueError (`Mistake`) for what is wrong with the request, and `Failed` for what is not.
    """

    async def sample(self, picture: Picture, ask: Ask) -> GroupSamples:
        """The reasoner's completions."""
        ...

    def stream(self, picture: Picture, ask: Ask) -> AsyncIterator[str | GroupSamples]:
        """One completion as it is written, in pieces of text, and then the whole as `sample` returns it."""
        ...

    async def embed(self, picture: Picture) -> None:
        """Let the segmenter embed an image, ahead of the answer that it will be asked to draw."""
        ...

    async def draw(self, picture: Picture, answers: Sequence[Answer]) -> Drawn | None:
        """The mask of an answer, or the consensus of several; None where none has a usable box and points."""
        ...

    async def segment(self, image_id: str, picture: Picture | None, prompt: Prompt) -> Drawn:
        """The mask of a caller's prompt. image_id: the `id` of the image's picture. picture: None for an image whose
        embedding is kept. Raises UnknownImage."""
        ...

    async def ready(self) -> None:
        """Ground a tiny image; raises where either model cannot."""
        ...
