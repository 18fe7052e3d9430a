"""The manifests for KubeRay: what its CRDs and its operator demand, and that nodes, labels and memory are what the run
that they start needs. Nothing here talks to Kubernetes."""

import copy
import importlib
import importlib.metadata
import json
import re
from pathlib import Path

import pytest
import ray
import yaml

from actors.config import RolloutConfig, SegmenterConfig
from cluster.commands import doctor_demand
from cluster.commands.doctor_demand import BUCKET, ROOM, SHARED_SHARE, check_demand, demand
from cluster.commands.doctor_machine import Machine
from cluster.commands.doctor_result import GIB
from cluster.placement import Node, bundles, core, shortage
from tests.conftest import ROOT
from tests.deploy import crds
from tests.deploy.manifests import KUBERAY, NAMES, amount, cluster_of, head, manifest, run_of, workers

SCHEMAS = json.loads(crds.FIXTURE.read_text())
CRDS = ROOT.parent / "shared" / "schemas"
CLUSTERS = [name for name in NAMES if cluster_of(name)]
JOBS = [name for name in NAMES if manifest(name)["kind"] == "RayJob"]
RUNS_JOBS = [name for name in CLUSTERS if name != "serve"]
WAIT = "RAY_JOB_STOP_WAIT_TIME_S"


@pytest.mark.parametrize("name", NAMES)
def test_a_manifest_is_what_the_crd_says(name):
    assert manifest(name)["apiVersion"] == "ray.io/v1"
    assert crds.faults(manifest(name), SCHEMAS) == []


