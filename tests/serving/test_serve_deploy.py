"""`serve deploy` of the YAML file and of the RayService's `serveConfigV2`, on a cluster of its own: the application
that they describe, with the tiny models in place of the large ones."""

import copy
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from serving.keys import new_key
from serving.run import NAME
from tests.conftest import ROOT, TINY_REASONER
from tests.deploy.manifests import manifest
from tests.nodes import free_port, started_cluster
from tests.runs import cluster_folder

pytestmark = pytest.mark.slow

SERVE = Path(sys.executable).parent / "serve"
SECONDS = 240
IMAGE = (ROOT / "docs" / "pictures" / "example.png").read_bytes()
KEY, DIGEST = new_key()


def small(config, port, *, model=TINY_REASONER, policy_version=0):
    """The application of a file for this machine: the tiny models, a replica of each, no GPU, one key, loopback."""
    found = copy.deepcopy(config)
    found["http_options"] |= {"host": "127.0.0.1", "port": port}
    (app,) = found["applications"]
    app["args"] |= {
        "model": str(TINY_REASONER),
        "expert": "tiny",
        "rollout": {"num_cpus": 0.5},
        "segmenter": {"num_cpus": 0.1},
        "ingress": {"num_cpus": 0.1},
        "keys": [{"name": "test", "sha256": DIGEST}],
    }
    (reasoner,) = app["deployments"]
    reasoner["user_config"] = {"model": str(model), "policy_version": policy_version}
    return found


@dataclass(frozen=True)
class Deployment:
    """A cluster that files are deployed on, from a folder without the project's code."""

    dashboard: str
    session: Path
    """Where Ray keeps its sessions."""
    port: int
    folder: Path

    def deploy(self, config):
        """The application, once Serve has done what it will do about the file."""
        (self.folder / "serve.yaml").write_text(yaml.safe_dump(config))
        before = self.application().get("last_deployed_time_s")
        self._serve("deploy", "serve.yaml")
        deadline = time.monotonic() + SECONDS
        while True:
            app = self.application()
            if app.get("last_deployed_time_s") != before and app["status"] in ("RUNNING", "DEPLOY_FAILED"):
                return app
            assert time.monotonic() < deadline, app
            time.sleep(0.5)

    def application(self):
        applications = httpx.get(f"{self.dashboard}/api/serve/applications/").json()["applications"]
        assert applications.keys() <= {NAME}
        return applications.get(NAME, {})

    def status(self):
        """What `serve status` says, without times."""
        (app,) = yaml.safe_load(self._serve("status"))["applications"].values()
        return {name: app[name] for name in ("status", "message", "deployments")}

    def ask(self, **options):
        reply = httpx.post(
            f"http://127.0.0.1:{self.port}/v1/ground",
            files={"image": IMAGE},
            data={"query": "Which organ?"},
            timeout=150,
            **options,
        )
        return reply

    def answer(self):
        reply = self.ask(headers={"Authorization": f"Bearer {KEY}"})
        assert reply.status_code == 200, reply.text
        return reply.json()

    def _serve(self, *words):
        environment = {**os.environ, "PYTHONPATH": ""}
        command = [str(SERVE), *words, "--address", self.dashboard]
        done = subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        # Nodes have the code in their environment, as in the image: `serve deploy` sends none.
        patch.setenv("PYTHONPATH", str(ROOT))
        with cluster_folder() as session, started_cluster("--num-cpus=2", f"--temp-dir={session}") as nodes:
            yield Deployment(nodes.dashboard, session, free_port(), tmp_path_factory.mktemp("deployed"))


@pytest.fixture(scope="module")
def files():
    """What both files say, by name."""
    return {
        "serve deploy": yaml.safe_load((ROOT / "deploy" / "serve.yaml").read_text()),
        "RayService": yaml.safe_load(manifest("serve")["spec"]["serveConfigV2"]),
    }


@pytest.fixture(scope="module")
def deployed(cluster, files):
    """The application of deploy/serve.yaml."""
    app = cluster.deploy(small(files["serve deploy"], cluster.port))
    assert app["status"] == "RUNNING", app["message"]
    return app


