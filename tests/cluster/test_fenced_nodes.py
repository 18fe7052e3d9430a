"""A node with network, folders and shared memory of its own: what a run reads reaches it, what it writes does not."""

import json
import shutil

import pytest

from tests.conftest import ROOT, TINY_REASONER
from tests.nodes import fences, started_cluster
from tests.runs import Run
from tests.s3 import serving

pytestmark = [pytest.mark.slow, pytest.mark.cluster]

SMALL = ("steps=1", "evaluation={before: false, limit: 2, n: 0}", "rollout.num_cpus=1", "segmenter.num_cpus=0.5")
FENCED = ("rollout.node_labels.kind=fenced", "segmenter.node_labels.kind=fenced")


@pytest.fixture
def weights(tmp_path):
    folder = tmp_path / "weights"
    shutil.copytree(TINY_REASONER, folder / "reasoner")
    shutil.copytree(ROOT / "models" / "tiny-expert", folder / "expert")
    return folder


def test_weights_reach_a_node_that_shares_no_disk(tmp_path, weights, monkeypatch):
    """The reasoner from the driver's folder, the expert from a bucket. Checkpoints are written where the learner is."""
    for name, value in (("AWS_ACCESS_KEY_ID", "reader"), ("AWS_SECRET_ACCESS_KEY", "x"), ("RAY_AUTH_MODE", "disabled")):
        monkeypatch.setenv(name, value)
    runs, cache = tmp_path / "run" / "runs", tmp_path / "cache"
    for folder in (runs, cache):
        folder.mkdir(parents=True)
    with (
        fences(1, hidden=(weights, runs, cache)) as (ip, (fence,)),
        serving(weights, ip) as bucket,
        started_cluster(ip=ip) as cluster,
    ):
        cluster.add(1, labels={"kind": "open"})
        fenced = cluster.add(2, labels={"kind": "fenced"}, fence=fence)
        given = (*SMALL, *FENCED, f"model={weights / 'reasoner'}", f"expert={bucket.uri('expert')}", f"cache={cache}")
        run = Run(tmp_path / "run", *given, "learner.node_labels.kind=open", address=cluster.address)
        assert run.process.wait(timeout=300) == 0, run.output.read_text()
        said = run.output.read_text()
        assert f"reading {weights / 'reasoner'}, which is to be copied" in said
        copied = [line for line in said.splitlines() if line.startswith(f"node {fence.ip} (")]
        for source in (str(weights / "reasoner"), bucket.uri("expert")):
            assert [line for line in copied if line.endswith(f" has a copy of {source}")], said
        assert json.loads((run.folder / "summary.json").read_text())["status"] == "ended"
        assert f"expert: {bucket.uri('expert')}\n" in (run.folder / "config.yaml").read_text()
        assert bucket.read.count("expert/model.safetensors") == 2, "once by the driver and once by the node"

        there = ("name=lost", "learner.node_labels.kind=fenced", "learner.num_cpus=0.5")
        lost = Run(tmp_path / "run", *given, *there, output="lost", address=cluster.address)
        assert lost.process.wait(timeout=200) == 2, lost.output.read_text()
        (fault,) = [line for line in lost.output.read_text().splitlines() if line.startswith("error: ")]
        assert fault.startswith(f"error: node {fence.ip} (") and "has no " in fault and "give runs=…" in fault
        assert fenced.processes()
