"""The service without Ray: its real routes, guard and forms over `FakeModels`, and clients that call them directly."""

from contextlib import asynccontextmanager

import httpx

from serving.answering import Answering, Served
from serving.config import Key, ServeConfig
from serving.guard import Guard
from serving.keys import Doorkeeper
from serving.metrics import Metrics
from serving.routes import build_api
from tests.conftest import TINY_REASONER
from tests.serving.fake_models import FakeModels
from umrg.images import decode_image
from umrg.prompts import PromptSpec
from umrg.windowing import Window


class HereDecoder:
    """Decodes in this process."""

    async def decode(self, data, *, window, frame):
        return decode_image(data, "the image", window=None if window is None else Window.parse(window), frame=frame)


async def no_metrics():
    return "# none\n"


def interface(models=None, *, decoder=None, **settings):
    """The routes, before which nobody stands guard, and the configuration. settings: of `ServeConfig`."""
    config = ServeConfig.model_validate({"model": TINY_REASONER, "name": "tiny", **settings})
    served = Served(name="tiny", expert="fake", licence="none", spec=PromptSpec(think=True))
    answering = Answering(config, served, models or FakeModels(), decoder or HereDecoder(), Metrics("Ingress"))
    return build_api(answering, no_metrics), config


def application(models=None, *, decoder=None, keys: tuple[Key, ...] | None = None, **settings):
    """The ASGI application. settings: of `ServeConfig`."""
    api, config = interface(models, decoder=decoder, **settings)
    return Guard(api, Doorkeeper(keys), config.limits)


@asynccontextmanager
async def calling(app, **options):
    """An httpx client of an application."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000", **options) as client:
        yield client
