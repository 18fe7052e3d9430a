"""A rank's part of a checkpoint: the state that its next step depends on, and its share of the model's files.

    optimizer/rank-RRRRR-NNNNN.safetensors   pieces of the optimizer's state (`learner.optimizer_state`)
    rng/rank-RRRRR.safetensors               state of torch's random number generators
    learner.json                             updates made; number of ranks and ZeRO stage that wrote it
    model/                                   an ordinary Hugging Face folder, its shards distributed over the ranks
    adapter/                                 the adapter alone in peft's format, if one is trained

`save` copies everything to host memory; a thread writes it while training continues. `saved` says when it is written.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from learner.lora import adapter_config
from learner.optimizer_state import SavedPieces, buckets, own_pieces, pieces, publish
from learner.zero import BUCKET_BYTES, ZeroRank, on_cpu
from umrg.durable import Disk, FileRecord, parents, write_durably

Records = Mapping[str, FileRecord]
"""Of written files, by their paths in the checkpoint's folder."""


@dataclass(frozen=True, kw_only=True)
class FilePart:
    """A file to write."""

    name: str
    """Path in the folder."""
    data: Callable[[], bytes]
    """Makes its bytes; called once, by the writing thread."""


class BackgroundWriter:
    """Writes one set of files at a time."""

    def __init__(self, disk: Disk | None = None) -> None:
        self._disk = disk or Disk()
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[Records] | None = None

    def save(self, folder: Path, parts: Sequence[FilePart]) -> None:
        """Begin to write. What the call before began must have been collected by `saved`."""
        assert self._writing is None, "the files begun before are still being written"
        self._writing = self._pool.submit(self._write, folder, list(parts))

    def saved(self, seconds: float = 0.0) -> Records | None:
        """Records of the files that `save` wrote, returned once; None if they are not written within `seconds`. Raises
        whatever stopped the writing."""
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
            # Taken off the list, so that each part's memory is freed as soon as it is written.
            part = parts.pop(0)
            records[part.name] = write_durably(self._disk, folder / part.name, part.data())
        for parent in parents(records):
            self._disk.sync(folder / parent)
        return records


OPTIMIZER, STATE = "optimizer", "learner.json"
"""Names in a checkpoint: the folder of the optimizer's pieces, and the file of the learner's own state."""


class RankCheckpoints:
    """Checkpoints of one rank. `save` and `load` are collectives."""

    def __init__(self, zero: ZeroRank) -> None:
        self._zero, self._writer = zero, BackgroundWriter()

    def save(self, folder: Path) -> None:
        """Copy state and model to host memory, and begin to write them."""
        self._writer.save(folder, [*_state_parts(self._zero), *_model_parts(self._zero), *_adapter_parts(self._zero)])

    def saved(self, seconds: float = 0.0) -> Records | None:
        """As `BackgroundWriter.saved`."""
        return self._writer.saved(seconds)

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote, on any number of ranks and at any ZeRO stage. Raises ValueError if it belongs to
        another model or to other frozen parts."""
        zero, trained = self._zero, self._zero.trained()
        assert not zero.parking.parked, "state is read before any of it is put away"
        with SavedPieces(folder / OPTIMIZER) as saved:
            saved.check({name: int(getattr(each, "ds_numel", each.numel())) for name, each in trained})
            for piece in pieces(zero.engine.optimizer, trained, zero.ranks):
                saved.restore(piece)
        publish(zero.engine.optimizer)
        state = json.loads((folder / STATE).read_text())
        zero.updates_made, zero.checked = state["updates"], state["checked"]
        # There is none for a rank beyond those that saved: it keeps the state that it was seeded with.
        if (path := folder / _rng_file(zero.ranks.rank)).exists():
            _set_rng_state(load_file(path))


def _state_parts(zero: ZeroRank) -> list[FilePart]:
    rank = zero.ranks.rank
    own = own_pieces(zero.engine.optimizer, zero.trained(), zero.ranks, zero.parking.present)
    parts = [
        FilePart(name=f"{OPTIMIZER}/rank-{rank:05d}-{i:05d}.safetensors", data=_bytes(bucket))
        for i, bucket in enumerate(buckets(own, BUCKET_BYTES))
    ]
    parts.append(FilePart(name=_rng_file(rank), data=_bytes(_rng_state())))
    if rank == 0:
        written_by = {"ranks": zero.ranks.count, "zero_stage": zero.config.zero_stage}
        text = json.dumps({"updates": zero.updates_made, "checked": zero.checked, **written_by}, indent=1)
        parts.append(FilePart(name=STATE, data=text.encode))
    return parts


def _model_parts(zero: ZeroRank) -> list[FilePart]:
    """This rank's shards of the weights, the only ones that it copies; the first rank adds the other files of the
    folder."""
    rank, ranks = zero.ranks.rank, zero.ranks.count
    contents = zero.bucket_contents()
    files = _shard_names(len(contents))
    parts = [
        FilePart(name=f"model/{file}", data=_bytes(_shard(zero, weights), {"format": "pt"}))
        for file, weights in zip(files, zero.named_weights(lambda i: i % ranks == rank), strict=True)
        if weights
    ]
    if rank == 0:
        others = zero.reasoner.other_files()
        if len(files) > 1:
            size = sum(sum(bucket.values()) for bucket in contents)
            others["model.safetensors.index.json"] = zero.reasoner.shard_index(
                {file: list(bucket) for file, bucket in zip(files, contents, strict=True)}, size
            )
        parts += [FilePart(name=f"model/{name}", data=partial(bytes, data)) for name, data in others.items()]
    return parts


def _shard(zero: ZeroRank, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A bucket's weights as copies in host memory, by their names in a folder."""
    return zero.reasoner.as_saved({name: on_cpu(tensor) for name, tensor in weights.items()})


def _adapter_parts(zero: ZeroRank) -> list[FilePart]:
    """The adapter's files on the first rank; none without an adapter."""
    if zero.config.lora is None:
        return []
    adapter = zero.adapter()  # before the ranks part: gathering it is a collective
    if zero.ranks.rank != 0:
        return []
    settings = adapter_config(zero.config.lora, str(zero.task.model))
    return [
        FilePart(name="adapter/adapter_model.safetensors", data=_bytes(adapter, {"format": "pt"})),
        FilePart(name="adapter/adapter_config.json", data=partial(bytes, settings)),
    ]


def _shard_names(count: int) -> list[str]:
    """Names of `count` files of weights in a Hugging Face folder."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def _rng_state() -> dict[str, torch.Tensor]:
    """State of torch's generators, by device; the learner uses no others."""
    state = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _rng_file(rank: int) -> str:
    return f"rng/rank-{rank:05d}.safetensors"


def _bytes(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Callable[[], bytes]:
    return partial(save, tensors, metadata)
