"""What `actors.weight_sender` and `actors.weight_transfer` take for granted of vLLM's `nccl` and `ipc`, which only GPUs
run, as it was read in its source. A release that changes any of it fails here."""

import inspect
from dataclasses import MISSING, fields
from types import SimpleNamespace

import pytest
from vllm import envs
from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
from vllm.distributed.weight_transfer import ipc_engine, nccl_common, nccl_engine, packed_tensor
from vllm.distributed.weight_transfer.base import VLLMWeightSyncClient, WeightTransferEngine
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory
from vllm.v1.engine.async_llm import AsyncLLM

from actors.weight_sender import EngineClient, init_info
from actors.weight_transfer import BACKEND, AnyWeightTransferEngine

OFFERED = {
    "rank": 0,
    "master_address": "10.0.0.1",
    "master_port": 7000,
    "world_size": 3,
    "packed": True,
    "packed_buffer_size_bytes": 1 << 20,
}


def in_order(function, *parts):
    """Whether parts of the source of a function follow one another."""
    text, places = inspect.getsource(function), list[int]()
    for part in parts:
        places.append(text.find(part, places[-1] if places else 0))
    return -1 not in places


def test_both_ways_have_a_sender_and_a_receiver_and_ours_is_beside_them():
    assert {"nccl", "ipc", BACKEND} <= WeightTransferEngineFactory._registry.keys()
    assert {"nccl", "ipc"} <= WeightTransferTrainerFactory._registry.keys()
    assert WeightTransferEngineFactory._registry[BACKEND]() is AnyWeightTransferEngine


def test_the_fields_of_what_senders_and_receivers_are_told():
    nccl, ipc = init_info("nccl", OFFERED), init_info("ipc", OFFERED)
    assert vars(nccl) == {**OFFERED, "packed_num_buffers": 2}
    assert vars(ipc) == {name: OFFERED[name] for name in ("rank", "packed", "packed_buffer_size_bytes")}
    told = {each.name for each in fields(nccl_common.NCCLWeightTransferInitInfo)}
    assert {"rank_offset", "world_size", "master_address", "master_port", "packed_buffer_size_bytes"} <= told
    assert [each.name for each in fields(ipc_engine.IPCWeightTransferInitInfo)] == ["packed"]
    update = fields(nccl_engine.NCCLWeightTransferUpdateInfo)
    assert [each.name for each in update if each.default is MISSING] == ["names", "dtype_names", "shapes"]
    update = fields(ipc_engine.IPCWeightTransferUpdateInfo)
    assert [each.name for each in update][3:] == ["ipc_handles", "ipc_handles_pickled", "tensor_sizes"]


def test_a_receiver_is_made_around_a_model_of_which_it_calls_load_weights_alone():
    names = ["self", "config", "vllm_config", "device", "model"]
    for kind in (nccl_engine.NCCLWeightTransferEngine, ipc_engine.IPCWeightTransferEngine):
        assert list(inspect.signature(kind.__init__).parameters) == names
        source = inspect.getsource(kind.receive_weights) + inspect.getsource(kind.init_transfer_engine)
        assert source.count("self.model.") == source.count("self.model.load_weights") > 0
        # Which is why neither is called: they reload, and rebuild, all of the model.
        assert "initialize_layerwise_reload(self.model)" in inspect.getsource(kind.start_weight_update)
        assert "finalize_layerwise_reload(self.model" in inspect.getsource(kind.finish_weight_update)
    # Each new export replaces the mapping of the one before, so that no memory of the sender is kept for want of a
    # finish but the last, which `shutdown` lets go.
    assert "self._entry = (key, packed)" in inspect.getsource(packed_tensor.PackedBufferImporter.rebuild)


def test_what_the_base_class_does_after_an_update_fails_on_a_cpu():
    assert in_order(WeightTransferEngine.update_weights, "self.receive_weights(", "torch.accelerator.synchronize()")


