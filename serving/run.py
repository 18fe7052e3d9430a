"""`medreasoner serve`: the application on this machine, until it is interrupted."""

import signal
import threading
from typing import Any

import ray
from ray import serve

from learner.reasoner import load_prompter
from serving.app import build_app
from serving.config import ServeConfig

HOST = "127.0.0.1"


def start(args: dict[str, Any], *, port: int) -> str:
    """Start the service on the loopback interface; its address. Raises ValueError for a folder that is no model."""
    load_prompter(ServeConfig.model_validate(args).model)
    if not ray.is_initialized():
        ray.init(logging_level="ERROR", log_to_driver=False)
    serve.start(http_options={"host": HOST, "port": port})
    serve.run(build_app(args), name="medreasoner", route_prefix="/")
    return f"http://{HOST}:{port}"


def stop() -> None:
    """End the service and what it runs on."""
    serve.shutdown()
    ray.shutdown()


def run(args: dict[str, Any], *, port: int) -> None:
    """Start, say where, and wait for Ctrl-C or SIGTERM."""
    ended = threading.Event()
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, lambda *_: ended.set())
    try:
        address = start(args, port=port)
        print(f"serving {args['model']} at {address}; try\n")
        print(f'    curl -F image=@IMAGE -F query="QUERY" {address}/v1/ground\n', flush=True)
        while not ended.wait(1.0):
            pass
    finally:
        stop()
