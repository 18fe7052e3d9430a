"""How the application is put together, before anything of it runs."""

from typing import Any

import pytest

from serving.app import build_app, build_local_app
from serving.keys import new_key

CONFIG: dict[str, Any] = {
    "rollout": {"num_gpus": 0.8, "num_cpus": 2, "actors": 2, "autoscale": {"min": 1, "max": 4}},
    "segmenter": {"num_gpus": 0.2, "num_cpus": 1, "node_labels": {"zone": "a"}},
    "limits": {"request_seconds": 300},
}


def deployments(app):
    """By name; the ingress is bound to both others."""
    ingress = app._bound_deployment
    _, _, _, reasoner, segmenter = ingress.init_args
    return {each.name: each for each in (ingress, reasoner._bound_deployment, segmenter._bound_deployment)}


@pytest.fixture(scope="module")
def found():
    return deployments(build_app({**CONFIG, "auth": "off"}))


def test_each_has_queues_and_refuses_what_exceeds_them(found):
    assert set(found) == {"Ingress", "Reasoner", "Segmenter"}
    for each in found.values():
        assert each.max_queued_requests > 0 and each.backpressure_config.status_code == 429
        assert each.backpressure_config.retry_after_s
    assert found["Reasoner"].max_ongoing_requests < 100 <= found["Ingress"].max_ongoing_requests


def test_draining_lasts_longer_than_a_request_may(found):
    assert all(each._deployment_config.graceful_shutdown_timeout_s > 300 for each in found.values())


def test_resources_and_labels_are_those_of_the_roles(found):
    assert found["Reasoner"].ray_actor_options["num_gpus"] == 0.8
    options = found["Segmenter"].ray_actor_options
    assert options["num_gpus"] == 0.2 and options["label_selector"] == {"zone": "a"}


def test_replicas_are_scaled_by_the_requests_that_they_have(found):
    scaling = found["Reasoner"]._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.initial_replicas) == (1, 4, 2)
    assert scaling.target_ongoing_requests < found["Reasoner"].max_ongoing_requests
    assert found["Segmenter"]._deployment_config.autoscaling_config is None and found["Segmenter"].num_replicas == 1


def test_requests_about_an_image_go_to_one_replica(found):
    for name in ("Reasoner", "Segmenter"):
        router = found[name]._deployment_config.request_router_config.request_router_class
        assert str(router).endswith("ConsistentHashRouter")


def test_what_running_replicas_take_over_does_not_start_them_anew():
    first = deployments(build_app({**CONFIG, "auth": "off"}))
    more = {**CONFIG["rollout"], "actors": 3}
    second = deployments(build_app({**CONFIG, "auth": "off", "rollout": more}))
    other = deployments(build_app({**CONFIG, "auth": "off", "limits": {"request_seconds": 200}}))
    kept = deployments(build_app({"auth": "off", "name": "tiny-reasoner", **CONFIG}))
    assert first["Ingress"].version == kept["Ingress"].version, "a reload writes the name that the folder gave"
    for name in first:
        assert first[name].version == second[name].version != other[name].version


def test_other_keys_are_handed_to_running_replicas():
    keys = [{"name": name, "sha256": new_key()[1]} for name in ("a", "b")]
    first, second = (deployments(build_app({"keys": keys[:count]}))["Ingress"] for count in (1, 2))
    assert first.version == second.version and len(second.user_config["keys"]) == 2
    assert build_local_app({})._bound_deployment.user_config is None
