"""The replicas that speak HTTP."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from serving.answering import Answering, Served
from serving.config import Key, ServeConfig
from serving.decoding import Decoders
from serving.guard import Guard
from serving.keys import Doorkeeper
from serving.metrics import Counted, Exposition, Metrics
from serving.privacy import log_discreetly
from serving.routes import build_api
from serving.upstream import Replicas


@dataclass(frozen=True, kw_only=True)
class Entrance:
    """Who is let in."""

    keys: tuple[Key, ...] | None
    """None for everybody."""
    local_only: bool
    """Whether only this machine reaches the service."""


class Ingress:
    """Lets requests in, decodes their images, and passes them to the two models. `serving.app` makes it a
    deployment."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        config: ServeConfig,
        served: Served,
        entrance: Entrance,
        reasoner: DeploymentHandle,
        segmenter: DeploymentHandle,
    ) -> None:
        log_discreetly()
        self._config, self._local_only = config, entrance.local_only
        replicas = config.ingress
        # A key's limits hold for all replicas together, so with fewer of them than there may be it gets less.
        self._door = Doorkeeper(
            entrance.keys, sharers=replicas.autoscale.max if replicas.autoscale else replicas.actors
        )
        if threads := config.ingress.threads:
            # They hash, draw and encode pictures.
            asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(threads))
        self._metrics = Metrics("Ingress")
        self._decoders = Decoders(config.ingress.decoders, config.limits)
        await self._decoders.start()
        self._answering = Answering(config, served, Replicas(reasoner, segmenter), self._decoders, self._metrics)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        application = serve.get_replica_context().app_name
        api = build_api(self._answering, Exposition(application).text)
        return Counted(Guard(api, self._door, self._config.limits, local_only=self._local_only), self._metrics)

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take other keys, without a restart. user_config: `{"keys": [...]}`, as in the configuration."""
        if (keys := user_config.get("keys")) is not None:
            self._door.replace(tuple(Key.model_validate(key) for key in keys))
