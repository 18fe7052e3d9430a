"""The optimizer's state in pieces that do not depend on the number of ranks or the ZeRO stage.

A piece is a contiguous range of one trained parameter, identified by the parameter's name and the range's start in the
flattened parameter. It holds the fp32 master weights, AdamW's two moments and its step count. DeepSpeed keeps these in
flat buffers whose layout depends on stage and ranks:

    stage 0     every rank has all parameters whole
    stage 1, 2  the parameters of a parameter group end to end, cut into as many equal partitions as there are ranks; a
                cut may fall inside a parameter
    stage 3     each parameter cut into as many equal partitions as there are ranks; those of a rank end to end

Each rank saves the pieces that it holds (`pieces`), without communication. A loading rank reads what it needs from all
saved pieces (`SavedPieces`), however they were cut. Numbers are copied and never computed with, so they are restored
bit for bit, signs of zeros included.

DeepSpeed has no public interface to these buffers, so its private attributes are read, all of them in this module.
`tests/learner/test_deepspeed_internals.py` names each one, and fails if it is missing in the installed version. Why not
DeepSpeed's universal checkpoint: docs/learner.md.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open

from learner.collectives import Ranks
from learner.parking import Present
from umrg.mistake import Mistake

MASTER = "fp32"
MOMENTS = ("exp_avg", "exp_avg_sq")
STEP = "step"
"""The last three are the names of torch's AdamW for its state; files of a checkpoint have all four."""

Named = Sequence[tuple[str, torch.nn.Parameter]]
"""Trained parameters with their names in `torch.nn.Module.named_parameters`."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A range of one trained parameter's state, as views into the optimizer's own buffers."""

    name: str
    """Of the parameter."""
    start: int
    """Of the range, in the flattened parameter."""
    values: Mapping[str, torch.Tensor]
    """fp32 [numel] each: "fp32" (the master weights), "exp_avg" and "exp_avg_sq"."""
    step: torch.Tensor
    """AdamW's step count, one number."""

    @property
    def numel(self) -> int:
        return self.values[MASTER].numel()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Copies on the CPU, under the names of a checkpoint's files: `KIND/NAME/START`."""
        named = {**self.values, STEP: self.step.reshape(1)}
        return {f"{kind}/{self.name}/{self.start}": _copy(tensor) for kind, tensor in named.items()}


def pieces(optimizer: Any, trained: Named, ranks: Ranks, present: Present = lambda tensor: tensor) -> list[Piece]:
    """The pieces that this rank holds, in order of the parameters. optimizer: of a DeepSpeed engine, around torch's
    AdamW. present: of a rank whose state is parked."""
    found = ((name, _place(optimizer, parameter, ranks.rank)) for name, parameter in trained)
    return [_piece(name, place, present) for name, place in found if place is not None]


def own_pieces(optimizer: Any, trained: Named, ranks: Ranks, present: Present = lambda tensor: tensor) -> list[Piece]:
    """The pieces that this rank saves: those that it holds or, if every rank holds all of them, its share. present: as
    for `pieces`."""
    held = pieces(optimizer, trained, ranks, present)
    if _is_partitioned(optimizer):
        return held
    return held[ranks.rank :: ranks.count]


def state_tensors(optimizer: Any, trained: Named, ranks: Ranks) -> list[torch.Tensor]:
    """The buffers of masters and moments of this rank; not those of masters that are the model's own parameters."""
    places = (_place(optimizer, parameter, ranks.rank) for _, parameter in trained)
    found = {id(place.buffer): place for place in places if place is not None}
    held = [getattr(parameter, "ds_tensor", parameter) for _, parameter in trained]
    own = {tensor.untyped_storage()._cdata for tensor in [*held, *(parameter for _, parameter in trained)]}
    tensors = []
    for place in found.values():
        state = place.adam.state.get(place.buffer, {})
        tensors += [place.buffer.data, *(state[kind] for kind in MOMENTS if kind in state)]
    return [tensor for tensor in tensors if tensor.untyped_storage()._cdata not in own]


def gradient_buffers(optimizer: Any) -> list[torch.Tensor]:
    """What is kept for gradients between two updates, whose numbers mean nothing then: at stage 3, a buffer for all of
    this rank's."""
    buffer = getattr(optimizer, "grad_partitions_flat_buffer", None)
    return [] if buffer is None else [buffer]


def publish(optimizer: Any) -> None:
    """Copy the master weights to the model's parameters, as an optimizer step does; all ranks."""
    if hasattr(optimizer, "fp16_partitioned_groups_flat"):
        _publish_stage_3(optimizer)
    elif hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
    # float32 without ZeRO: torch's AdamW steps the parameters themselves.


