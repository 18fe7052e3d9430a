"""A rank's part of a checkpoint: all that its next step depends on, and its share of the model's files.

    optimizer/rank-RRRRR-NNNNN.safetensors   pieces of the optimizer's state (`learner.optimizer_state`)
    rng/rank-RRRRR.safetensors               torch's random state
    learner.json                             updates made; on how many ranks and at which stage it was written
    model/                                   an ordinary Hugging Face folder, its shards dealt out to the ranks
    adapter/                                 the adapter alone, as peft reads it, where one learns

All is copied into host memory at once, and written by a thread while training goes on.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import distributed

from learner.lora import adapter_config
from learner.optimizer_state import SavedPieces, buckets, own_pieces, pieces, publish
from learner.zero import BUCKET_BYTES, ZeroRank
from umrg.durable import Disk, FileRecord, parents, write_durably

Records = Mapping[str, FileRecord]


@dataclass(frozen=True, kw_only=True)
class FilePart:
    """A file to write. name: its path in the folder. data: makes its bytes; called by the thread, once."""

    name: str
    data: Callable[[], bytes]


class BackgroundWriter:
    """Writes one set of files at a time."""

    def __init__(self, disk: Disk | None = None) -> None:
        self._disk = disk or Disk()
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[Records] | None = None

    def begin(self, folder: Path, parts: Sequence[FilePart]) -> None:
        """Start to write; what was begun before must have been collected by `written`."""
        assert self._writing is None, "the files begun before are still being written"
        self._writing = self._pool.submit(self._write, folder, list(parts))

    def written(self, seconds: float = 0.0) -> Records | None:
        """Once, what `begin` wrote; None where it is not written within so many seconds. Raises whatever stopped it."""
        assert self._writing is not None, "nothing is being written"
        if not wait([self._writing], timeout=seconds).done:
            return None
        writing, self._writing = self._writing, None
        return writing.result()

    def _write(self, folder: Path, parts: list[FilePart]) -> Records:
        records = {}
        for parent in parents([part.name for part in parts]):
            self._disk.make_folder(folder / parent)
        while parts:
            # Given up one by one, for each holds memory.
            part = parts.pop(0)
            records[part.name] = write_durably(self._disk, folder / part.name, part.data())
        for parent in parents(records):
            self._disk.sync(folder / parent)
        return records


OPTIMIZER, STATE = "optimizer", "learner.json"


class RankCheckpoints:
    """Of one rank. `begin` and `load` are called on all ranks."""

    def __init__(self, zero: ZeroRank) -> None:
        self._zero, self._writer = zero, BackgroundWriter()

    def begin(self, folder: Path) -> None:
        """Copy state and model, and begin to write them."""
        self._writer.begin(folder, [*_state_parts(self._zero), *_model_parts(self._zero), *_adapter_parts(self._zero)])

    def written(self, seconds: float = 0.0) -> Records | None:
        """Once, what `begin` wrote; None where it is not written within so many seconds. Raises what stopped it."""
        return self._writer.written(seconds)

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint, on any number of ranks and at any ZeRO stage. Raises ValueError where it is of
        another model or of other frozen parts."""
        zero, trained = self._zero, self._zero.trained()
        with SavedPieces(folder / OPTIMIZER) as saved:
            saved.check({name: int(getattr(each, "ds_numel", each.numel())) for name, each in trained})
            for piece in pieces(zero.engine.optimizer, trained):
                saved.restore(piece)
        publish(zero.engine.optimizer)
        state = json.loads((folder / STATE).read_text())
        zero.updates_made, zero.checked = state["updates"], state["checked"]
        if (path := folder / _rng_file()).exists():
            _set_rng_state(load_file(path))


def _state_parts(zero: ZeroRank) -> list[FilePart]:
    rank = distributed.get_rank()
    own = own_pieces(zero.engine.optimizer, zero.trained())
    parts = [
        FilePart(name=f"{OPTIMIZER}/rank-{rank:05d}-{i:05d}.safetensors", data=_bytes(bucket))
        for i, bucket in enumerate(buckets(own, BUCKET_BYTES))
    ]
    parts.append(FilePart(name=_rng_file(), data=_bytes(_rng_state())))
    if rank == 0:
        written_by = {"ranks": distributed.get_world_size(), "zero_stage": zero.config.zero_stage}
        text = json.dumps({"updates": zero.updates_made, "checked": zero.checked, **written_by}, indent=1)
        parts.append(FilePart(name=STATE, data=text.encode))
    return parts


def _model_parts(zero: ZeroRank) -> list[FilePart]:
    """The shards that are this rank's; the first rank adds the other files of the folder."""
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    kept, names, size = {}, [], 0
    for i, bucket in enumerate(zero.named_weights(to_all=True)):
        names.append(list(bucket))
        size += sum(tensor.nbytes for tensor in bucket.values())
        if i % ranks == rank:
            kept[i] = zero.reasoner.as_saved(bucket)
    files = _shard_names(len(names))
    parts = [FilePart(name=f"model/{files[i]}", data=_bytes(shard, {"format": "pt"})) for i, shard in kept.items()]
    if rank == 0:
        others = zero.reasoner.other_files()
        if len(files) > 1:
            others["model.safetensors.index.json"] = zero.reasoner.shard_index(
                dict(zip(files, names, strict=True)), size
            )
        parts += [FilePart(name=f"model/{name}", data=partial(bytes, data)) for name, data in others.items()]
    return parts


def _adapter_parts(zero: ZeroRank) -> list[FilePart]:
    """Of the first rank, where there is an adapter."""
    if zero.config.lora is None:
        return []
    adapter = zero.adapter()
    if distributed.get_rank() != 0:
        return []
    settings = adapter_config(zero.config.lora, str(zero.task.model))
    return [
        FilePart(name="adapter/adapter_model.safetensors", data=_bytes(adapter, {"format": "pt"})),
        FilePart(name="adapter/adapter_config.json", data=partial(bytes, settings)),
    ]


def _shard_names(count: int) -> list[str]:
    """What so many files of weights are called in a Hugging Face folder."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def _rng_state() -> dict[str, torch.Tensor]:
    """Of torch's generators, by device; the learner draws from no others."""
    state = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _rng_file() -> str:
    return f"rng/rank-{distributed.get_rank():05d}.safetensors"


def _bytes(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Callable[[], bytes]:
    return partial(save, tensors, metadata)
