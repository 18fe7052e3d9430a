"""The grounder as a Ray Serve application.

    POST /v1/ground ──► Ingress ──image, query──► ReasonerDeployment (vLLM) ──answer──► SegmenterDeployment ──► JSON

Prompt, parser, engine and expert are those of training and evaluation: a served answer equals the evaluated one.
"""

import asyncio
from typing import Annotated, Any

import numpy as np
from fastapi import Depends, FastAPI, Form, HTTPException, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from numpy.typing import NDArray
from pydantic import BaseModel
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from serving.config import ServeConfig
from serving.grounder import check_query
from umrg.answers import Answer, parse_answer
from umrg.config import ActorConfig, located
from umrg.group import SamplingParams
from umrg.images import decode_image
from umrg.masks import encode_rle
from umrg.mistake import Mistake
from umrg.windowing import Window

api = FastAPI(title="MedReasoner", description="Ask a medical image an implicit question.")


@api.exception_handler(RequestValidationError)
async def _invalid_form(_: Request, error: RequestValidationError) -> JSONResponse:
    faults = "; ".join(f"{fault['loc'][-1]}: {fault['msg']}" for fault in error.errors())
    return JSONResponse({"detail": f"{faults}; send a form with an image file and a query"}, status_code=422)


async def _no_repeated_field(request: Request) -> None:
    """Refuse a form with two fields of one name: the framework would silently take one of them."""
    names = [name for name, _ in (await request.form()).multi_items()]
    if repeated := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise HTTPException(400, f"the form has more than one {' and '.join(repeated)}; send one of each")


class Rle(BaseModel):
    """A mask in COCO's compressed run-length encoding."""

    size: tuple[int, int]
    """Height and width."""
    counts: str
    """The run lengths, column by column, as pycocotools reads them."""


class GroundResponse(BaseModel):
    """The answer to a query. Coordinates are pixels of the upright image at its original size."""

    query: str
    """The query as it was sent."""
    reasoning: str | None
    """The text of the think block; null where there is none."""
    well_formed: bool
    """Whether box and points are usable and, where the model was asked to reason, whether it did."""
    box: tuple[float, float, float, float] | None
    """x1, y1, x2, y2, inclusive maximum; null where malformed."""
    points: tuple[tuple[float, float], tuple[float, float]] | None
    """The two key points as x, y; null where malformed."""
    mask: Rle | None
    """The expert's mask; null where box or points are malformed."""
    score: float | None
    """The expert's own estimate of the mask's IoU."""
    width: int
    """Width of the upright image."""
    height: int
    """Height of the upright image."""
    completion: str
    """The reasoner's completion as generated."""


