"""`medreasoner serve`: the application on this machine, until it is interrupted."""

import signal
import threading
from typing import Any

import ray
from ray import serve

from actors.connection import connect
from actors.experts.registry import find_expert
from learner.reasoner import load_prompter
from serving.app import build_app
from serving.config import ServeConfig

HOST = "127.0.0.1"


def start(args: dict[str, Any], *, port: int) -> str:
    """Start the service on the loopback interface; its address. Raises ValueError for a folder that is no model,
    and for an expert that is not there."""
    config = ServeConfig.model_validate(args)
    load_prompter(config.model, config.spec())
    find_expert(config.expert, config.segmenter.checkpoint, config.segmenter.preprocess)
    connect()
    serve.start(http_options={"host": HOST, "port": port})
    serve.run(build_app(args), name="medreasoner", route_prefix="/")
    return f"http://{HOST}:{port}"


def stop() -> None:
    """End the service and what it runs on, if it got that far."""
    if ray.is_initialized():
        serve.shutdown()
        ray.shutdown()


def run(args: dict[str, Any], *, port: int) -> None:
    """Start, say where, and wait for Ctrl-C or SIGTERM; either ends the start too."""
    ended = threading.Event()
    try:
        address = start(args, port=port)
        for sign in (signal.SIGINT, signal.SIGTERM):
            signal.signal(sign, lambda *_: ended.set())
        print(f"serving {args['model']} at {address}; try\n")
        print(f'    curl -F image=@IMAGE -F query="QUERY" {address}/v1/ground\n', flush=True)
        while not ended.wait(1.0):
            pass
    finally:
        stop()
