"""Weights from the learner's process to engines without host memory between them: real ranks and real engines of ours,
with a stand-in for what only GPUs have. Whatever fails is named, and the ranks go on."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch

from actors.engine_report import Receiver
from actors.failures import TransferFailed
from actors.learner_rank import LearnerRank
from actors.weight_files import unpack
from cluster.direct_transfer import DirectTransfer
from tests.ranks import Host, running

NAME = "stand-in"


@pytest.fixture(scope="module")
def stand_in():
    """The module, which imports vLLM."""
    import tests.stand_in_transfer as found

    return found


@pytest.fixture(scope="module")
def pool(hosts, stand_in):
    """Two ranks of ZeRO-3, with small buckets."""
    made = running(hosts, ranks=2, zero_stage=3, kind=stand_in.StandInRank)
    everywhere(made, "pieces")
    return made


def everywhere(pool, method, *args):
    return ray.get([getattr(rank, method).remote(*args) for rank in pool._actors.values()], timeout=120)


@pytest.fixture
def engines(ray_cluster, stand_in):
    """Makes rollouts, which end with the test."""
    made = []

    def start(**options):
        environment = {"env_vars": {"OMP_NUM_THREADS": "1"}}
        made.append(ray.remote(stand_in.StandInRollout).options(num_cpus=0, runtime_env=environment).remote(**options))
        ray.get(made[-1].__ray_ready__.remote(), timeout=300)  # it is there, and has imported vLLM
        return made[-1]

    yield start
    for actor in made:
        ray.kill(actor)


def learner_s(pool):
    """Checksum and tensors, by the way through host memory."""
    weights = pool.weights(0, everything=True)
    return weights.checksum, {name: tensor for ref in weights.buckets for name, tensor in unpack(ray.get(ref)).items()}


def same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.slow
def test_engines_get_the_learner_s_exact_tensors_phase_by_phase(pool, engines):
    """From two ranks that each hold half of every tensor, to four workers of three engines."""
    sizes = {"rollout 0": 1, "rollout 1": 2, "rollout 2": 1}
    handles = {name: engines(workers=workers) for name, workers in sizes.items()}
    pool.connect(NAME, [Receiver(name=name, handle=handles[name], workers=sizes[name]) for name in sizes])
    checksum, expected = learner_s(pool)
    for version in (1, 2):
        sent = pool.send(version, everything=True)
        assert sent.checksum == checksum and sent.receipts.keys() == sizes.keys()
        assert {receipt.checksum for receipt in sent.receipts.values()} == {checksum}
    phases = ["pause: keep", "start", "update", "finish", "resume"]
    numbers = iter(range(1, 5))
    for name, handle in handles.items():
        record, own, version = ray.get(handle.record.remote())
        assert record == ["init", *phases, *phases] and version == "2"
        assert own == [next(numbers) for _ in range(sizes[name])]
        assert all(same(kept, expected) for kept in ray.get(handle.kept.remote()))


def members(handles):
    """As the driver's pool has them."""
    found: Any = [SimpleNamespace(name=name, handle=handle) for name, handle in handles.items()]
    return found


@pytest.fixture
def transfer(pool, demo_config):
    return DirectTransfer(pool, demo_config().model_copy(update={"transfer": NAME}))


@pytest.mark.slow
def test_a_sender_that_is_blocked_is_freed_at_its_deadline_and_the_next_group_works(pool, engines, transfer):
    """The other rank, which waits for the first one's gathers, returns too."""
    handles = {"rollout 0": engines(), "rollout 1": engines(fails="blocks")}
    everywhere(pool, "hurry", True)
    with pytest.raises(TransferFailed, match="weights of version 1 did not arrive: it took longer than 2 s"):
        transfer.send(1, members(handles), everything=True)
    everywhere(pool, "hurry", False)
    assert transfer.members == ()
    useless = transfer.abandon(members(handles))
    assert useless.keys() == handles.keys() and "weights of two versions" in useless["rollout 0"]
    after = {"rollout 2": engines(), "rollout 3": engines()}
    sent = transfer.send(1, members(after), everything=True)
    assert transfer.members == ("rollout 2", "rollout 3")
    assert {receipt.checksum for receipt in sent.receipts.values()} == {learner_s(pool)[0]}


@pytest.mark.slow
def test_an_engine_that_dies_while_it_receives_is_named_at_once(pool, engines, transfer):
    handles = {"rollout 0": engines(), "rollout 1": engines(fails="dies")}
    with pytest.raises(TransferFailed, match="did not arrive: rollout 1 failed while receiving weights"):
        transfer.send(1, members(handles), everything=True)
    assert "died while giving an update of weights up" in transfer.abandon(members(handles))["rollout 1"]


@pytest.mark.slow
def test_an_engine_that_cannot_be_connected_is_named(pool, engines, transfer):
    """It has gone before the group forms; the engine that waits in it is whole, and joins the next one."""
    handles = {"rollout 0": engines(), "rollout 1": engines()}
    ray.kill(handles["rollout 1"])
    with pytest.raises(TransferFailed, match="did not form a group"):
        transfer.send(1, members(handles), everything=True)
    assert list(transfer.abandon(members(handles))) == ["rollout 1"]
    del handles["rollout 1"]
    assert transfer.send(1, members(handles), everything=True).receipts.keys() == {"rollout 0"}


@pytest.mark.slow
def test_a_group_stays_while_its_members_do(engines, transfer):
    handles = {"rollout 0": engines(), "rollout 1": engines()}
    for version, names in [(1, ("rollout 0",)), (2, ("rollout 0",)), (3, ("rollout 0", "rollout 1"))]:
        transfer.send(version, members({name: handles[name] for name in names}), everything=False)
        assert transfer.members == names
    record, _, version = ray.get(handles["rollout 0"].record.remote())
    assert record.count("init") == 2 and record.count("update") == 3 and version == "3"


class Looking(LearnerRank):
    """Says whether its process has imported vLLM."""

    def imported(self):
        return "vllm" in sys.modules


def test_a_learner_that_sends_through_host_memory_imports_no_vllm(ray_cluster):
    environment = {"env_vars": {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}}
    host = ray.remote(Host).options(num_cpus=0, runtime_env=environment).remote()
    try:
        pool = running(lambda ranks: [host], kind=Looking)
        assert learner_s(pool)[1] and everywhere(pool, "imported") == [False]
    finally:
        ray.kill(host)
