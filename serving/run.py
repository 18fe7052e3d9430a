"""`medreasoner serve`: runs the application until it is interrupted, on a cluster of its own or beside other
applications on a shared one."""

import ipaddress
import logging
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import HTTPOptions
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeInstanceDetails
from rich.console import Console

from actors.connection import connect
from actors.experts.registry import check_expert, licence_line
from reasoner.prompter import load_prompter
from serving.app import build_app, build_local_app, version
from serving.config import ServeConfig
from serving.keys import read_keys
from serving.metrics import ROUTES
from serving.privacy import CONTROLLER_OPTIONS, LOGGING
from serving.reasoner import refuse_other_shape
from umrg.mistake import Mistake

HOST = "127.0.0.1"
NAME = "medreasoner"


class Service:
    """The application on the running Ray cluster, or on a local one. build: makes the application of its arguments; by
    default it is the one that asks for keys, if there are any, and else the one for this machine alone."""

    def __init__(
        self,
        args: dict[str, Any],
        *,
        port: int,
        host: str = HOST,
        build: Callable[[dict[str, Any]], serve.Application] | None = None,
    ) -> None:
        self._args, self._host, self._port = args, host, port
        self._open = _needs_no_key(args)
        self._build = build or (build_local_app if self._open else build_app)
        self._connected = self._serve_is_ours = self._deployed = False

    def start(self) -> str:
        """Start the service and return its address. Raises ValueError where another application of the cluster has its
        name or one of its routes, and where others would reach it without a key."""
        if self._open:
            _refuse_open(self._host)
        self._connected = connect()
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        running = _get_global_client(raise_if_no_controller_running=False)
        refuse_collision({name: app.route_prefix for name, app in applications().items()})
        self._serve_is_ours = running is None
        serve.start(
            http_options=HTTPOptions(host=self._host, port=self._port, keep_alive_timeout_s=90),
            logging_config=LOGGING,
            controller_options=CONTROLLER_OPTIONS,
        )
        self._look_at_address()
        self._deployed = True
        self._deploy(self._args)
        return self.address()

    def reload(self, args: dict[str, Any]) -> None:
        """Go on with the weights of another model folder, or with other numbers of replicas, without dropping a
        request. args: those of the start, with what is to change. Raises ValueError where it needs a restart; what is
        served then stays."""
        if _needs_no_key(args) != self._open:
            raise Mistake("whether clients need keys is settled at the start; restart the service for it")
        before = ServeConfig.model_validate(self._args)
        # Clients know the service by the name that it began with.
        args = {**args, "name": before.served_name}
        after = ServeConfig.model_validate(args)
        if version(before) != version(after):
            raise Mistake(
                "more has changed than the model, the keys, queues and numbers of replicas; restart the service for it"
            )
        refuse_other_shape(before, load_prompter(before.model, before.spec()), after.model)
        self._deploy(args)
        self._args = args

    def address(self) -> str:
        """Where the service is asked."""
        options = _get_global_client().http_config
        everywhere = options.host in (None, "localhost", "0.0.0.0", "::")
        return f"http://{HOST if everywhere else options.host}:{options.port}"

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

    def _deploy(self, args: dict[str, Any]) -> None:
        try:
            serve.run(self._build(args), name=NAME, route_prefix="/")
        except RuntimeError as error:
            # Serve's own message names the deployment, and each deployment's says why.
            found = applications().get(NAME)
            reasons = {each.message for each in found.deployments.values() if each.message} if found else set()
            raise NotServed("\n".join(sorted(reasons)) or str(error)) from error

    def _look_at_address(self) -> None:
        options = _get_global_client().http_config
        if options.port != self._port:
            print(f"Serve runs on this cluster already, at port {options.port}; --port {self._port} is not heeded")
        if self._open:
            _refuse_open(str(options.host))


class NotServed(RuntimeError):
    """The application did not start, or did not take over a change."""


def _needs_no_key(args: dict[str, Any]) -> bool:
    return not (args.get("keys") or args.get("keys_file"))


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _refuse_open(host: str) -> None:
    if not is_loopback(host):
        raise Mistake(
            f"whoever reaches {host} could use the service; give it keys with --keys FILE (`medreasoner key NAME` "
            f"makes one), or let it listen on {HOST}"
        )


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
        if prefix is not None and any(f"{path}/".startswith(f"{prefix.rstrip('/')}/") for path in ROUTES):
            raise Mistake(
                f"the application {name} of this cluster answers at {prefix}, where this one would; "
                "give it another route prefix, or use another cluster"
            )


def check(config: ServeConfig) -> None:
    """Raise ValueError for a folder without a model, an expert that does not exist, and a file without keys."""
    if config.keys_file:
        read_keys(config.keys_file)
    load_prompter(config.model, config.spec())
    check_expert(config.expert, config.segmenter.checkpoint, config.segmenter.preprocess)


def run(read: Callable[[], ServeConfig], *, host: str, port: int) -> None:
    """Start the service, print its address, and wait for Ctrl-C or SIGTERM; both also interrupt the start. SIGHUP
    lets it go on with the weights that its model has by then. read: reads the configuration."""
    config = read()
    check(config)
    newer = list[int]()
    # By itself it would end this process, and during the start nobody would end what is started already.
    signal.signal(signal.SIGHUP, lambda sign, _: newer.append(sign))
    service = Service(_args(config), host=host, port=port)
    try:
        with Console(stderr=True).status(f"starting {config.served_name} with the expert {config.expert}"):
            address = service.start()
        with suppress(KeyboardInterrupt):
            _on_end(signal.default_int_handler)
            _announce(config, address)
            while True:
                time.sleep(0.5)
                if newer:
                    newer.clear()
                    # May be interrupted too: it lasts for ever where the cluster has no room for more replicas.
                    _reload(service, read)
        _on_end(signal.SIG_IGN)
    finally:
        service.stop()


def _announce(config: ServeConfig, address: str) -> None:
    print(licence_line(config.expert, config.segmenter.checkpoint))
    print(f"serving {config.served_name} at {address}; try\n")
    key = "" if not (config.keys or config.keys_file) else '-H "Authorization: Bearer $MEDREASONER_KEY" '
    print(f'    curl {key}-F image=@IMAGE -F query="QUERY" {address}/v1/ground\n')
    print(f"what it takes and answers is told at {address}/docs", flush=True)


def _on_end(handler: Callable[..., Any] | signal.Handlers) -> None:
    """What Ctrl-C and SIGTERM do from now on; Ray has its own handler of the latter."""
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, handler)


def _reload(service: Service, read: Callable[[], ServeConfig]) -> None:
    try:
        config = read()
        service.reload(_args(config))
    except (ValueError, RuntimeError, OSError, RayError) as error:
        # What is served stays: a mistake in a newer folder must not end it.
        print(f"not reloaded: {error}", flush=True)
    else:
        print(f"serving {config.model}", flush=True)


def _args(config: ServeConfig) -> dict[str, Any]:
    return config.model_dump()
