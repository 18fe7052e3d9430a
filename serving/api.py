"""The types of the HTTP interface, for the service and for its clients. Imports neither Ray nor torch.

Coordinates are pixels of the upright image at its original size: boxes x1, y1, x2, y2 with inclusive maximum, points
x, y.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

MaskFormat = Literal["rle", "png", "none"]
"""How JSON carries a mask: COCO run lengths, a PNG in base64, or not at all."""
MOST_SAMPLES = 64
"""Answers that one query may ask for; a service may allow fewer (`limits.samples`)."""
XYXY = tuple[float, float, float, float]
XY = tuple[float, float]


class Documented(BaseModel):
    """A type whose fields' docstrings stand in OpenAPI too."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class Strict(Documented):
    """A request; unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class GroundOptions(Strict):
    """How a query is answered; every field may be left out."""

    think: bool | None = None
    """Whether to reason before answering; null for what the model was trained to do."""
    samples: int = Field(default=1, ge=1, le=MOST_SAMPLES)
    """Answers whose masks are put to a vote; `confidence` then says how far they agree."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Of several samples: the same seed gives the same answers."""
    mask: MaskFormat = "rle"
    """Of the mask in the JSON answer."""
    window: str | None = Field(default=None, max_length=64, examples=["40,400", "p1,p99"])
    """For more than 8 bits a channel: CENTRE,WIDTH in stored values, or two percentiles pLOW,pHIGH."""
    frame: int | None = Field(default=None, ge=0)
    """Of a file with several pages; the first is 0."""


class GroundRequest(GroundOptions):
    """A query about an image, as JSON."""

    image: str = Field(description="The image file in base64: PNG, JPEG, TIFF or WebP.")
    query: str = Field(examples=["Which organ would be enlarged in long-standing alcohol use?"])
    """The question."""


class SegmentOptions(Strict):
    """A prompt for the expert: a box, points, or both."""

    box: XYXY | None = None
    """x1, y1, x2, y2 in pixels of the upright image."""
    points: Annotated[tuple[XY, ...], Field(max_length=64)] = ()
    """x, y of each."""
    labels: Annotated[tuple[Literal[0, 1], ...], Field(max_length=64)] = ()
    """Of each point: 1 within the mask, 0 outside it; all 1 where left out."""
    mask: MaskFormat = "rle"
    """Of the mask in the JSON answer."""
    window: str | None = Field(default=None, max_length=64)
    """As for `/v1/ground`."""
    frame: int | None = Field(default=None, ge=0)
    """Of a file with several pages; the first is 0."""


class SegmentRequest(SegmentOptions):
    """A prompt for the expert, about an image or about one that was sent before."""

    image: str | None = None
    """The image file in base64."""
    image_id: str | None = Field(default=None, pattern=r"^[0-9a-f]{32}$")
    """In place of the image: the id that an earlier answer gave it."""


class Rle(Documented):
    """A mask in COCO's compressed run-length encoding."""

    size: tuple[int, int]
    """Height and width."""
    counts: str
    """The run lengths, column by column, as pycocotools reads them."""


class Timings(Documented):
    """Where a request's time went, in seconds."""

    decode: float
    """Until the image was decoded."""
    reason: float = 0.0
    """Until the reasoner had answered."""
    segment: float
    """Until the expert had drawn the mask."""
    total: float


class MaskAnswer(Documented):
    """A mask and what goes with it."""

    mask: Rle | None
    """The expert's mask; null where there is none, or another format was asked for."""
    mask_png: str | None = None
    """The mask as a PNG in base64, 255 inside, where that format was asked for."""
    score: float | None
    """The expert's own estimate of the mask's IoU."""
    width: int
    """Width of the upright image."""
    height: int
    """Height of the upright image."""
    image_id: str
    """Names the image in later requests for masks (`/v1/segment`) with the same key, as long as it is kept."""
    expert: str
    """Name of the expert."""
    expert_licence: str
    """Licence of the expert's weights."""
    timings: Timings
    """Where the request's time went."""
    request_id: str
    """Names this request in the service's log."""


class SegmentResponse(MaskAnswer):
    """The expert's mask for a prompt."""


class GroundResponse(MaskAnswer):
    """The answer to a query."""

    query: str
    """The query as it was sent."""
    reasoning: str | None
    """The text of the think block; null where there is none."""
    well_formed: bool
    """Whether box and points are usable and, where the model was asked to reason, whether it did."""
    box: XYXY | None
    """x1, y1, x2, y2, inclusive maximum; null where malformed."""
    points: tuple[XY, XY] | None
    """The two key points; null where malformed."""
    confidence: float | None
    """Agreement of several samples, from 0 to 1; null for one."""
    completion: str
    """The reasoner's completion as generated; of several samples that of the one that stands for all."""
    model: str
    """The model's name."""
    policy_version: int
    """The training step of the weights that answered."""


class AnswerEvent(Documented):
    """Sent when the reasoner has answered and the mask is still being drawn."""

    reasoning: str | None
    well_formed: bool
    box: XYXY | None
    points: tuple[XY, XY] | None


class ReasoningEvent(Documented):
    """A piece of the completion, as it is written."""

    text: str


class Problem(Documented):
    """Why a request was not answered."""

    detail: str
    """A sentence; of a client's mistake it says what to change."""
    type: str = Field(examples=["bad_request", "unauthorized", "too_large", "overloaded", "internal"])
    """The kind of problem, for programs."""
    request_id: str
    """Names this request in the service's log."""
