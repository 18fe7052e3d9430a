"""The service's figures, and what `GET /metrics` makes of those of all nodes."""

import asyncio
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

from serving.metrics import Exposition, Metrics, joined
from umrg.frames import Frames, Size
from umrg.group import Completion, GroupSamples

OF_RAY = (
    'Component="core_worker",NodeAddress="192.0.2.7",SessionName="session_1",Version="2.60.0",'
    'WorkerId="{worker}",otel_scope_name="ray"'
)
PAGE = """\
# HELP ray_medreasoner_serve_requests_total Requests that were answered.
# TYPE ray_medreasoner_serve_requests_total counter
ray_medreasoner_serve_requests_total{{{ray},route="/v1/ground",status="200"}} {count}
# HELP ray_medreasoner_serve_stage_seconds Of a request, by stage.
# TYPE ray_medreasoner_serve_stage_seconds histogram
ray_medreasoner_serve_stage_seconds_bucket{{{ray},le="0.5",stage="decode"}} 1.0
ray_medreasoner_serve_stage_seconds_bucket{{{ray},le="+Inf",stage="decode"}} 2.0
ray_medreasoner_serve_stage_seconds_count{{{ray},stage="decode"}} 2.0
ray_medreasoner_serve_stage_seconds_sum{{{ray},stage="decode"}} 1.25
# HELP ray_medreasoner_reward_total Of a training run on the same cluster.
# TYPE ray_medreasoner_reward_total gauge
ray_medreasoner_reward_total{{{ray},run="secret"}} 1.0
# HELP ray_serve_deployment_queued_queries Queue depth.
# TYPE ray_serve_deployment_queued_queries gauge
ray_serve_deployment_queued_queries{{{ray},application="medreasoner",deployment="Ingress"}} 3.0
ray_serve_deployment_queued_queries{{{ray},application="theirs",deployment="Secret"}} 9.0
# HELP ray_serve_num_http_requests_total Answered by the proxy.
# TYPE ray_serve_num_http_requests_total counter
ray_serve_num_http_requests_total{{{ray},application="theirs",route="/secret"}} 9.0
# HELP ray_node_mem_used Memory.
# TYPE ray_node_mem_used gauge
ray_node_mem_used{{{ray},instance="secret"}} 9.0
"""
FIRST, SECOND = "a" * 56, "b" * 56


def page(worker, count):
    return PAGE.format(ray=OF_RAY.format(worker=worker), count=count)


def values(text, sample):
    return [
        each.value for family in text_string_to_metric_families(text) for each in family.samples if each.name == sample
    ]


def test_the_figures_of_all_nodes_and_processes_are_side_by_side():
    text = joined({FIRST: page("c" * 56, 4), SECOND: page("d" * 56, 5)}, "medreasoner", 0)
    assert values(text, "ray_medreasoner_serve_requests_total") == [4, 5]
    assert f'ray_medreasoner_serve_requests_total{{node="{FIRST[:12]}",process="{"c" * 12}",route="/v1/ground"' in text
    assert values(text, "ray_medreasoner_serve_stage_seconds_bucket") == [1, 2, 1, 2]
    assert values(text, "ray_medreasoner_serve_stage_seconds_sum") == [1.25, 1.25]
    assert values(text, "ray_serve_deployment_queued_queries") == [3, 3]


def test_nothing_of_other_applications_runs_and_hosts_is_told():
    text = joined({FIRST: page("c" * 56, 4)}, "medreasoner", 0)
    for secret in ("secret", "theirs", "192.0.2.7", "session_1", "mem_used", "otel", "c" * 13):
        assert secret not in text.lower()


def test_every_family_is_introduced_once():
    text = joined({FIRST: page("c" * 56, 4), SECOND: page("d" * 56, 5)}, "medreasoner", 2)
    types = [line for line in text.splitlines() if line.startswith("# TYPE")]
    assert types == [
        "# TYPE ray_medreasoner_serve_requests_total counter",
        "# TYPE ray_medreasoner_serve_stage_seconds histogram",
        "# TYPE ray_serve_deployment_queued_queries gauge",
        "# TYPE ray_medreasoner_serve_silent_nodes gauge",
    ]
    assert values(text, "ray_medreasoner_serve_silent_nodes") == [2]


