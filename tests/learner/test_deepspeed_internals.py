"""DeepSpeed's private attributes that `learner.optimizer_state` reads: each by name, and what they hold.

DeepSpeed promises none of them. A release that renames or moves one fails here, by its name, before a checkpoint is
written or read wrongly.
"""

import ast
import inspect
import textwrap
from dataclasses import fields
from importlib.metadata import version

import pytest
import torch

from learner.collectives import Ranks
from learner.config import ZeroConfig
from learner.optimizer import adamw
from learner.optimizer_state import MASTER, MOMENTS, own_pieces, pieces, publish
from learner.zero import deepspeed_config

PINNED = "0.19.8"
STAGE_3 = "runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3"
STAGE_1_AND_2 = "runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer"

ATTRIBUTES = [
    (STAGE_3, "optimizer"),
    (STAGE_3, "fp16_partitioned_groups_flat"),
    (STAGE_3, "fp32_partitioned_groups_flat"),
    (STAGE_3, "grad_position"),
    (STAGE_3, "grad_partitions_flat_buffer"),
    (STAGE_1_AND_2, "optimizer"),
]
METHODS = [
    (STAGE_3, "get_param_id", ["self", "param"]),
    (STAGE_3, "checkpoint_event_prologue", ["self"]),
    (STAGE_3, "checkpoint_event_epilogue", ["self"]),
    (STAGE_1_AND_2, "update_lp_params", ["self"]),
]
MARKERS = {
    STAGE_3: {"fp16_partitioned_groups_flat", "grad_partitions_flat_buffer"},
    STAGE_1_AND_2: {"update_lp_params"},
}
"""By which attribute `learner.optimizer_state` tells the optimizers apart; none may have another's."""


def found(path: str):
    """The object of DeepSpeed at a dotted path."""
    module, _, name = path.rpartition(".")
    owner = __import__(f"deepspeed.{module}", fromlist=[name])
    assert hasattr(owner, name), changed(f"deepspeed.{path}")
    return getattr(owner, name)


def changed(what: str) -> str:
    return (
        f"{what} is missing or has changed; learner/optimizer_state.py reads it and was written for DeepSpeed "
        f"{PINNED}; {version('deepspeed')} is installed"
    )


def assigned(source: str, owner: str = "self") -> set[str]:
    """The attributes of `owner` that some code assigns."""
    nodes = ast.walk(ast.parse(textwrap.dedent(source)))
    return {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == owner
    }


@pytest.mark.parametrize(("path", "name"), ATTRIBUTES)
def test_an_attribute_is_there(path, name):
    assert name in assigned(inspect.getsource(found(path))), changed(f"deepspeed.{path}.{name}")


@pytest.mark.parametrize(("path", "name", "parameters"), METHODS)
def test_a_method_is_there(path, name, parameters):
    method = getattr(found(path), name, None)
    assert method is not None and list(inspect.signature(method).parameters) == parameters, changed(
        f"deepspeed.{path}.{name}({', '.join(parameters)})"
    )


@pytest.mark.parametrize(("path", "names"), MARKERS.items())
def test_an_optimizer_has_no_attribute_of_another(path, names):
    kind = found(path)
    own = assigned(inspect.getsource(kind)) | set(vars(kind))
    others = set.union(*MARKERS.values()) - names
    assert not own & others, changed(f"deepspeed.{path} with {', '.join(own & others)}")


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("utils.tensor_fragment.tensor_fragment", {"hp_fragment_address", "lp_fragment_address", "param_group_index"}),
        ("utils.tensor_fragment.fragment_address", {"start", "numel"}),
    ],
)
def test_a_fragment_has_its_fields(path, names):
    missing = names - {field.name for field in fields(found(path))}
    assert not missing, changed(f"deepspeed.{path}.{', '.join(sorted(missing))}")


@pytest.mark.parametrize(
    ("path", "owner", "name"),
    [
        ("utils.mixed_precision_linkage.link_hp_params", "lp_param", "_hp_mapping"),
        ("runtime.zero.partition_parameters.Init", "param", "ds_numel"),
    ],
)
def test_a_parameter_is_given_its_attribute(path, owner, name):
    assert name in assigned(inspect.getsource(found(path)), owner), changed(f"deepspeed.{path}: {owner}.{name}")