def described(app):
    """What an application is, without what differs from one deployment of it to the next."""
    told = ("name", "route_prefix", "docs_path", "status", "deployed_app_config", "source")
    options = {name: each["deployment_config"] for name, each in app["deployments"].items()}
    return {**{name: app[name] for name in told}, "deployments": options}


def replicas(app):
    """Process ids of the replicas, by deployment."""
    return {
        name: sorted(each["pid"] for each in deployment["replicas"]) for name, deployment in app["deployments"].items()
    }


def test_both_files_give_the_same_application(cluster, files, deployed):
    """For Serve the second is no change of the first: the same replicas go on."""
    status = cluster.status()
    again = cluster.deploy(small(files["RayService"], cluster.port))
    assert again["last_deployed_time_s"] > deployed["last_deployed_time_s"]
    assert described(again) == described(deployed) and replicas(again) == replicas(deployed)
    assert cluster.status() == status and status["status"] == "RUNNING"
    assert again["route_prefix"] == "/" and again["deployments"].keys() == {"Ingress", "Reasoner", "Segmenter"}
    assert {name: each["status"] for name, each in status["deployments"].items()} == dict.fromkeys(
        again["deployments"], "HEALTHY"
    )


def test_it_answers_who_has_a_key(cluster, deployed):
    assert cluster.ask().status_code == 401
    assert cluster.ask(headers={"Authorization": "Bearer another"}).status_code == 401
    found = cluster.answer()
    assert found["completion"] and (found["model"], found["policy_version"]) == ("lingshu-7b-soft", 0)


def test_serves_proxies_are_ours_and_log_nothing(cluster, deployed):
    """The file's `controller_options` and `logging_config` hold for what `serve deploy` has started."""
    reply = cluster.ask(headers={"X-Request-Id": "canary", "Authorization": f"Bearer {KEY}"})
    (request_id,) = reply.headers.get_list("x-request-id")
    assert reply.status_code == 200 and request_id != "canary"
    logs = {path.name: path.read_text(errors="replace") for path in cluster.session.glob("*/logs/**/*.*")}
    assert any("proxy" in name for name in logs) and any("controller" in name for name in logs)
    assert not [name for name, text in logs.items() if "canary" in text or "/v1/ground" in text]


def test_newer_weights_are_taken_over_by_the_replica_that_runs(cluster, files, deployed, tmp_path):
    newer = tmp_path / "newer"
    shutil.copytree(TINY_REASONER, newer)
    torch.manual_seed(0)
    weights = load_file(TINY_REASONER / "model.safetensors")
    weights = {name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in weights.items()}
    save_file(weights, newer / "model.safetensors", metadata={"format": "pt"})
    before = cluster.answer()
    app = cluster.deploy(small(files["serve deploy"], cluster.port, model=newer, policy_version=7))
    assert app["status"] == "RUNNING" and replicas(app) == replicas(deployed)
    after = cluster.answer()
    assert after["policy_version"] == 7 and after["completion"] != before["completion"]


def test_other_keys_are_taken_over_by_the_replicas_that_run(cluster, files, deployed):
    config = small(files["serve deploy"], cluster.port)
    (app,) = config["applications"]
    for (key, digest), other in ((new_key(), KEY), ((KEY, DIGEST), "none")):
        ingress = {"name": "Ingress", "user_config": {"keys": [{"name": "test", "sha256": digest}]}}
        app["deployments"] = [*app["deployments"][:1], ingress]
        deployed_again = cluster.deploy(config)
        assert deployed_again["status"] == "RUNNING" and replicas(deployed_again) == replicas(deployed)
        assert cluster.ask(headers={"Authorization": f"Bearer {other}"}).status_code == 401
        assert cluster.ask(headers={"Authorization": f"Bearer {key}"}).status_code == 200


def test_without_keys_it_is_not_built_and_what_runs_goes_on(cluster, files, deployed):
    config = small(files["serve deploy"], cluster.port)
    del config["applications"][0]["args"]["keys"]
    app = cluster.deploy(config)
    sentence = "there are no keys, and whoever reaches the service could use it"
    assert app["status"] == "DEPLOY_FAILED" and sentence in app["message"]
    assert sentence in cluster.status()["message"]
    assert cluster.ask().status_code == 401 and cluster.answer()["completion"]
