"""The replicas that speak HTTP."""

from typing import Any

from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from serving.answering import Answering, Served
from serving.config import Key, ServeConfig
from serving.decoding import Decoders
from serving.guard import Guard
from serving.keys import Doorkeeper
from serving.metrics import Metrics, exposition
from serving.routes import build_api
from serving.upstream import Replicas


class Ingress:
    """Lets requests in, decodes their images, and passes them to the two models. `serving.app` makes it a deployment.
    keys: None where everybody is let in."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        config: ServeConfig,
        served: Served,
        keys: tuple[Key, ...] | None,
        reasoner: DeploymentHandle,
        segmenter: DeploymentHandle,
    ) -> None:
        self._config = config
        self._door = Doorkeeper(keys, sharers=config.ingress.actors)
        self._decoders = Decoders(config.ingress.decoders, config.limits)
        await self._decoders.start()
        self._answering = Answering(config, served, Replicas(reasoner, segmenter), self._decoders, Metrics())

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return Guard(build_api(self._answering, exposition), self._door, self._config.limits)

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take other keys, without a restart. user_config: `{"keys": [...]}`, as in the configuration."""
        if (keys := user_config.get("keys")) is not None:
            self._door.replace(tuple(Key.model_validate(key) for key in keys))
