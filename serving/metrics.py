"""The service's figures: each process records its own through Ray, and `Exposition` gathers those of all nodes for
Prometheus.

No label holds anything that a client chose: routes, reasons and stages are the service's own names. Ray collects from
its processes every few seconds (RAY_metrics_report_interval_ms, by default 10 s), so figures are that old. It also puts
`ray_` before each name, and makes the sum of a histogram from its buckets' middles: means are estimates.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final, Literal

import httpx
import ray
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from ray.util.metrics import Counter, Gauge, Histogram
from starlette._utils import get_route_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from umrg.group import GroupSamples

PREFIX: Final = "medreasoner_serve_"
OTHER: Final = "other"
"""In place of a route or a reason that the service does not know."""
ROUTES: Final = frozenset(
    {"/v1/ground", "/v1/segment", "/v1/chat/completions", "/v1/models", "/healthz", "/readyz", "/metrics", "/docs"}
    | {"/openapi.json"}
)
OF_SERVE: Final = frozenset(
    {
        "deployment_queued_queries",
        "num_ongoing_requests_at_replicas",
        "replica_processing_queries",
        "deployment_replica_healthy",
        "deployment_replica_starts",
        "autoscaling_target_replicas",
        "deployment_status",
        "application_status",
        "num_http_requests",
        "num_http_error_requests",
        "http_request_latency_ms",
        "deployment_processing_latency_ms",
        "deployment_error_counter",
    }
)
"""Serve's own figures that are given too: queues, replicas, requests and how long they took."""
SECONDS: Final = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0),
)
"""Upper bounds of the buckets that seconds are counted in."""

Stage = Literal["decode", "reason", "segment", "total"]
Cache = Literal["embeddings", "prefix"]


class Metrics:
    """The figures of one replica. deployment: whose replica it is. Without a connection to a cluster nothing is
    exported."""

    def __init__(self, deployment: str) -> None:
        self._deployment = deployment
        self._now = 0
        self._requests = Counter(f"{PREFIX}requests", "Requests that were answered.", ("route", "status"))
        self._latency = Histogram(f"{PREFIX}request_seconds", "Until the answer's end.", list(SECONDS), ("route",))
        self._stages = Histogram(f"{PREFIX}stage_seconds", "Of a request, by stage.", list(SECONDS), ("stage",))
        self._tokens = Counter(f"{PREFIX}tokens", "Tokens of prompts, of them cached ones, and sampled.", ("kind",))
        self._caches = Counter(f"{PREFIX}cache", "Lookups in caches.", ("cache", "result"))
        self._under_way = Gauge(f"{PREFIX}under_way", "Requests under way or waiting.", ("deployment",))

    def request(self, route: str, status: int, seconds: float) -> None:
        """An answer. route: as the service declares it, never a path that a client sent; any other counts as `other`.
        seconds: from the request's first byte to the answer's end."""
        route = route if route in ROUTES else OTHER
        self._requests.inc(1, {"route": route, "status": str(int(status))})
        self._latency.observe(seconds, {"route": route})

    def stage(self, name: Stage, seconds: float) -> None:
        """How long a stage of a request took."""
        self._stages.observe(seconds, {"stage": name})

    def tokens(self, samples: GroupSamples) -> None:
        """Tokens of a prompt and of its completions, and whether the engine knew its beginning."""
        sampled = sum(len(completion.token_ids) for completion in samples.completions)
        counts = {"prompt": len(samples.prompt_ids), "cached": samples.cached, "sampled": sampled}
        for kind, count in counts.items():
            if count:
                self._tokens.inc(count, {"kind": kind})
        self.looked_up("prefix", hits=samples.cached > 0, misses=samples.cached == 0)

    def looked_up(self, cache: Cache, *, hits: int = 0, misses: int = 0) -> None:
        """Lookups in a cache."""
        for result, count in (("hit", hits), ("miss", misses)):
            if count:
                self._caches.inc(count, {"cache": cache, "result": result})

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """While a request is under way, or waits, in this replica. For use on one event loop."""
        self._count(+1)
        try:
            yield
        finally:
            self._count(-1)

    def _count(self, change: int) -> None:
        self._now += change
        self._under_way.set(self._now, {"deployment": self._deployment})


class Counted:
    """ASGI: counts requests by route and status, and how long they took, to the answer's end."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), 499  # of a client that went before it was answered

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        with self._metrics.under_way():
            try:
                await self._app(scope, receive, counted)
            finally:
                self._metrics.request(get_route_path(scope), status, time.monotonic() - began)


Nodes = Mapping[str, str]
"""Addresses of the metrics endpoints of living nodes, by the nodes' ids."""


