"""The learner's side of a direct transfer: vLLM's sender over ZeRO's weights, and the calls to the engines around it.

    every rank:   ZeroRank ──LearnerWeights──► vLLM's sender ═══ nccl, ipc ═══► engines
    first rank:                                     └──EngineClient──► pause, start, receive, finish, resume

All ranks gather the same tensors, also where the transfer has failed: the first rank's calls to engines never raise
within a send, and what it has not asked its weights for by the end is gathered all the same. So the ranks leave a send
together, with the first alone knowing that it failed.

Imports vLLM, so that only a learner that sends directly does.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import ray
import torch
from ray.exceptions import RayError
from vllm.distributed.weight_transfer.base import ParamMeta, TrainerInitInfo, WeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

from actors.engine_report import Receiver, Sent, UpdateReceipt
from actors.failures import TransferFailed
from actors.weight_files import Checksum, write_direct
from learner.zero import BUCKET_BYTES, ZeroRank


class LearnerWeights(WeightSource):
    """The learner's weights as vLLM's sender takes them: tensors one by one, on every rank."""

    def __init__(self, zero: ZeroRank, *, exact: bool) -> None:
        """exact: as in `actors.weight_files.Bucket`."""
        self._zero, self._exact = zero, exact
        self.begin(everything=True)

    def begin(self, *, everything: bool) -> None:
        """Begin a pass, which all ranks make. everything: as in `ZeroRank.named_weights`."""
        self._everything, self.checksum = everything, Checksum()
        self._buckets = self._zero.named_weights(lambda _: True, everything=everything)
        self._wait()  # for the update that made the weights, because vLLM packs them on other streams

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(*found) for found in self._zero.weight_shapes(everything=self._everything)]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What is left of the pass. The first rank's checksum is of what was asked for."""
        for bucket in self._buckets:
            self._wait()
            for name, tensor in bucket.items():
                if self._zero.ranks.rank == 0:
                    self.checksum.add({name: tensor}, exact=self._exact)
                # Gathered tensors end with their bucket, and vLLM packs some of one with some of the next.
                yield name, tensor.clone() if self._zero.config.zero_stage == 3 else tensor

    def drain(self) -> None:
        """End the pass: the other ranks gather what is left of it."""
        for _ in self._buckets:
            pass

    def _wait(self) -> None:
        if self._zero.ranks.device.type != "cpu":
            torch.accelerator.synchronize()


