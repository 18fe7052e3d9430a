"""The grounder as a Ray Serve application.

                               ┌─image, query──► Reasoner (vLLM) ──completions──┐
    HTTP ──► Ingress ──decoded─┤                                                ├──► JSON, PNG, events
                               └─image, box, points──► Segmenter ──────mask─────┘

Prompt, parser, engine and expert are those of training and evaluation: a served answer equals the evaluated one.
"""

import hashlib
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application, Deployment
from ray.serve.config import AutoscalingConfig, BackpressureConfig, RequestRouterConfig

from actors.config import PoolConfig
from actors.experts.registry import check_expert, licence
from serving.answering import Served
from serving.config import Key, Queue, ServeConfig, trained_steps, weights_written
from serving.ingress import Entrance, Ingress
from serving.keys import read_keys
from serving.privacy import LOGGING
from serving.replicas import ReasonerReplica, SegmenterReplica
from umrg.config import located
from umrg.mistake import Mistake

BUNDLED = Path(__file__).parents[1] / "models" / "tiny-reasoner"
"""The model that is served where none is named."""
_RETRY_AFTER = 2.0
_HEALTH = {"health_check_period_s": 5.0, "health_check_timeout_s": 40.0}
_ONE_LOOP = dict.fromkeys(("RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD", "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP"), "0")
"""Nothing here blocks an event loop, so a request need not change threads on its way through a replica."""
_BY_IMAGE = RequestRouterConfig(
    request_router_class="ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
)


def build_app(args: dict[str, Any]) -> Application:
    """Build the application, from Python or from a Serve YAML file (`import_path: serving.app:build_app`). args: the
    fields of `ServeConfig`; without a model the bundled tiny one is served. Raises ValueError where they are invalid,
    and where neither keys are given nor `auth: off` is written: Serve chooses the address, so everybody might reach
    it."""
    config = _checked(args)
    keys = config.keys + (read_keys(config.keys_file) if config.keys_file else ())
    if not keys and config.auth != "off":
        raise Mistake(
            "there are no keys, and whoever reaches the service could use it; give keys or keys_file (`medreasoner key "
            "NAME` makes one), or write auth: off"
        )
    return _built(config, keys or None)


def build_local_app(args: dict[str, Any]) -> Application:
    """The same for an address that only this machine reaches: everybody who asks by such an address is let in. Who asks
    by another name was led here by a page of that name, and is refused."""
    return _built(_checked(args), None, local_only=True)


def _built(config: ServeConfig, keys: tuple[Key, ...] | None, *, local_only: bool = False) -> Application:
    served = Served(
        name=config.served_name,
        expert=Path(config.expert).name,
        licence=licence(config.expert, config.segmenter.checkpoint),
        spec=config.spec(),
    )
    reasoner = _deployment("Reasoner", ReasonerReplica, config.rollout, config.reasoner_queue, config).options(
        user_config={
            "model": str(config.model),
            "policy_version": trained_steps(config.model),
            "written": weights_written(config.model),
        },
        request_router_config=_BY_IMAGE,
    )
    segmenter = _deployment("Segmenter", SegmenterReplica, config.segmenter, config.segmenter_queue, config).options(
        request_router_config=_BY_IMAGE
    )
    ingress = _deployment("Ingress", serve.ingress()(Ingress), config.ingress, config.ingress_queue, config)
    if keys:
        # Running replicas take other keys over from here.
        ingress = ingress.options(user_config={"keys": [key.model_dump() for key in keys]})
    door = Entrance(keys=keys, local_only=local_only)
    app: Application = ingress.bind(config, served, door, reasoner.bind(config), segmenter.bind(config))
    return app


def _checked(args: dict[str, Any]) -> ServeConfig:
    """The configuration with absolute paths, because replicas run in another working directory."""
    config = ServeConfig.model_validate({"model": BUNDLED, **args})
    check_expert(config.expert, config.segmenter.checkpoint, config.segmenter.preprocess)
    absolute = {
        "model": located(config.model),
        "expert": located(config.expert),
        "segmenter": config.segmenter.located(),
    }
    return config.model_copy(update=absolute)


def _deployment(name: str, kind: type, actors: PoolConfig, queue: Queue, config: ServeConfig) -> Deployment:
    """A class as a deployment with its resources, queues and checks."""
    deployment: Deployment = serve.deployment(
        kind,
        name=name,
        ray_actor_options={
            "num_cpus": actors.num_cpus,
            "num_gpus": actors.num_gpus,
            "label_selector": actors.node_labels,
            "runtime_env": {"env_vars": {**_ONE_LOOP, **actors.process_environment}},
        },
        max_ongoing_requests=queue.ongoing,
        max_queued_requests=queue.queued,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=_RETRY_AFTER),
        # A replica that goes ends the requests that it has, the longest of which lasts as long as a request may.
        graceful_shutdown_timeout_s=config.limits.request_seconds + 10.0,
        logging_config=LOGGING,
        **_HEALTH,
        **_replicas(actors, queue),
    ).options(version=version(config), _internal=True)
    return deployment


def version(config: ServeConfig) -> str:
    """Digest of what a running replica cannot take over. Without a version Serve would start all replicas anew at each
    `serve.run`; of one version it changes their number, and hands them their `user_config`."""
    counts = {"actors", "autoscale"}
    light: dict[str, Any] = {
        **dict.fromkeys(("model", "keys", "keys_file", "reasoner_queue", "segmenter_queue", "ingress_queue"), True),
        **dict.fromkeys(("rollout", "segmenter", "ingress"), counts),
    }
    # A service that is told to go on keeps the name that it began with, whether that was written or its folder's.
    named = config.model_copy(update={"name": config.served_name})
    return hashlib.sha256(named.model_dump_json(exclude=light).encode()).hexdigest()[:16]


def _replicas(actors: PoolConfig, queue: Queue) -> dict[str, Any]:
    if (bounds := actors.autoscale) is None:
        return {"num_replicas": actors.actors}
    # Another replica is started when those that there are have half of what they take.
    scaling = AutoscalingConfig(
        min_replicas=bounds.min,
        max_replicas=bounds.max,
        initial_replicas=actors.actors,
        target_ongoing_requests=max(1, queue.ongoing // 2),
    )
    return {"autoscaling_config": scaling}