@serve.deployment
class ReasonerDeployment:
    """Answers queries, with one vLLM engine in each replica."""

    async def __init__(self, config: ServeConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        from actors.engine import Engine
        from actors.threads import share_cores
        from reasoner.prompter import load_prompter

        share_cores(config.rollout.threads, config.rollout.actors)
        prompter = load_prompter(config.model, config.spec())
        self._engine = await Engine.start(config.model, prompter, config.rollout)
        self._max_tokens = config.rollout.max_tokens

    async def answer(self, image: NDArray[np.uint8], query: str) -> tuple[str, Answer]:
        """The greedy completion, and the answer parsed from it, in original pixels."""
        greedy = SamplingParams(n=1, temperature=0.0, max_tokens=self._max_tokens)
        samples = await self._engine.generate(image, query, greedy)
        (completion,) = samples.completions
        frame = self._engine.prompter.prompt.frame
        return completion.text, parse_answer(completion.text).to_original(samples.frames, frame)


@serve.deployment
class SegmenterDeployment:
    """Draws masks, with one expert in each replica."""

    def __init__(self, config: ServeConfig) -> None:
        from actors.experts.drawing import load_frozen
        from actors.threads import share_cores

        share_cores(config.segmenter.threads, config.segmenter.actors)
        self._expert = load_frozen(config.expert, config.segmenter)

    def draw(self, image: NDArray[np.uint8], answer: Answer) -> tuple[NDArray[np.bool_], float] | None:
        """The mask bool [H, W] and the expert's score; None where the answer has no usable box and points."""
        from actors.experts.drawing import draw_masks

        return draw_masks(self._expert, self._expert.embed(image), [answer]).get(0)


@serve.deployment
@serve.ingress(api)
class Ingress:
    """Validates requests and passes them to the two models."""

    def __init__(self, config: ServeConfig, reasoner: DeploymentHandle, segmenter: DeploymentHandle) -> None:
        self._config, self._reasoner, self._segmenter = config, reasoner, segmenter
        self._think = config.spec().think

    @api.post("/v1/ground", dependencies=[Depends(_no_repeated_field)])
    async def ground(
        self,
        image: UploadFile,
        query: Annotated[str, Form()],
        window: Annotated[str | None, Form(description="CENTRE,WIDTH, for more than 8 bits a channel")] = None,
        frame: Annotated[int | None, Form(description="of a file with several pages; the first is 0")] = None,
    ) -> GroundResponse:
        """Ground a query in an image."""
        pixels = self._decoded(await image.read(), image.filename or "the image", window, frame)
        try:
            check_query(query)
            return await asyncio.wait_for(self._ground(pixels, query), self._config.timeout)
        except Mistake as error:
            # Ray wraps an error that a replica raised and puts the whole traceback into the message; `cause` is bare.
            raise HTTPException(400, str(getattr(error, "cause", error))) from None
        except TimeoutError:
            raise HTTPException(504, f"no answer within {self._config.timeout:g} s; try again later") from None

    @api.get("/healthz")
    async def health(self) -> dict[str, str]:
        """Whether the service is up."""
        return {"status": "ok", "model": str(self._config.model), "expert": self._config.expert}

    async def _ground(self, pixels: NDArray[np.uint8], query: str) -> GroundResponse:
        completion, answer = await self._reasoner.answer.remote(pixels, query)
        drawn = await self._segmenter.draw.remote(pixels, answer)
        mask, score = drawn if drawn is not None else (None, None)
        return GroundResponse(
            query=query,
            reasoning=answer.think,
            well_formed=answer.well_formed(think=self._think),
            box=answer.box,
            points=answer.points,
            mask=None if mask is None else Rle.model_validate(encode_rle(mask)),
            score=score,
            width=pixels.shape[1],
            height=pixels.shape[0],
            completion=completion,
        )

    def _decoded(self, data: bytes, name: str, window: str | None, frame: int | None) -> NDArray[np.uint8]:
        """The image file as uint8 [H, W, 3]."""
        limit = self._config.max_image_mib
        if len(data) > limit << 20:
            raise HTTPException(413, f"{name} has {len(data) / 2**20:.1f} MiB; at most {limit} are accepted")
        try:
            levels = None if window is None else Window.parse(window)
            return decode_image(data, name, window=levels, frame=frame)
        except Mistake as error:
            raise HTTPException(400, str(error)) from None


def build_app(args: dict[str, Any]) -> Application:
    """Build the application, from Python or from a Serve YAML file (`import_path: serving.app:build_app`). args: the
    fields of `ServeConfig`. Raises ValueError where they are invalid."""
    config = ServeConfig.model_validate(args)
    # Replicas run in another working directory.
    absolute = {
        "model": located(config.model),
        "expert": located(config.expert),
        "segmenter": config.segmenter.located(),
    }
    config = config.model_copy(update=absolute)
    rollout, segmenter = config.rollout, config.segmenter
    reasoner = ReasonerDeployment.options(  # type: ignore[attr-defined]
        num_replicas=rollout.actors, ray_actor_options=_resources(rollout)
    ).bind(config)
    expert = SegmenterDeployment.options(  # type: ignore[attr-defined]
        num_replicas=segmenter.actors, ray_actor_options=_resources(segmenter)
    ).bind(config)
    ingress = Ingress.options(ray_actor_options={"num_cpus": 0.1})  # type: ignore[attr-defined]
    app: Application = ingress.bind(config, reasoner, expert)
    return app


def _resources(config: ActorConfig) -> dict[str, Any]:
    """Ray's options of each replica."""
    return {
        "num_cpus": config.num_cpus,
        "num_gpus": config.num_gpus,
        "label_selector": config.node_labels,
        "runtime_env": {"env_vars": config.process_environment},
    }