@contextmanager
def node(text, *, hangs=False):
    """A node's metrics endpoint, and how often it was asked."""
    asked, ended = [], threading.Event()

    class Page(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if hangs:
                ended.wait(30)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/metrics", asked
    finally:
        ended.set()
        server.shutdown()
        server.server_close()


def test_nodes_that_do_not_answer_are_counted_and_waited_for_no_longer_than_the_deadline():
    with node(page("c" * 56, 4)) as (well, _), node("", hangs=True) as (hanging, _):
        nodes = {FIRST: well, SECOND: hanging, "e" * 56: "http://127.0.0.1:1/metrics"}
        text = asyncio.run(Exposition("medreasoner", nodes=lambda: nodes, deadline=0.5).text())
    assert values(text, "ray_medreasoner_serve_requests_total") == [4]
    assert values(text, "ray_medreasoner_serve_silent_nodes") == [2]


def test_asking_often_or_at_once_asks_the_nodes_once_a_second():
    now = 0.0
    with node(page("c" * 56, 4)) as (url, asked):

        async def ask():
            nonlocal now
            exposition = Exposition("medreasoner", nodes=lambda: {FIRST: url}, clock=lambda: now)
            await asyncio.gather(*(exposition.text() for _ in range(20)))
            at_once = len(asked)
            now = 0.9
            await exposition.text()
            soon = len(asked)
            now = 1.1
            await exposition.text()
            return at_once, soon, len(asked)

        assert asyncio.run(ask()) == (1, 1, 2)


class Replica:
    """Has answered a few requests."""

    def __init__(self):
        self.metrics = Metrics("Ingress")
        self.kept = self.metrics.under_way()

    def answer(self):
        """The id of this process."""
        self.kept.__enter__()
        with self.metrics.under_way():
            self.metrics.request("/v1/ground", 200, 0.3)
        self.metrics.request("/nobody/knows/canary", 404, 0.001)
        self.metrics.stage("decode", 0.02)
        self.metrics.looked_up("embeddings", hits=1)
        done = Completion(text="", token_ids=(1, 2, 3), logprobs=(0.0, 0.0, 0.0), policy_version=1, finished=True)
        frames = Frames(original=Size(8, 8), model=Size(8, 8))
        self.metrics.tokens(GroupSamples(prompt_ids=(1,) * 10, frames=frames, completions=(done, done), cached=4))
        return ray.get_runtime_context().get_worker_id()


def told_by(process, text):
    """What one process says: other replicas' figures are on the same page, also of some that have ended."""
    return {
        (
            each.name,
            *(value for name, value in sorted(each.labels.items()) if name not in ("node", "process")),
        ): each.value
        for family in text_string_to_metric_families(text)
        for each in family.samples
        if each.labels.get("process") == process and not each.name.endswith(("_bucket", "_sum", "_created"))
    }


@pytest.mark.slow
def test_what_a_replica_counts_comes_to_the_exposition(ray_cluster):
    name = "ray_medreasoner_serve_"
    counted = {
        (f"{name}requests_total", "/v1/ground", "200"): 1,
        (f"{name}requests_total", "other", "404"): 1,
        (f"{name}request_seconds_count", "/v1/ground"): 1,
        (f"{name}stage_seconds_count", "decode"): 1,
        (f"{name}tokens_total", "prompt"): 10,
        (f"{name}tokens_total", "cached"): 4,
        (f"{name}tokens_total", "sampled"): 6,
        (f"{name}cache_total", "prefix", "hit"): 1,
        (f"{name}cache_total", "embeddings", "hit"): 1,
        (f"{name}under_way", "Ingress"): 1,
    }
    replica = ray.remote(Replica).options(num_cpus=0).remote()
    process = ray.get(replica.answer.remote(), timeout=60)[:12]
    deadline = time.monotonic() + 60
    while not told_by(process, text := asyncio.run(Exposition("medreasoner").text())).items() >= counted.items():
        assert time.monotonic() < deadline, text
        time.sleep(1)
    ray.kill(replica)
    assert values(text, f"{name}silent_nodes") == [0]
    assert "canary" not in text