class EngineClient:
    """vLLM's `VLLMWeightSyncClient` for the rollouts' engines; used on the first rank. The calls of an update go to all
    engines at once and never raise: the first failure is kept, and no later call is made."""

    def __init__(self, receivers: Sequence[Receiver], direct: str, *, exact: bool, seconds: float) -> None:
        """seconds: within which all engines must be connected."""
        self._receivers, self._direct, self._exact, self._seconds = receivers, direct, exact, seconds
        self.begin(0, lambda: None)

    def begin(self, version: int, failed: Callable[[], None]) -> None:
        """Begin the update to a version. failed: is called at the first failure."""
        self.receipts: dict[str, UpdateReceipt] = {}
        self.failure: str | None = None
        self._version, self._failed = version, failed

    def fail(self, cause: str) -> None:
        """The update has failed; whoever waits for an engine does so no more."""
        if self.failure is None:
            self.failure = cause
            self._failed()

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Connect all engines, each with a number of its own. Raises TransferFailed if one does not."""
        own: dict[str, dict[str, Any]] = {}
        rank = init_info.get("rank_offset", 0)  # vLLM's sender gives each the same
        for receiver in self._receivers:
            own[receiver.name] = {**init_info, "rank_offset": rank} if "rank_offset" in init_info else init_info
            rank += receiver.workers
        due = time.monotonic() + self._seconds
        self._each(lambda each: each.handle.connect.remote(self._direct, own[each.name]), "connecting", due)
        if self.failure:
            raise TransferFailed(self.failure)

    def start_weight_update(self) -> None:
        self._each(lambda each: each.handle.begin_update.remote("keep"), "pausing")

    def update_weights(self, update_info: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        assert isinstance(update_info, Mapping), "what is told each worker apart is not passed on"
        info = {"direct": write_direct(update_info), "exact": self._exact}
        self._each(lambda each: each.handle.receive.remote(info), "receiving weights")

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.receipts = self._each(lambda each: each.handle.end_update.remote(self._version), "ending the update")

    def _each(self, call: Callable[[Receiver], Any], doing: str, due: float = float("inf")) -> dict[str, Any]:
        """What a call to each engine returns, by name; empty after a failure. due: by the monotonic clock."""
        if self.failure:
            return {}
        calls = {call(receiver): receiver.name for receiver in self._receivers}
        found: dict[str, Any] = {}
        while self.failure is None and len(found) < len(calls):
            left = [ref for ref, name in calls.items() if name not in found]
            for ref in ray.wait(left, num_returns=1, timeout=1.0)[0]:
                try:
                    found[calls[ref]] = ray.get(ref, timeout=60)
                except RayError as error:
                    lines = str(error).strip().splitlines() or [type(error).__name__]
                    self.fail(f"{calls[ref]} failed while {doing}: {lines[-1]}")
            if time.monotonic() > due:
                self.fail(f"{', '.join(calls[ref] for ref in left)} did not finish {doing} within {self._seconds:g} s")
        return {} if self.failure else found


class WeightSender:
    """Sends the weights of all ranks to a fixed group of engines; made on every rank. All methods are collectives."""

    def __init__(
        self,
        zero: ZeroRank,
        receivers: Sequence[Receiver],
        direct: str,
        *,
        host: str,
        port: int,
        exact: bool,
        seconds: float,
    ) -> None:
        """Form the group. direct: name of vLLM's sender. host, port: of the first rank, where the group may meet.
        Raises TransferFailed if the engines do not join within so many seconds, or within vLLM's own deadline."""
        self._source = LearnerWeights(zero, exact=exact)
        self._client = EngineClient(receivers, direct, exact=exact, seconds=seconds)
        self._first = zero.ranks.rank == 0
        sizes = [dtype.itemsize * torch.Size(shape).numel() for _, dtype, shape in zero.weight_shapes()]
        offered = {
            "rank": zero.ranks.rank,
            "master_address": host,
            "master_port": port,
            "world_size": 1 + sum(each.workers for each in receivers),
            "packed": True,
            # A tensor that is larger than it is refused by `ipc`, which takes all of it from the GPU's memory.
            "packed_buffer_size_bytes": max(*sizes, min(BUCKET_BYTES, sum(sizes))),
        }
        try:
            self._engine = WeightTransferTrainerFactory.trainer_init(
                init_info(direct, offered), client=self._client, source=self._source
            )
        except (RuntimeError, OSError) as error:
            raise TransferFailed(f"the engines and the learner did not form a group: {error}") from error

    def send(self, version: int, *, everything: bool, seconds: float) -> Sent:
        """Send the weights. everything: as in `ZeroRank.named_weights`. Raises TransferFailed on the first rank if an
        engine fails, or if it takes longer than so many seconds, whereupon the group is ended; the other ranks return
        without receipts."""
        due = threading.Event()
        self._source.begin(everything=everything)
        self._client.begin(version, due.set)
        cause: BaseException | None = None
        try:
            with self._guarded(due, seconds):
                self._engine.send_weights()
        except (RuntimeError, AssertionError) as error:
            # Of a member that has gone, or of a group that was ended while or, which vLLM asserts, before it sent.
            if isinstance(error, AssertionError) and self._client.failure is None:
                raise
            cause = error
            self._client.fail(f"{type(error).__name__}: {error}")
        finally:
            self._source.drain()
        if self._client.failure:
            raise TransferFailed(f"weights of version {version} did not arrive: {self._client.failure}") from cause
        return Sent(checksum=self._source.checksum.hexdigest(), receipts=self._client.receipts)

    def close(self) -> None:
        """End the group."""
        self._engine.shutdown()

    @contextmanager
    def _guarded(self, due: threading.Event, seconds: float) -> Iterator[None]:
        """Ends the group from another thread once `due` is set, or after so many seconds: a sender whose peer has died
        waits for ever, in a call that only the end of the group frees."""
        over = threading.Event()

        def guard() -> None:
            due.wait(seconds)
            if not over.is_set():
                self._client.fail(f"it took longer than {seconds:g} s")
                self._engine.shutdown()

        thread = threading.Thread(target=guard, name="weights' watchdog", daemon=True)
        if self._first:
            thread.start()
        try:
            yield
        finally:
            over.set()
            due.set()
            if self._first:
                thread.join(30)


def init_info(direct: str, offered: Mapping[str, Any]) -> TrainerInitInfo:
    """The init info of one of vLLM's senders, with those of the offered fields that it has."""
    kind: type[TrainerInitInfo] = WeightTransferTrainerFactory._registry[direct]().init_info_cls
    known = {each.name for each in fields(kind)}
    return kind(**{name: value for name, value in offered.items() if name in known})
