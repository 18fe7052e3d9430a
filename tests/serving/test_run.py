"""The service beside those of others, on one cluster: with applications that only say their name."""

import socket
from typing import Any

import httpx
import pytest
from ray import serve

from serving.run import NAME, Service, applications, is_loopback, refuse_collision
from tests.conftest import TINY_REASONER


class Greeter:
    def __init__(self, name: str) -> None:
        self.name = name

    async def __call__(self, request) -> str:
        return self.name


def build(args):
    ending = {"graceful_shutdown_timeout_s": 0.1, "graceful_shutdown_wait_loop_s": 0.1}
    deployment: Any = serve.deployment(Greeter, ray_actor_options={"num_cpus": 0}, **ending)
    return deployment.bind(args["name"])


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
def test_what_others_serve_goes_on_when_ours_ends(ray_cluster, capsys):
    """Whether theirs came after ours or was there before."""
    first = Service({"name": "ours"}, port=free_port(), build=build)
    address = first.start()
    serve.run(build({"name": "theirs"}), name="theirs", route_prefix="/theirs")
    assert httpx.get(address).text == "ours"
    with pytest.raises(ValueError, match="an application medreasoner runs on this cluster already"):
        Service({"name": "a second"}, port=free_port(), build=build).start()
    first.stop()
    assert httpx.get(f"{address}/theirs").text == "theirs" and httpx.get(address).status_code == 404
    second = Service({"name": "ours again"}, port=1, build=build)
    assert second.start() == address and f"already, at port {address.split(':')[-1]}" in capsys.readouterr().out
    assert httpx.get(address).text == "ours again"
    second.stop()
    assert httpx.get(f"{address}/theirs").text == "theirs" and applications().keys() == {"theirs"}
    serve.shutdown()


@pytest.mark.parametrize("prefix", ["/", "/v1", "/v1/", "/v1/ground", "/v1/chat", "/docs", "/metrics", "/healthz"])
def test_an_application_that_answers_where_ours_would_is_named(prefix):
    with pytest.raises(ValueError, match=f"the application theirs of this cluster answers at {prefix}, where"):
        refuse_collision({"theirs": prefix})


def test_applications_elsewhere_are_no_obstacle():
    refuse_collision({"a": "/v1/groundwork", "b": "/v2", "c": None, "d": "/v1/chatter"})
    with pytest.raises(ValueError, match=NAME):
        refuse_collision({NAME: None})


@pytest.mark.parametrize(
    ("host", "alone"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False)]
)
def test_without_keys_only_this_machine_may_reach_it(host, alone):
    assert is_loopback(host) == alone
    if not alone:
        with pytest.raises(ValueError, match=r"give it keys with --keys FILE"):
            Service({}, host=host, port=1).start()


def test_a_reload_neither_adds_the_first_key_nor_takes_the_last_away(tmp_path):
    """It would go unheeded: what is built for this machine alone asks nobody for a key."""
    without, with_keys = {"model": TINY_REASONER}, {"model": TINY_REASONER, "keys_file": tmp_path / "keys.yaml"}
    for before, after in ((without, with_keys), (with_keys, without)):
        with pytest.raises(ValueError, match="whether clients need keys is settled at the start"):
            Service(before, port=1).reload(after)
