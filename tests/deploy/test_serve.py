"""The service's YAML files: one for `serve deploy`, one for KubeRay, and the same application in both."""

import re

import yaml
from ray.serve.schema import LoggingConfig, ServeDeploySchema

from serving.config import Key, ServeConfig
from serving.privacy import CONTROLLER_OPTIONS, LOGGING
from tests.conftest import ROOT
from tests.deploy.manifests import manifest

DEPLOYED = yaml.safe_load((ROOT / "deploy" / "serve.yaml").read_text())
NAMES = {"Ingress", "Reasoner", "Segmenter"}
"""Of the application's deployments."""


def schema():
    return ServeDeploySchema.model_validate(DEPLOYED)


def application():
    (found,) = schema().applications
    return found


def test_serve_deploy_and_the_rayservice_give_the_same_application():
    of_rayservice = ServeDeploySchema.model_validate(yaml.safe_load(manifest("serve")["spec"]["serveConfigV2"]))
    assert of_rayservice == schema()
    assert of_rayservice.model_dump(exclude_unset=True) == schema().model_dump(exclude_unset=True)


def test_serve_and_the_application_log_nothing_of_a_request():
    ours = LoggingConfig.model_validate(LOGGING)
    assert schema().logging_config == application().logging_config == ours
    assert schema().controller_options.model_dump() == CONTROLLER_OPTIONS


def test_nobody_has_the_key_of_the_file_and_no_one_is_let_in_without():
    args = ServeConfig.model_validate(application().args)
    assert args.auth is None and [key.sha256 for key in args.keys] == ["0" * 64]
    assert not re.search(r"bearer|secret", (ROOT / "deploy" / "serve.yaml").read_text(), re.IGNORECASE)


def test_an_engine_and_an_expert_fill_a_gpu():
    args = ServeConfig.model_validate(application().args)
    assert (args.rollout.num_gpus, args.segmenter.num_gpus) == (0.8, 0.2)
    assert args.rollout.actors == args.segmenter.actors, "one of each on every GPU"
    assert args.rollout.gpu_memory < args.rollout.num_gpus, "the rest of its share is for what vLLM does not count"
    (workers,) = manifest("serve")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    for container in workers["template"]["spec"]["containers"]:
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_the_reasoner_begins_with_the_model_of_the_application_and_tells_its_step():
    deployments = {each.name: each for each in application().deployments}
    assert deployments.keys() <= NAMES
    model, config = application().args["model"], ROOT / "configs" / "lingshu_7b_soft.yaml"
    assert model == f"/shared/runs/{config.stem}"
    steps = yaml.safe_load(config.read_text())["steps"]
    assert deployments["Reasoner"].user_config == {"model": model, "policy_version": steps}


def test_the_block_for_other_keys_is_one_of_serve_once_it_is_no_comment():
    text = (ROOT / "deploy" / "serve.yaml").read_text()
    used = re.sub(r"^  # (- name: Ingress|  user_config: \{keys)", r"  \1", text, flags=re.MULTILINE)
    (app,) = ServeDeploySchema.model_validate(yaml.safe_load(used)).applications
    (ingress,) = (each for each in app.deployments if each.name == "Ingress")
    (key,) = ingress.user_config["keys"]
    assert key.keys() == {"name", "sha256"} <= Key.model_fields.keys()