class SavedPieces:
    """The saved pieces of all ranks: a context in which their files are open. Only what is asked for is read."""

    def __init__(self, folder: Path) -> None:
        """folder: holds the pieces as safetensors files. Entering raises ValueError if there is none."""
        self._folder = folder
        self._stack = ExitStack()
        self._files: dict[tuple[str, int], Any] = {}
        self._starts: dict[str, list[tuple[int, int]]] = {}

    def __enter__(self) -> Self:
        if not (paths := sorted(self._folder.glob("*.safetensors"))):
            raise Mistake(f"{self._folder} holds no state of an optimizer; give a checkpoint of a run")
        for path in paths:
            file = self._stack.enter_context(safe_open(path, "pt"))
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                kind, name, start = key.split("/")
                if kind == MASTER:
                    self._files[name, int(start)] = file
                    self._starts.setdefault(name, []).append((int(start), file.get_slice(key).get_shape()[0]))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def check(self, trained: Mapping[str, int]) -> None:
        """Raise ValueError unless exactly these parameters were saved, and each completely. trained: number of elements
        of each parameter, by name."""
        if unlike := sorted(trained.keys() ^ self._starts.keys()):
            side = "trained here and not there" if unlike[0] in trained else "trained there and not here"
            raise Mistake(
                f"{self._folder} is the state of other parameters: {unlike[0]} is {side}; resume with the model and "
                "the frozen parts that it was saved with"
            )
        for name, numel in trained.items():
            end = 0
            for start, length in sorted(self._starts[name]):
                end = start + length if start == end else -1
            if end != numel:
                raise Mistake(f"{self._folder} is the state of another model: {name} has another size, or lacks a part")

    def restore(self, piece: Piece) -> None:
        """Fill a piece with what was saved of its range."""
        for start, length in self._starts[piece.name]:
            low, high = max(start, piece.start), min(start + length, piece.start + piece.numel)
            if low < high:
                file = self._files[piece.name, start]
                for kind, tensor in piece.values.items():
                    saved = file.get_slice(f"{kind}/{piece.name}/{start}")[low - start : high - start]
                    tensor[low - piece.start : high - piece.start].copy_(saved)
                piece.step.copy_(file.get_tensor(f"{STEP}/{piece.name}/{start}")[0])


def buckets(parts: Sequence[Piece], size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Copies of pieces in host memory, in buckets of about `size` bytes, one file each."""
    bucket: dict[str, torch.Tensor] = {}
    held = 0
    for piece in parts:
        bucket.update(piece.tensors())
        held += 12 * piece.numel  # three fp32 tensors
        if held >= size:
            yield bucket
            bucket, held = {}, 0
    if bucket:
        yield bucket


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where this rank holds a range of a parameter: elements `offset` … `offset + numel` of a flattened buffer are
    elements `start` … `start + numel` of the flattened parameter."""

    adam: torch.optim.Optimizer
    """torch's optimizer, within DeepSpeed's."""
    buffer: torch.Tensor
    """The parameter that `adam` steps, by which it keeps its state."""
    offset: int
    start: int
    numel: int


def _place(optimizer: Any, parameter: Any, rank: int) -> _Place | None:
    """None if the rank holds nothing of the parameter."""
    if hasattr(optimizer, "fp16_partitioned_groups_flat"):
        return _place_of_stage_3(optimizer, parameter, rank)
    if hasattr(parameter, "_hp_mapping"):
        # Stages 1 and 2. "hp" is DeepSpeed's high precision, the flat master buffer of this rank; "lp" is the low
        # precision of the model's parameter.
        if (mapping := parameter._hp_mapping) is None:
            return None
        adam = optimizer.optimizer
        in_buffer, in_parameter = mapping.hp_fragment_address, mapping.lp_fragment_address
        buffer = adam.param_groups[mapping.param_group_index]["params"][0]
        return _Place(
            adam=adam, buffer=buffer, offset=in_buffer.start, start=in_parameter.start, numel=in_parameter.numel
        )
    # float32 without ZeRO: torch's AdamW steps the parameters themselves.
    return _Place(adam=optimizer, buffer=parameter, offset=0, start=0, numel=parameter.numel())


def _place_of_stage_3(optimizer: Any, parameter: Any, rank: int) -> _Place | None:
    # The buffers are those of DeepSpeed's sub-groups, into which it divides the parameter groups.
    sub_group, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = length * rank
    # All partitions of a parameter have one length, so the last ones are padded, or are padding altogether.
    numel = min(length, parameter.ds_numel - start)
    if numel <= 0:
        return None
    buffer = optimizer.fp32_partitioned_groups_flat[sub_group]
    return _Place(adam=optimizer.optimizer, buffer=buffer, offset=offset, start=start, numel=numel)


def _is_partitioned(optimizer: Any) -> bool:
    return hasattr(optimizer, "fp16_partitioned_groups_flat") or hasattr(optimizer, "update_lp_params")


def _piece(name: str, place: _Place, present: Present) -> Piece:
    state = place.adam.state[place.buffer]
    if not state:
        # Before the first step AdamW has no state, and there would be nothing to save or to restore into. This is what
        # it starts from: a fused step counts where the parameter is, any other on the CPU.
        device = place.buffer.device if place.adam.defaults["fused"] else "cpu"
        state[STEP] = torch.zeros((), dtype=torch.float32, device=device)
        state.update({kind: torch.zeros_like(place.buffer) for kind in MOMENTS})
    held = {MASTER: present(place.buffer.data), **{kind: present(state[kind]) for kind in MOMENTS}}
    views = {kind: tensor.view(-1).narrow(0, place.offset, place.numel) for kind, tensor in held.items()}
    return Piece(name=name, start=place.start, values=views, step=state[STEP])


def _publish_stage_3(optimizer: Any) -> None:
    # Small parameters stay gathered on every rank (DeepSpeed's persistence threshold). The prologue partitions them, so
    # that they are filled like all others, and the epilogue gathers them again.
    optimizer.checkpoint_event_prologue()
    for masters, copies in zip(
        optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat, strict=True
    ):
        copies.data.copy_(masters.data)
    optimizer.checkpoint_event_epilogue()


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()
