"""`medreasoner serve`: runs the application until it is interrupted, on a cluster of its own or beside other
applications on a shared one."""

import signal
import threading
from collections.abc import Callable
from typing import Any

import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeInstanceDetails

from actors.connection import connect
from actors.experts.registry import check_expert
from reasoner.prompter import load_prompter
from serving.app import build_app
from serving.config import ServeConfig
from umrg.mistake import Mistake

HOST = "127.0.0.1"
NAME = "medreasoner"
PATHS = ("/v1/ground", "/healthz")
"""The routes of the application."""


class Service:
    """The application on the running Ray cluster, or on a local one. build: makes the application of its arguments."""

    def __init__(
        self, args: dict[str, Any], *, port: int, build: Callable[[dict[str, Any]], serve.Application] = build_app
    ) -> None:
        self._args, self._port, self._build = args, port, build
        self._connected = self._serve_is_ours = self._deployed = False

    def start(self) -> str:
        """Start the service and return its address on the loopback interface. Raises ValueError where another
        application of the cluster has its name or one of its routes."""
        self._connected = connect()
        running = _get_global_client(raise_if_no_controller_running=False)
        refuse_collision({name: app.route_prefix for name, app in applications().items()})
        self._serve_is_ours = running is None
        serve.start(http_options={"host": HOST, "port": self._port})
        self._deployed = True
        serve.run(self._build(self._args), name=NAME, route_prefix="/")
        return self._address()

    def stop(self) -> None:
        """End whatever `start` has started, even if it did not finish; other applications keep running."""
        if not ray.is_initialized():
            return
        others = applications().keys() - {NAME}
        if self._serve_is_ours and not others:
            serve.shutdown()
        elif self._deployed:
            serve.delete(NAME)
        if self._connected:
            ray.shutdown()

    def _address(self) -> str:
        options = _get_global_client().http_config
        if options.port != self._port:
            print(f"Serve runs on this cluster already, at port {options.port}; --port {self._port} is not heeded")
        host = HOST if options.host in (None, "localhost", "0.0.0.0", "::") else options.host
        return f"http://{host}:{options.port}"


def applications() -> dict[str, Any]:
    """The applications that Serve runs on the cluster, by name."""
    # The public `serve.status` tells neither their routes nor Serve's port.
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return {}
    found: dict[str, Any] = ServeInstanceDetails(**client.get_serve_details()).applications
    return found


def refuse_collision(running: dict[str, str | None]) -> None:
    """Raise ValueError where a running application has our name, or a route prefix that captures one of our routes.
    running: route prefixes by the applications' names."""
    if NAME in running:
        raise Mistake(f"an application {NAME} runs on this cluster already; end it, or use another cluster")
    for name, prefix in running.items():
        if prefix is not None and any(f"{path}/".startswith(f"{prefix.rstrip('/')}/") for path in PATHS):
            raise Mistake(
                f"the application {name} of this cluster answers at {prefix}, where this one would; "
                "give it another route prefix, or use another cluster"
            )


def check(args: dict[str, Any]) -> None:
    """Raise ValueError for a folder that holds no model, and for an expert that does not exist."""
    config = ServeConfig.model_validate(args)
    load_prompter(config.model, config.spec())
    check_expert(config.expert, config.segmenter.checkpoint, config.segmenter.preprocess)


def run(args: dict[str, Any], *, port: int) -> None:
    """Start the service, print its address, and wait for Ctrl-C or SIGTERM; both also interrupt the start."""
    check(args)
    ended = threading.Event()
    service = Service(args, port=port)
    try:
        address = service.start()
        for sign in (signal.SIGINT, signal.SIGTERM):
            signal.signal(sign, lambda *_: ended.set())
        print(f"serving {args['model']} at {address}; try\n")
        print(f'    curl -F image=@IMAGE -F query="QUERY" {address}/v1/ground\n', flush=True)
        while not ended.wait(1.0):
            pass
    finally:
        service.stop()