def test_a_position_is_sub_group_offset_and_length():
    source = inspect.getsource(found(STAGE_3).set_grad_positions)
    expected = "self.grad_position[param_id] = [int(i), int(current_offset), int(num_elements)]"
    assert expected in source, changed(f"deepspeed.{STAGE_3}.grad_position as [sub-group, offset, length]")


@pytest.mark.parametrize(
    ("stage", "dtype"),
    [(0, "float32"), (1, "float32"), (2, "float32"), (3, "float32"), (2, "bfloat16"), (3, "bfloat16")],
)
def test_pieces_are_the_parameters_and_are_published(one_rank, stage, dtype):
    """Of a real engine: before and after a step the masters are the model's weights, the moments those of AdamW, and
    what is written into the masters reaches the model."""
    import deepspeed

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3)).to(getattr(torch, dtype))
    before = {name: each.detach().float().clone() for name, each in model.named_parameters()}
    config = ZeroConfig(lr=0.1, zero_stage=stage, dtype=dtype)
    optimizer = adamw(model.parameters(), config, fused=False)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(config))
    trained = list(model.named_parameters())

    def masters():
        held = pieces(engine.optimizer, trained, Ranks("cpu"))
        assert [(piece.name, piece.start, piece.numel) for piece in held] == [
            (name, 0, value.numel()) for name, value in before.items()
        ]
        assert [piece.name for piece in own_pieces(engine.optimizer, trained, Ranks("cpu"))] == list(before)
        return {piece.name: piece for piece in held}

    def weights():
        with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
            return {name: each.detach().float().flatten().clone() for name, each in model.named_parameters()}

    for name, piece in masters().items():
        torch.testing.assert_close(piece.values[MASTER], before[name].flatten(), atol=0, rtol=0)
        assert not any(piece.values[kind].any() for kind in MOMENTS)
    engine.backward(engine(torch.ones(2, 5, dtype=getattr(torch, dtype))).float().square().sum())
    engine.step()
    stepped = weights()
    for name, piece in masters().items():
        assert piece.step == 1 and all(piece.values[kind].any() for kind in MOMENTS)
        assert not torch.equal(stepped[name], before[name].flatten())
        torch.testing.assert_close(
            piece.values[MASTER].to(getattr(torch, dtype)).float(), stepped[name], atol=0, rtol=0
        )
        piece.values[MASTER].copy_(torch.arange(piece.numel))
    publish(engine.optimizer)
    for name, values in weights().items():
        torch.testing.assert_close(values, torch.arange(len(values)).float(), atol=0, rtol=0, msg=name)


def test_why_states_are_not_offloaded_by_deepspeed():
    """`learner.parking` does without `DeepSpeedEngine.offload_states`: at stage 3 that takes DeepSpeed's own FusedAdam
    alone, and at stages 1 and 2 it drops the fragments of `_hp_mapping` and builds them anew when states come back.
    Without ZeRO, torch's optimizer has no such method."""
    stage_3 = inspect.getsource(found(STAGE_3).offload_states)
    assert "assert self.optimizer.__class__ == deepspeed.ops.adam.fused_adam.FusedAdam" in stage_3
    assert "_hp_mapping" in inspect.getsource(found(STAGE_1_AND_2)._clear_hp_buffer_references)
    assert "_link_all_hp_params" in inspect.getsource(found(STAGE_1_AND_2).reload_states)
    assert not hasattr(torch.optim.AdamW, "offload_states")


def test_the_buffer_of_gradients_of_stage_3_is_written_before_it_is_read():
    """So that it may come back as zeros: the first micro-batch of an update replaces what is there."""
    source = inspect.getsource(found(STAGE_3))
    assert "if self.micro_step_id == 0:  # don't accumulate" in source, changed(f"deepspeed.{STAGE_3}.partition_grads")


def test_the_tested_version_is_installed():
    assert version("deepspeed") == PINNED, changed("DeepSpeed's version")
