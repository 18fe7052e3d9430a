"""The optimizer's state in pieces that belong to no rank and to no ZeRO stage.

A piece is a contiguous part of one trained parameter, addressed by the parameter's name and its place in the flattened
parameter; it holds the fp32 master, AdamW's two moments and its count of steps. DeepSpeed keeps these in flat buffers
whose layout depends on stage and ranks:

    stage 0     every rank has all parameters whole
    stage 1, 2  a group's parameters end to end, cut into as many equal parts as there are ranks; a cut may fall inside
                a parameter
    stage 3     each parameter cut into as many equal parts, those of a rank end to end

Each rank saves the pieces that it has (`pieces`), without talking to the others. Whoever loads them takes what it needs
out of all that were saved (`SavedPieces`), whatever cut them. Numbers are copied and never computed with, so they come
back bit for bit, signs of zeros included.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import distributed

MASTER = "fp32"
MOMENTS = ("exp_avg", "exp_avg_sq")
STEP = "step"

Named = Sequence[tuple[str, torch.nn.Parameter]]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Part of one trained parameter's state, as views into the optimizer's own buffers.

    name: of the parameter, as `torch.nn.Module.named_parameters` has it. start: of the part, in the flattened
    parameter. values: fp32 [numel] each, under "fp32" (the master), "exp_avg" and "exp_avg_sq". step: one number, of
    AdamW's steps.
    """

    name: str
    start: int
    values: Mapping[str, torch.Tensor]
    step: torch.Tensor

    @property
    def numel(self) -> int:
        return self.values[MASTER].numel()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Copies on the CPU, as they are saved: `KIND/NAME/START`."""
        named = {**self.values, STEP: self.step.reshape(1)}
        return {f"{kind}/{self.name}/{self.start}": _copy(tensor) for kind, tensor in named.items()}


def pieces(optimizer: Any, trained: Named) -> list[Piece]:
    """The pieces that this rank keeps, in order of the parameters. optimizer: of a DeepSpeed engine, around torch's
    AdamW."""
    return [_piece(name, part) for name, parameter in trained if (part := _part(optimizer, parameter)) is not None]


def own_pieces(optimizer: Any, trained: Named) -> list[Piece]:
    """The pieces that this rank is to save: those that it keeps, or its share of what every rank keeps."""
    kept = pieces(optimizer, trained)
    if _is_partitioned(optimizer):
        return kept
    return kept[distributed.get_rank() :: distributed.get_world_size()]


def publish(optimizer: Any) -> None:
    """Give the model the masters' values, as a step does; all ranks."""
    if hasattr(optimizer, "fp16_partitioned_groups_flat"):
        _publish_stage_3(optimizer)
    elif hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
    elif hasattr(optimizer, "fp32_groups"):
        for copies, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for copy, master in zip(copies, masters, strict=True):
                copy.data.copy_(master.data)


class SavedPieces:
    """Saved pieces of all ranks; a context, in which their files are open. Only what is asked for is read."""

    def __init__(self, folder: Path) -> None:
        """folder: its safetensors files hold the pieces. Raises ValueError where there is none."""
        self._folder = folder
        self._stack = ExitStack()
        self._files: dict[tuple[str, int], Any] = {}
        self._starts: dict[str, list[tuple[int, int]]] = {}

    def __enter__(self) -> Self:
        if not (paths := sorted(self._folder.glob("*.safetensors"))):
            raise ValueError(f"{self._folder} holds no state of an optimizer; give a checkpoint of a run")
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
        """Raises ValueError unless exactly these parameters, of so many numbers each, were saved, all of them whole."""
        if unlike := sorted(trained.keys() ^ self._starts.keys()):
            side = "trained here and not there" if unlike[0] in trained else "trained there and not here"
            raise ValueError(
                f"{self._folder} is the state of other parameters: {unlike[0]} is {side}; resume with the model and "
                "the frozen parts that it was saved with"
            )
        for name, numel in trained.items():
            end = 0
            for start, length in sorted(self._starts[name]):
                end = start + length if start == end else -1
            if end != numel:
                raise ValueError(
                    f"{self._folder} is the state of another model: {name} has another size, or lacks a part"
                )

    def restore(self, piece: Piece) -> None:
        """Fill a piece with what was saved of that part of its parameter."""
        for start, length in self._starts[piece.name]:
            low, high = max(start, piece.start), min(start + length, piece.start + piece.numel)
            if low < high:
                file = self._files[piece.name, start]
                for kind, tensor in piece.values.items():
                    saved = file.get_slice(f"{kind}/{piece.name}/{start}")[low - start : high - start]
                    tensor[low - piece.start : high - piece.start].copy_(saved)
                piece.step.copy_(file.get_tensor(f"{STEP}/{piece.name}/{start}")[0])