def test_the_order_of_a_sender_s_calls():
    sender = nccl_engine.NCCLTrainerWeightTransferEngine
    assert in_order(
        sender.trainer_init, "exe.submit(", "init_weight_transfer_engine", "open_trainer_endpoint(", "result"
    )
    assert in_order(
        sender.send_weights,
        "source.metadata()",
        "if not self.is_sender:",
        "client.start_weight_update()",
        "exe.submit(self.client.update_weights",
        "self._broadcast(",
        "future.result()",
        "exe.shutdown(wait=False)",
        "client.finish_weight_update()",
    )
    ipc = ipc_engine.IPCTrainerWeightTransferEngine
    assert in_order(
        ipc.send_weights, "client.start_weight_update()", "self._send(", "client.finish_weight_update()", "_post_send"
    )
    # All ranks exchange their handles after each chunk, so none may leave before the others.
    assert in_order(ipc._send_packed, "_all_gather_and_merge_handles", "_do_send", "_post_send_sync")


def test_our_client_has_the_calls_of_vllm_s():
    calls = [name for name, each in vars(VLLMWeightSyncClient).items() if inspect.isfunction(each) and name[0] != "_"]
    assert len(calls) == 4
    for name in calls:
        theirs, ours = (inspect.signature(getattr(each, name)) for each in (VLLMWeightSyncClient, EngineClient))
        assert list(theirs.parameters) == list(ours.parameters)


@pytest.mark.parametrize(("rank", "expected"), [(0, 3), (1, 4)])
def test_a_worker_s_number_is_the_engine_s_offset_and_its_own(monkeypatch, rank, expected):
    """vLLM's own sender tells each engine the offset 1, which would give several engines the same numbers."""
    joined = []
    monkeypatch.setattr(nccl_common, "stateless_init_process_group", lambda *args, device: joined.append(args))
    monkeypatch.setattr(nccl_common.torch.accelerator, "current_device_index", lambda: 0)
    told = nccl_common.NCCLWeightTransferInitInfo(
        master_address="10.0.0.1", master_port=7000, rank_offset=3, world_size=5
    )
    nccl_common.worker_init_process_group(told, SimpleNamespace(data_parallel_index=0, world_size=2, rank=rank))
    assert joined == [("10.0.0.1", 7000, expected, 5)]
    assert "rank_offset=1," in inspect.getsource(nccl_engine.NCCLTrainerWeightTransferEngine.trainer_init)


def test_a_group_is_ended_from_another_thread():
    """By NCCL's abort, which is given five seconds; a broadcast in a group that has ended returns at once, so that what
    is left of the weights is gathered."""
    assert in_order(PyNcclCommunicator.destroy, "ncclCommAbort", "daemon=True", "join(timeout=5.0)", "disabled = True")
    assert in_order(PyNcclCommunicator.broadcast, "if self.disabled:", "return", "ncclBroadcast")
    assert in_order(
        nccl_engine.NCCLTrainerWeightTransferEngine.shutdown,
        "model_update_group.destroy()",
        "model_update_group = None",
    )


def test_ipc_lets_go_of_the_sender_s_buffer_in_its_own_finish_which_ours_does_in_its_place():
    finish = ipc_engine.IPCWeightTransferEngine.finish_weight_update
    assert in_order(finish, "finalize_layerwise_reload(", "self._packed_importer.close()")
    assert callable(packed_tensor.PackedBufferImporter().close)


def test_ipc_refuses_a_tensor_that_is_larger_than_its_buffer():
    assert in_order(
        packed_tensor.packed_ipc_producer, "torch.empty(buffer_size_bytes", "> buffer_size_bytes", "raise ValueError"
    )


def test_handles_are_tuples_which_vllm_unpickles_only_if_all_may_be():
    assert not envs.VLLM_ALLOW_INSECURE_SERIALIZATION
    info = {"names": [], "dtype_names": [], "shapes": [], "ipc_handles_pickled": "gAR9lC4="}
    with pytest.raises(ValueError, match="Refusing to deserialize"):
        ipc_engine.IPCWeightTransferUpdateInfo(**info)


def test_a_request_is_sent_by_a_call_that_is_told_its_id():
    """`actors.engine.Announcing` says so after it."""
    assert in_order(AsyncLLM.generate, "q = await self.add_request(\n                request_id,")
    assert list(inspect.signature(AsyncLLM.add_request).parameters)[:4] == ["self", "request_id", "prompt", "params"]
    assert in_order(AsyncLLM.pause_generation, "clear_mm_cache_async", "pause_scheduler_async")
