"""Settings every test, and every process a test starts, runs under."""

import os
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Nothing may reach out of the machine: a test that needs the network would pass here and fail there.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
# Tokenizers warn at each fork when their thread pool is on.
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Tests run side by side: threads that wait for each other on a core that is taken cost more than they bring.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# An example's time is this machine's, and its choice would make a run another than the last. `make fuzz` chooses anew.
settings.register_profile("steady", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("fuzz", settings.get_profile("steady"), derandomize=False)
settings.load_profile(os.environ.get("MEDREASONER_HYPOTHESIS", "steady"))

ROOT = Path(__file__).parents[1]
TINY_REASONER = ROOT / "models" / "tiny-reasoner"
TIMED = ("seconds/", "actors/", "busy/", "segmenter/")
"""Groups of metrics that depend on how fast the machine is; all others are the same wherever a run is made."""


@pytest.hookimpl(tryfirst=True)  # before marks are selected by
def pytest_collection_modifyitems(items):
    """What uses the one cluster runs in one process, beside the process of everything else (see the Makefile)."""
    for item in items:
        if "ray_cluster" in item.fixturenames:
            item.add_marker(pytest.mark.cluster)


ENDED = {"workers": pytest.StashKey[ExitStack](), "hosts": pytest.StashKey[ExitStack]()}
"""Fixtures that hold processes of gigabytes, and what ends these."""
LAST: dict[str, str] = {}
"""The last test that needs each of these fixtures."""


def pytest_collection_finish(session):
    LAST.update((name, item.nodeid) for item in session.items for name in ENDED if name in item.fixturenames)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item):
    """Ends what no later test needs, after all fixtures that are built on it: pytest itself would hold it to the end of
    the session, beside the engines that later tests start."""
    outcome = yield
    for name, key in ENDED.items():
        if LAST.get(name) == item.nodeid and key in item.config.stash:
            item.config.stash[key].close()
    return outcome


@pytest.fixture(scope="session")
def demo_config():
    """The demo's configuration, with overrides as the command line takes them. Images are embedded ahead, as on
    GPUs."""
    from cluster.config import TrainConfig, load_config

    always = [f"model={TINY_REASONER}", "segmenter.embeddings.ahead=true"]

    def load(*overrides: str) -> TrainConfig:
        return load_config(TrainConfig, ROOT / "configs" / "demo.yaml", [*always, *overrides])

    return load


@pytest.fixture(scope="session")
def ray_cluster():
    """One local cluster for all tests; its dashboard's address. Its GPU is logical: Ray counts it, and nothing computes
    on it."""
    import ray

    from tests.runs import cluster_folder

    with cluster_folder() as folder:
        context = ray.init(
            num_cpus=4,
            num_gpus=1,
            include_dashboard=True,
            dashboard_port=0,
            logging_level="ERROR",
            log_to_driver=False,
            _temp_dir=str(folder),
        )
        (folder / "ray_current_cluster").write_text(context.address_info["gcs_address"])
        yield context.dashboard_url
        ray.shutdown()


@pytest.fixture(scope="session")
def workers(ray_cluster, demo_config, pytestconfig):
    """One rollout, one segmenter and one learner rank on the tiny models, for all tests that need them; they end after
    the last of these."""
    from cluster.train import actors
    from cluster.workers import started

    config = demo_config("rollout.environment={OF_A_USER: 7}", "learner.sha256=true")
    with ExitStack() as ended:
        pytestconfig.stash[ENDED["workers"]] = ended
        yield ended.enter_context(started(actors(config), config))


@pytest.fixture(scope="session")
def hosts(ray_cluster, pytestconfig):
    """The hosts of so many ranks, made when they are first asked for; they end after the last test that needs any."""
    import ray

    from tests.ranks import Host

    environment = {"env_vars": {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}}
    made: dict[int, list] = {}

    with ExitStack() as ended:
        pytestconfig.stash[ENDED["hosts"]] = ended

        def of(ranks):
            if ranks not in made:
                made[ranks] = [
                    ray.remote(Host).options(num_cpus=0, runtime_env=environment).remote() for _ in range(ranks)
                ]
                for host in made[ranks]:
                    ended.callback(ray.kill, host)
            return made[ranks]

        yield of