def buckets(parts: Sequence[Piece], size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Copies of pieces in host memory, in buckets of about `size` bytes."""
    bucket: dict[str, torch.Tensor] = {}
    held = 0
    for piece in parts:
        bucket.update(piece.tensors())
        held += 12 * piece.numel
        if held >= size:
            yield bucket
            bucket, held = {}, 0
    if bucket:
        yield bucket


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Where this rank keeps a part of a parameter: `numel` numbers from `offset` of the flattened `buffer`, which is a
    parameter of torch's optimizer `adam`, are those from `start` of the flattened parameter."""

    adam: torch.optim.Optimizer
    buffer: torch.Tensor
    offset: int
    start: int
    numel: int


def _part(optimizer: Any, parameter: Any) -> _Part | None:
    """None where this rank keeps nothing of the parameter."""
    if hasattr(optimizer, "fp16_partitioned_groups_flat"):
        return _part_of_stage_3(optimizer, parameter)
    if hasattr(parameter, "_hp_mapping"):
        if (mapping := parameter._hp_mapping) is None:
            return None
        adam = optimizer.optimizer
        place, part = mapping.hp_fragment_address, mapping.lp_fragment_address
        buffer = adam.param_groups[mapping.param_group_index]["params"][0]
        return _Part(adam=adam, buffer=buffer, offset=place.start, start=part.start, numel=part.numel)
    adam, buffer = optimizer, parameter
    if hasattr(optimizer, "fp32_groups"):
        adam, buffer = optimizer.optimizer, _master_of(optimizer, parameter)
    return _Part(adam=adam, buffer=buffer, offset=0, start=0, numel=buffer.numel())


def _part_of_stage_3(optimizer: Any, parameter: Any) -> _Part | None:
    group, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = length * distributed.get_rank()
    # The last part of a parameter, and those after it, hold padding.
    numel = min(length, parameter.ds_numel - start)
    if numel <= 0:
        return None
    buffer = optimizer.fp32_partitioned_groups_flat[group]
    return _Part(adam=optimizer.optimizer, buffer=buffer, offset=offset, start=start, numel=numel)


def _master_of(optimizer: Any, parameter: Any) -> torch.Tensor:
    """bf16 without ZeRO: one fp32 tensor a parameter."""
    for copies, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        for copy, master in zip(copies, masters, strict=True):
            if copy is parameter:
                found: torch.Tensor = master
                return found
    raise AssertionError("a trained parameter has no master")


def _is_partitioned(optimizer: Any) -> bool:
    return hasattr(optimizer, "fp16_partitioned_groups_flat") or hasattr(optimizer, "update_lp_params")


def _piece(name: str, part: _Part) -> Piece:
    state = part.adam.state[part.buffer]
    if not state:
        # What torch's AdamW begins with at its first step.
        state[STEP] = torch.tensor(0.0)
        state.update({kind: torch.zeros_like(part.buffer) for kind in MOMENTS})
    held = {MASTER: part.buffer.data, **{kind: state[kind] for kind in MOMENTS}}
    views = {kind: tensor.view(-1).narrow(0, part.offset, part.numel) for kind, tensor in held.items()}
    return Piece(name=name, start=part.start, values=views, step=state[STEP])


def _publish_stage_3(optimizer: Any) -> None:
    # Parameters too small to be worth gathering each time are whole on every rank: they are cut, filled, made whole.
    optimizer.checkpoint_event_prologue()
    for masters, copies in zip(
        optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat, strict=True
    ):
        copies.data.copy_(masters.data)
    optimizer.checkpoint_event_epilogue()


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()
