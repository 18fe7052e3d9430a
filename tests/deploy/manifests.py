"""The manifests under deploy/kuberay as the API server gets them, and what is read from them."""

import copy
import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from cluster.config import TrainConfig, load_config
from tests.conftest import ROOT

KUBERAY = ROOT / "deploy" / "kuberay"
NAMES = ("train", "train-kueue", "cluster", "train-on-cluster", "serve")
UNITS = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40}


@cache
def manifest(name: str) -> dict[str, Any]:
    """One of `NAMES`, an overlay laid over its base as `kubectl kustomize` does."""
    if not (KUBERAY / name).is_dir():
        return _read(KUBERAY / f"{name}.yaml")
    overlay = _read(KUBERAY / name / "kustomization.yaml")
    (base,) = overlay["resources"]
    path = KUBERAY / name / base
    found = _read(path) if path.is_file() else copy.deepcopy(manifest(path.resolve().name))
    for patch in overlay.get("patches", ()):
        for operation in yaml.safe_load(patch["patch"]):
            _apply(found, **operation)
    return found


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.load(path.read_text(), Loader=yaml.CSafeLoader)
    return found


def _apply(tree: dict[str, Any], op: str, path: str, value: Any = None) -> None:
    """An operation of RFC 6902, of those that add and remove a field."""
    *parents, last = path.strip("/").split("/")
    for parent in parents:
        tree = tree[parent]
    if op == "remove":
        del tree[last]
    else:
        assert op == "add"
        tree[last] = value


def cluster_of(name: str) -> dict[str, Any]:
    """The RayCluster's spec in a manifest; empty for a job on a cluster that stays."""
    spec: dict[str, Any] = manifest(name)["spec"]
    if manifest(name)["kind"] == "RayCluster":
        return spec
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or {}


@dataclass(frozen=True)
class Pod:
    """A head, or a worker of a group."""

    group: dict[str, Any]

    @property
    def name(self) -> str:
        return self.group.get("groupName", "head")

    @property
    def spec(self) -> dict[str, Any]:
        found: dict[str, Any] = self.group["template"]["spec"]
        return found

    @property
    def ray(self) -> dict[str, Any]:
        """Ray's container."""
        return self.spec["containers"][0]

    @property
    def limits(self) -> dict[str, float]:
        return {name: amount(text) for name, text in self.ray["resources"]["limits"].items()}

    @property
    def environment(self) -> dict[str, str]:
        return {each["name"]: each.get("value", "") for each in self.ray.get("env", ())}

    def mounted(self, path: str) -> dict[str, Any]:
        """The volume that is mounted at a path."""
        (name,) = [each["name"] for each in self.ray["volumeMounts"] if each["mountPath"] == path]
        (volume,) = [each for each in self.spec["volumes"] if each["name"] == name]
        return volume


def head(name: str) -> Pod:
    return Pod(cluster_of(name)["headGroupSpec"])


def workers(name: str) -> list[Pod]:
    return [Pod(group) for group in cluster_of(name)["workerGroupSpecs"]]


def amount(text: str) -> float:
    """A quantity of Kubernetes, such as 24Gi, as a number."""
    unit = text[-2:] if text[-2:] in UNITS else ""
    return int(text.removesuffix(unit)) * UNITS.get(unit, 1)


def run_of(name: str) -> TrainConfig:
    """The configuration of the run that a job starts."""
    python, flag, module, path, *overrides = shlex.split(manifest(name)["spec"]["entrypoint"])
    assert (python, flag, module) == ("python", "-m", "cluster.train")
    return load_config(TrainConfig, ROOT / path, overrides)