def living_nodes() -> Nodes:
    """Of the cluster that this process belongs to."""
    return {
        node["NodeID"]: f"http://{_bracketed(node['NodeManagerAddress'])}:{node['MetricsExportPort']}/metrics"
        for node in ray.nodes()
        if node["Alive"] and node.get("MetricsExportPort")
    }


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


class Exposition:
    """What `GET /metrics` answers: the service's figures, and Serve's own of this application, of all living nodes.

    application: its name in Serve. nodes: finds the nodes' endpoints; may block. deadline: seconds that a node has to
    answer. fresh: seconds for which an answer is given again, so that asking often costs nothing.
    """

    def __init__(
        self,
        application: str,
        *,
        nodes: Callable[[], Nodes] = living_nodes,
        deadline: float = 2.0,
        fresh: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._application, self._nodes = application, nodes
        self._deadline, self._fresh, self._clock = deadline, fresh, clock
        self._lock = asyncio.Lock()
        self._text = ""
        self._until = float("-inf")

    async def text(self) -> str:
        """Prometheus' text format, version 0.0.4. Nodes that did not answer are counted in
        `ray_medreasoner_serve_silent_nodes`."""
        async with self._lock:
            if self._clock() >= self._until:
                self._text = await self._gathered()
                self._until = self._clock() + self._fresh
            return self._text

    async def _gathered(self) -> str:
        nodes = await asyncio.to_thread(self._nodes)
        # Nodes are asked directly, whatever proxy the environment names.
        async with httpx.AsyncClient(timeout=self._deadline, trust_env=False) as client:
            texts = await asyncio.gather(*(self._asked(client, url) for url in nodes.values()))
        answered = {node: text for node, text in zip(nodes, texts, strict=True) if text is not None}
        return await asyncio.to_thread(joined, answered, self._application, len(nodes) - len(answered))

    async def _asked(self, client: httpx.AsyncClient, url: str) -> str | None:
        try:
            async with asyncio.timeout(self._deadline):
                answer = await client.get(url)
        except (httpx.HTTPError, TimeoutError):
            return None
        return answer.text if answer.status_code == 200 else None


def joined(texts: Mapping[str, str], application: str, silent: int) -> str:
    """One text of those that nodes gave. texts: by the nodes' ids. silent: how many other nodes gave none."""
    families: dict[str, Metric] = {}
    for node, text in texts.items():
        for family in text_string_to_metric_families("\n".join(_lines_of_ours(text, application)) + "\n"):
            if not family.samples:
                continue
            whole = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            whole.samples += [each._replace(labels=_labels(each.labels, node)) for each in family.samples]
    count = GaugeMetricFamily(f"ray_{PREFIX}silent_nodes", "Nodes whose figures are missing here.", value=silent)
    registry = CollectorRegistry()
    registry.register(_Collected([*families.values(), count]))
    return generate_latest(registry).decode()


class _Collected(Collector):
    """Families that are there already, as a registry asks for them."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


_OF_RAY = frozenset(
    {"NodeAddress", "NodeId", "SessionName", "JobId", "Component", "Version", "WorkerId", "ip", "pid", "actor_id"}
    | {"otel_scope_name", "otel_scope_version", "otel_scope_schema_url"}
)
"""Labels that Ray adds, which tell about the cluster's inside."""


def _labels(labels: Mapping[str, str], node: str) -> dict[str, str]:
    """Without those of Ray; node and process are told apart by the beginnings of their random ids."""
    kept = {name: value for name, value in labels.items() if name not in _OF_RAY}
    return {**kept, "node": node[:12], "process": labels.get("WorkerId", "")[:12]}


def _lines_of_ours(text: str, application: str) -> Iterator[str]:
    """The lines about the service and about its application in Serve. Parsing is slow, and a node has thousands."""
    mark = f'application="{application}"'
    wanted = ours = False
    for line in text.splitlines():
        # A family's lines follow the two of its name.
        if line.startswith("# HELP "):
            name = line.split(" ", 3)[2]
            ours = name.startswith(f"ray_{PREFIX}")
            wanted = ours or name.removeprefix("ray_serve_").removesuffix("_total") in OF_SERVE
        if wanted and (ours or line.startswith("#") or mark in line):
            yield line
