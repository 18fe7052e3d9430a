"""A run's metrics as gauges of Ray, which each node's metrics endpoint exports for Prometheus."""

import re
from collections.abc import Mapping

import ray
from ray.util.metrics import Gauge

from cluster.timesheet import AWAITED

PREFIX = "medreasoner_"


def gauge_name(metric: str) -> tuple[str, dict[str, str]]:
    """A metric's gauge, to whose name Ray adds `ray_`, and its tags. What ends in a role or a phase has that as a tag:

    actors/rollout       medreasoner_actors{role="rollout"}
    busy/rollout_awaited medreasoner_busy_awaited{role="rollout"}
    seconds/learn        medreasoner_seconds{phase="learn"}
    reward/mask_dice     medreasoner_reward_mask_dice
    """
    group, _, rest = metric.partition("/")
    if group == "seconds":
        return f"{PREFIX}{group}", {"phase": rest}
    role, _, what = rest.partition("_")
    if group in ("actors", "busy") and role in AWAITED:
        return PREFIX + "_".join(filter(None, (group, what))), {"role": role}
    return PREFIX + re.sub(r"\W", "_", metric, flags=re.ASCII), {}


class Gauges:
    """The gauges of one run, tagged with its name. Without a connection to a cluster nothing is exported."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauges: dict[str, Gauge] = {}

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if not ray.is_initialized():
            return
        for metric, value in {"step": step, **metrics}.items():
            name, tags = gauge_name(metric)
            if name not in self._gauges:
                self._gauges[name] = Gauge(name, "metric of a MedReasoner run", tag_keys=("run", *tags))
            self._gauges[name].set(value, {"run": self._run, **tags})