@pytest.mark.parametrize(
    ("place", "wrong", "said"),
    [
        (["spec"], {"backofLimit": 5}, r"\$\.spec: .*'backofLimit' was unexpected"),
        (["spec"], {"backoffLimit": "5"}, r"\$\.spec\.backoffLimit: '5' is not of type 'integer'"),
        (["spec", "rayClusterSpec", "workerGroupSpecs", 0], {"label": {}}, "'label' was unexpected"),
        (["spec", "rayClusterSpec", "headGroupSpec", "rayStartParams"], {"num-cpus": 0}, "0 is not of type 'string'"),
        (
            ["spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "containers", 0],
            {"volumeMount": []},
            r"containers\[0\]: .*'volumeMount' was unexpected",
        ),
        (
            ["spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "volumes", 1, "emptyDir"],
            {"sizelimit": "24Gi"},
            "'sizelimit' was unexpected",
        ),
        (["spec", "deletionStrategy", "deletionRules", 0], {"policy": "Delete"}, "'Delete' is not one of"),
    ],
)
def test_what_the_crd_does_not_know_is_refused(place, wrong, said):
    """A field that is misspelt, at any depth, and a value of another type."""
    changed = copy.deepcopy(manifest("train"))
    node = changed
    for step in place:
        node = node[step]
    node.update(wrong)
    assert re.search(said, "\n".join(crds.faults(changed, SCHEMAS)))


@pytest.mark.skipif(not CRDS.is_dir(), reason="no CRDs beside the checkout")
def test_the_small_crds_are_those_of_kuberay():
    whole = crds.of_folder(CRDS)
    assert crds.fixture(whole) == crds.FIXTURE.read_text(), "python -m tests.deploy.crds makes it anew"
    for name in NAMES:
        assert crds.faults(manifest(name), {**whole, "$defs": {}}) == []


@pytest.mark.parametrize("name", CLUSTERS)
def test_what_the_operator_demands_of_a_cluster(name):
    """`ValidateRayClusterSpec` of KubeRay 1.7, for what is used here."""
    spec = cluster_of(name)
    assert spec["rayVersion"] == importlib.metadata.version("ray"), "authOptions need it"
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert "labels" not in group["rayStartParams"], "labels are a field of their own"
        if spec.get("autoscalerOptions", {}).get("version") == "v2":
            assert "restartPolicy" not in group["template"]["spec"]
        if "groupName" in group:
            assert group["minReplicas"] <= group["maxReplicas"]
    if not spec.get("enableInTreeAutoscaling"):
        assert not any("priority" in group for group in spec["workerGroupSpecs"])
    options = spec.get("gcsFaultToleranceOptions", {})
    assert "storage" not in options, "which is for the backend rocksdb"
    assert not {"REDIS_PASSWORD", "RAY_REDIS_ADDRESS"} & head(name).environment.keys()


@pytest.mark.parametrize("name", JOBS)
def test_what_the_operator_demands_of_a_job(name):
    """`ValidateRayJobSpec` of KubeRay 1.7."""
    spec = manifest(name)["spec"]
    rules = spec.get("deletionStrategy", {}).get("deletionRules", [])
    ends = spec.get("shutdownAfterJobFinishes", False)
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", manifest(name)["metadata"]["name"])
    assert not (rules and ends) and (ends or not spec.get("ttlSecondsAfterFinished"))
    assert ends or not spec.get("suspend"), "Kueue's jobs end their cluster"
    assert ("clusterSelector" in spec) != ("rayClusterSpec" in spec)
    if "clusterSelector" in spec:
        assert spec["clusterSelector"]["ray.io/cluster"] == manifest("cluster")["metadata"]["name"]
        assert not rules and not spec["backoffLimit"] and not spec.get("suspend")
    for rule in rules:
        assert len(rule["condition"].keys() & {"jobStatus", "jobDeploymentStatus"}) == 1
    kept = [each["condition"]["ttlSeconds"] for each in rules if each["condition"].get("jobStatus") == "SUCCEEDED"]
    assert kept == sorted(kept), "workers, cluster, itself"


def test_kueue_holds_the_same_run_back():
    ours, queued = manifest("train"), manifest("train-kueue")
    assert queued["spec"]["suspend"] and queued["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    for key in ("entrypoint", "rayClusterSpec", "backoffLimit", "activeDeadlineSeconds"):
        assert queued["spec"][key] == ours["spec"][key]


@pytest.mark.parametrize("name", JOBS)
def test_a_run_goes_on_where_its_last_try_ended(name):
    """Runs, weights and data are on the storage that all nodes mount, and the run resumes."""
    config = run_of(name)
    assert config.resume == "auto" and config.runs == Path("/shared/runs")
    read = [config.model, config.segmenter.checkpoint, *config.data.train, *config.data.eval]
    assert all(path.is_relative_to("/shared") for path in read)


@pytest.mark.parametrize("name", CLUSTERS)
def test_all_nodes_mount_the_shared_storage(name):
    (claim,) = yaml.safe_load_all((KUBERAY / "storage.yaml").read_text())
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in (head(name), *workers(name)):
        assert pod.mounted("/shared")["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


@pytest.fixture(scope="module")
def parameters():
    """Of Lingshu-7B, whose shape is Qwen2.5-VL-7B's."""
    import torch

    from bench.architectures import qwen2_5_vl_7b
    from reasoner.footprint import empty_model
    from reasoner.footprint import parameters as counted

    return counted(empty_model(qwen2_5_vl_7b(), torch.bfloat16))


def shared_memory(pod):
    """Bytes of a pod's /dev/shm."""
    volume = pod.mounted("/dev/shm")["emptyDir"]
    assert volume["medium"] == "Memory"
    return amount(volume["sizeLimit"])


@pytest.mark.parametrize("name", CLUSTERS)
def test_every_node_has_the_shared_memory_that_the_model_needs(name, parameters):
    """Ray's object store takes a part of /dev/shm, and holds one version of the weights with the doctor's room."""
    needed = ROOM * demand(run_of("train"), parameters).shared / SHARED_SHARE
    for pod in (head(name), *workers(name)):
        assert needed <= shared_memory(pod) <= 1.25 * needed, pod.name
        assert shared_memory(pod) < pod.limits["memory"], "it counts as the container's memory"


@pytest.mark.parametrize(("name", "groups"), [("train", ["gpus"]), ("cluster", ["learner"])])
def test_the_doctor_is_content_with_the_nodes_of_a_learner(name, groups, parameters, monkeypatch):
    """With memory and object store, if all actors were on one node."""
    monkeypatch.setattr(doctor_demand, "parameters", lambda _: parameters)
    for pod in workers(name):
        if pod.name in groups:
            machine = Machine(memory=int(pod.limits["memory"]), shared=int(shared_memory(pod)), disk=1 << 50)
            results = check_demand(run_of("train"), machine)
            assert {each.status for each in results} == {"ok"}, results


def test_a_node_of_engines_or_experts_holds_a_version_of_the_weights(parameters):
    wanted = demand(run_of("train-on-cluster"), parameters)
    for pod in workers("cluster"):
        machine = Machine(memory=int(pod.limits["memory"]), shared=int(shared_memory(pod)), disk=0)
        assert doctor_demand.object_store(machine) >= ROOM * wanted.weights, pod.name
        assert pod.limits["memory"] >= shared_memory(pod) + BUCKET + 4 * doctor_demand.PROCESS, pod.name


def nodes(name, labels):
    """The nodes of a cluster that have these labels, as many as there may be."""
    return [
        Node(cpus=pod.limits["cpu"], gpus=pod.limits["nvidia.com/gpu"])
        for pod in workers(name)
        if labels.items() <= pod.group["labels"].items()
        for _ in range(pod.group["maxReplicas"])
    ]


def test_a_run_with_its_own_cluster_finds_room():
    config = run_of("train")
    wanted = [
        bundle
        for role, count in (("learner", config.learner.ranks), ("rollout", config.rollout.actors))
        for bundle in bundles(role, count, getattr(config, role))
    ] + bundles("segmenter", config.segmenter.actors, config.segmenter)
    assert shortage(wanted, nodes("train", {})) is None
    assert manifest("train")["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["minReplicas"] == len(nodes("train", {}))


@pytest.mark.parametrize("role", ["learner", "rollout", "segmenter"])
def test_each_role_finds_room_on_the_nodes_that_it_selects(role):
    config = run_of("train-on-cluster")
    kind = getattr(config, role)
    assert kind.node_labels == {"medreasoner-role": role}
    there = nodes("cluster", kind.node_labels)
    wanted = bundles(role, kind.ranks if role == "learner" else kind.actors, kind)
    if role == "learner":
        assert len(there) == kind.nodes == 2
        wanted = [slot.whole for slot in core(wanted, there, asked=kind.nodes)]
        assert {"NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"} <= kind.environment.keys()
    assert shortage(wanted, there) is None


def test_kinds_of_gpus_are_named_as_ray_and_nvidia_name_them():
    """A worker has Ray's label of the GPU that its node has. Of the rollouts' nodes a run may select one kind."""
    from ray.util import accelerators

    known = {value for name, value in vars(accelerators).items() if name.startswith("NVIDIA_")}
    for name in CLUSTERS:
        for pod in workers(name):
            kind = pod.group["labels"]["ray.io/accelerator-type"]
            assert kind in known and kind in pod.spec["nodeSelector"]["nvidia.com/gpu.product"].split("-")
    assert len(nodes("cluster", {"medreasoner-role": "rollout", "ray.io/accelerator-type": "H100"})) == 8


def ray_source(path):
    return (Path(ray.__file__).parent / path).read_text()


def test_ray_still_reads_how_long_a_stopped_job_has():
    """In the supervisor of a job, which is an actor of Ray: it has the environment of its node's `ray start`, and the
    driver runs on the head node."""
    source = ray_source("dashboard/modules/job/job_supervisor.py")
    assert re.search(rf'os\.environ\.get\(\s*"{WAIT}"', source)
    assert "class JobSupervisor:" in source and "DEFAULT_RAY_JOB_STOP_WAIT_TIME_S = 3" in source
    assert "get_head_node_id" in ray_source("dashboard/modules/job/job_manager.py")


@pytest.mark.parametrize("name", RUNS_JOBS)
def test_a_job_that_is_stopped_has_time_to_end(name):
    """Whoever ends the pod: its hook stops the jobs, and waits for less than the pod is given."""
    from deploy.stop_jobs import PATIENCE_S

    pod = head(name)
    wait, grace = int(pod.environment[WAIT]), pod.spec["terminationGracePeriodSeconds"]
    assert 60 <= wait < PATIENCE_S < grace
    python, script = pod.ray["lifecycle"]["preStop"]["exec"]["command"]
    assert python == "python" and (ROOT / Path(script).relative_to("/opt/medreasoner")).is_file()


def test_the_service_is_one_that_serve_and_the_application_take():
    from ray.serve.schema import ServeDeploySchema

    from serving.config import ServeConfig

    spec = manifest("serve")["spec"]
    (application,) = ServeDeploySchema.model_validate(yaml.safe_load(spec["serveConfigV2"])).applications
    assert (application.name, application.route_prefix) == ("medreasoner", "/")
    module, function = application.import_path.split(":")
    assert callable(getattr(importlib.import_module(module), function))
    args = ServeConfig.model_validate(application.args)
    assert isinstance(args.rollout, RolloutConfig) and isinstance(args.segmenter, SegmenterConfig)
    wanted = bundles("rollout", args.rollout.actors, args.rollout)
    wanted += bundles("segmenter", args.segmenter.actors, args.segmenter)
    assert shortage(wanted, nodes("serve", {})[: args.rollout.actors]) is None, "an engine and an expert on each GPU"


def test_the_operator_can_upgrade_the_service_step_by_step():
    """`ValidateClusterUpgradeOptions` of KubeRay 1.7, and room for the replicas of both clusters."""
    strategy = manifest("serve")["spec"]["upgradeStrategy"]
    options = strategy["clusterUpgradeOptions"]
    assert strategy["type"] == "NewClusterWithIncrementalUpgrade" and cluster_of("serve")["enableInTreeAutoscaling"]
    assert 0 < options["stepSizePercent"] <= options["maxSurgePercent"] <= 100
    assert options["intervalSeconds"] > 0 and options["gatewayClassName"]


def test_redis_is_where_the_head_looks_for_it():
    service, redis = yaml.safe_load_all((KUBERAY / "redis.yaml").read_text())
    pod = {"rayStartParams": {}, "template": redis["spec"]["template"]}
    assert crds.faults({"kind": "RayCluster", "spec": {"headGroupSpec": pod}}, SCHEMAS) == [], "a sound pod"
    (port,) = service["spec"]["ports"]
    (secret,) = [
        each["valueFrom"]["secretKeyRef"] for each in redis["spec"]["template"]["spec"]["containers"][0]["env"]
    ]
    for name in ("cluster", "serve"):
        options = cluster_of(name)["gcsFaultToleranceOptions"]
        assert options["redisAddress"] == f"{service['metadata']['name']}:{port['port']}"
        assert options["redisPassword"]["valueFrom"]["secretKeyRef"] == secret


def test_the_documentation_has_the_figures_of_the_7b_model(parameters):
    needed = demand(run_of("train"), parameters).shared
    text = (ROOT / "docs" / "cluster.md").read_text()
    assert f"{needed / GIB:.1f} GiB" in text and f"{ROOM * needed / SHARED_SHARE / GIB:.1f} GiB" in text
