"""Checkpoints of experts as people have them: unwrapped, said and converted, or what is wrong with them in one line."""

import argparse
import hashlib
import pickle
import re
import zipfile
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from actors.experts.convert import convert_checkpoint
from actors.experts.layouts import Layout
from actors.experts.published import PUBLISHED_EXPERTS, Config, PublishedExpert
from actors.experts.registry import FAMILIES, load_expert
from actors.experts.sam import build_sam
from actors.experts.sam_config import SamConfig
from actors.experts.weights import check_shapes, shapes_of
from cluster.commands.expert import expert_app
from tests.published_experts import OTHER_HIERA, SMALL_HIERA, SMALL_MED2D

SMALL = SamConfig(
    image_side=64, patch=8, window=4, encoder_dim=16, encoder_depth=2, encoder_heads=2, global_layers=(1,),
    prompt_dim=16, decoder_heads=2, decoder_mlp_dim=16,
)  # fmt: skip
Weights = dict[str, Tensor]


@pytest.fixture
def small_official(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A .pth of a published expert, shrunk to a size that takes no time."""
    small = PublishedExpert(
        family="sam", config=SMALL, checkpoint="small.pth", source="https://example.org", licence="MIT"
    )
    monkeypatch.setitem(PUBLISHED_EXPERTS, "sam_vit_b", small)
    torch.manual_seed(0)
    torch.save(build_sam(SMALL).state_dict(), tmp_path / "small.pth")
    return tmp_path / "small.pth"


def test_a_converted_checkpoint_keeps_weights_and_provenance(small_official: Path, tmp_path: Path) -> None:
    target = tmp_path / "new" / "small.safetensors"
    digest = convert_checkpoint(small_official, target, name="sam_vit_b")
    with safe_open(target, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["source_sha256"] == hashlib.sha256(small_official.read_bytes()).hexdigest()
    assert metadata["weights_sha256"] == digest
    assert [path.name for path in target.parent.iterdir()] == ["small.safetensors"]
    by_name, by_file = load_expert("sam_vit_b", checkpoint=target), load_expert(str(target))
    assert by_name.digest() == by_file.digest() == digest
    assert by_file.name == "sam_vit_b"


def test_the_convert_command_writes_and_prints_the_digest(small_official: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    arguments = ["convert", str(small_official), "--name", "sam_vit_b", "--out", str(out)]
    outcome = CliRunner().invoke(expert_app, arguments)
    assert outcome.exit_code == 0, outcome.output
    assert load_expert("sam_vit_b", checkpoint=out).digest() in outcome.output.replace("\n", "")


def test_a_checkpoint_of_the_wrong_shape_names_the_first_differing_tensor(small_official: Path, tmp_path: Path) -> None:
    weights = torch.load(small_official, weights_only=True)
    weights["image_encoder.patch_embed.proj.weight"] = torch.zeros(32, 3, 8, 8)
    weights["mask_decoder.iou_token.weight"] = torch.zeros(1, 32)
    torch.save(weights, small_official)
    save_file(weights, tmp_path / "wrong.safetensors")
    message = r"patch_embed\.proj\.weight is \[32, 3, 8, 8\] there, \[16, 3, 8, 8\] in sam_vit_b"
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(small_official, tmp_path / "out.safetensors", name="sam_vit_b")
    assert not (tmp_path / "out.safetensors").exists()
    with pytest.raises(ValueError, match=message):
        load_expert("sam_vit_b", checkpoint=tmp_path / "wrong.safetensors")


def test_missing_and_foreign_tensors_are_named(small_official: Path, tmp_path: Path) -> None:
    weights = torch.load(small_official, weights_only=True)
    missing = {name: value for name, value in weights.items() if name != "mask_decoder.iou_token.weight"}
    save_file(missing, tmp_path / "missing.safetensors")
    with pytest.raises(ValueError, match=r"has no tensor mask_decoder\.iou_token\.weight"):
        load_expert("sam_vit_b", checkpoint=tmp_path / "missing.safetensors")
    save_file({**weights, "adapter": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="a tensor adapter"):
        load_expert("sam_vit_b", checkpoint=tmp_path / "foreign.safetensors")


@pytest.fixture
def weights(small_official: Path) -> Weights:
    return dict(torch.load(small_official, weights_only=True))


def prefixed(weights: Weights, *prefixes: str) -> Weights:
    return {".".join((*prefixes, name)): tensor for name, tensor in weights.items()}


def with_optimizer(weights: Weights) -> dict[str, object]:
    """As MedSAM's own training saves: the optimizer holds tensors by name too."""
    state = {i: {"step": torch.tensor(3.0), "exp_avg": tensor} for i, tensor in enumerate(weights.values())}
    return {"model": weights, "optimizer": {"state": state, "param_groups": [{"lr": 1e-4}]}, "epoch": 7}


WRAPPED = {
    "medsam": (with_optimizer, ["took the weights from 'model'", "left aside optimizer, epoch"]),
    "state_dict": (lambda w: {"state_dict": w, "best": 0.5}, ["took the weights from 'state_dict'", "left aside best"]),
    "deep": (
        lambda w: {"checkpoint": {"model_state_dict": w, "step": 3}, "lr": 0.1},
        ["took the weights from 'checkpoint.model_state_dict'", "left aside lr, step"],
    ),
    "net": (lambda w: {"epoch": torch.tensor(3), "net": w}, ["took the weights from 'net'", "left aside epoch"]),
    "beside scalars": (lambda w: {**w, "epoch": 3, "note": "last"}, ["left aside epoch, note"]),
    "DDP": (lambda w: prefixed(w, "module"), ["took module. off the names"]),
    "compiled DDP": (lambda w: prefixed(w, "_orig_mod", "module"), ["took _orig_mod., module. off the names"]),
    "DDP, compiled": (lambda w: prefixed(w, "module", "_orig_mod"), ["took module., _orig_mod. off the names"]),
    "a compiled part": (
        lambda w: {name.replace("image_encoder.", "image_encoder._orig_mod."): each for name, each in w.items()},
        ["took _orig_mod. off the names"],
    ),
    "Lightning": (
        lambda w: {"state_dict": prefixed(w, "model", "sam"), "callbacks": {"best_score": torch.tensor(0.5)}},
        ["took the weights from 'state_dict'", "left aside callbacks", "took model., sam. off the names"],
    ),
    "all at once": (
        lambda w: {"model": OrderedDict(prefixed(w, "module", "sam", "_orig_mod")), "ema": None},
        ["took the weights from 'model'", "left aside ema", "took module., _orig_mod., sam. off the names"],
    ),
    "a list of one number": (
        lambda w: {"weights": w, "losses": [0.5]},
        ["took the weights from 'weights'", "left aside losses"],
    ),
    "bfloat16": (lambda w: {n: t.bfloat16() for n, t in w.items()}, ["turned bfloat16 into float32"]),
    "float64": (lambda w: {n: t.double() for n, t in w.items()}, ["turned float64 into float32"]),
    "parameters": (lambda w: {n: torch.nn.Parameter(t) for n, t in w.items()}, []),
    "plain": (lambda w: w, []),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kind", WRAPPED)
def test_weights_are_unwrapped_and_it_is_said(kind: str, legacy: bool, weights: Weights, tmp_path: Path) -> None:
    wrap, said = WRAPPED[kind]
    torch.save(wrap(weights), tmp_path / "own.pth", _use_new_zipfile_serialization=not legacy)
    heard: list[str] = []
    convert_checkpoint(tmp_path / "own.pth", tmp_path / "own.safetensors", name="sam_vit_b", say=heard.append)
    assert heard == said
    converted = load_file(tmp_path / "own.safetensors")
    assert converted.keys() == weights.keys()
    exact = kind != "bfloat16"
    for name, tensor in converted.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, weights[name] if exact else weights[name].bfloat16().float())


def test_a_half_precision_checkpoint_has_the_digest_of_its_expert(weights: Weights, tmp_path: Path) -> None:
    torch.save({name: tensor.half() for name, tensor in weights.items()}, tmp_path / "half.pth")
    digest = convert_checkpoint(tmp_path / "half.pth", tmp_path / "half.safetensors", name="sam_vit_b")
    assert load_expert(str(tmp_path / "half.safetensors")).digest() == digest


def test_a_safetensors_file_is_converted_too(weights: Weights, tmp_path: Path) -> None:
    save_file(prefixed(weights, "module"), tmp_path / "own.safetensors")
    convert_checkpoint(tmp_path / "own.safetensors", tmp_path / "out.safetensors", name="sam_vit_b")
    assert load_file(tmp_path / "out.safetensors").keys() == weights.keys()


def test_parts_of_one_storage_are_written_apart(weights: Weights, tmp_path: Path) -> None:
    """As FSDP's flat parameters are saved."""
    flat = torch.cat([tensor.reshape(-1) for tensor in weights.values()])
    pieces = flat.split([tensor.numel() for tensor in weights.values()])
    views = {name: piece.view(weights[name].shape) for name, piece in zip(weights, pieces, strict=True)}
    torch.save(views, tmp_path / "flat.pth")
    convert_checkpoint(tmp_path / "flat.pth", tmp_path / "out.safetensors", name="sam_vit_b")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in load_file(tmp_path / "out.safetensors").items())


def test_of_several_models_one_has_to_be_named(weights: Weights, tmp_path: Path) -> None:
    averaged = {name: tensor + 1 for name, tensor in weights.items()}
    torch.save({"model": weights, "model_ema": {"module": averaged}}, tmp_path / "two.pth")
    out = tmp_path / "out.safetensors"
    with pytest.raises(ValueError, match=r"holds several models: model, model_ema\.module; say which with --key model"):
        convert_checkpoint(tmp_path / "two.pth", out, name="sam_vit_b")
    with pytest.raises(ValueError, match=r"under 'ema'; it has some under model, model_ema\.module"):
        convert_checkpoint(tmp_path / "two.pth", out, name="sam_vit_b", key="ema")
    arguments = ["convert", str(tmp_path / "two.pth"), "--name", "sam_vit_b", "--out", str(out)]
    outcome = CliRunner().invoke(expert_app, [*arguments, "--key", "model_ema.module"])
    assert "took the weights from 'model_ema.module'" in outcome.output
    assert all(torch.equal(tensor, averaged[name]) for name, tensor in load_file(out).items())


def refusal(content: object, tmp_path: Path) -> str:
    torch.save(content, tmp_path / "own.pth")
    with pytest.raises(ValueError, match=r"own\.pth") as caught:
        convert_checkpoint(tmp_path / "own.pth", tmp_path / "out.safetensors", name="sam_vit_b")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.safetensors").exists()
    return str(caught.value)


def test_what_does_not_fit_once_unwrapped_is_named(weights: Weights, tmp_path: Path) -> None:
    encoder = {name: tensor for name, tensor in weights.items() if name.startswith("image_encoder.")}
    assert "has no tensor prompt_encoder." in refusal({"model": encoder}, tmp_path)
    assert "a tensor adapter" in refusal({"model": {**weights, "adapter": torch.zeros(1)}}, tmp_path)
    wide = {**weights, "mask_decoder.iou_token.weight": torch.zeros(1, 32)}
    assert "iou_token.weight is [1, 32] there" in refusal({"model": prefixed(wide, "module")}, tmp_path)
    name = "image_encoder.pos_embed"
    assert f"holds {name} twice" in refusal({**weights, f"module.{name}": weights[name]}, tmp_path)
    assert f"{name} is int8" in refusal({**weights, name: weights[name].to(torch.int8)}, tmp_path)
    assert "holds no tensors by name" in refusal([weights], tmp_path)
    assert "holds no tensors by name" in refusal({"model": {}, "epoch": 3}, tmp_path)
    assert "has no tensor image_encoder.pos_embed" in refusal({"model": {"a": torch.zeros(1)}}, tmp_path)


class Hyperparameters:
    """A class of somebody's own training."""


@pytest.mark.parametrize(
    ("thing", "named"),
    [
        (np.float64(0.5), "numpy._core.multiarray.scalar"),
        (np.ones(3), "numpy"),
        (argparse.Namespace(lr=1e-4), "argparse.Namespace"),
        (Path("runs"), "pathlib"),
        (Hyperparameters(), "Hyperparameters"),
    ],
)
def test_objects_beside_the_weights_are_named_and_not_loaded(
    thing: object, named: str, weights: Weights, tmp_path: Path
) -> None:
    said = refusal({"model": weights, "of": thing}, tmp_path)
    assert "holds Python objects" in said and named in said and "torch.save(model.state_dict(), NEW)" in said


def test_a_whole_module_is_named_and_not_loaded(tmp_path: Path) -> None:
    assert "segment_anything.modeling.sam.Sam" in refusal(build_sam(SMALL), tmp_path)


def torchscript(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("version", "data.pkl", "constants.pkl", "code/__torch__.py"):
            archive.writestr(f"net/{name}", b"3")


def other_archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("medsam/medsam_vit_b.pth", b"x" * 100)


THINGS = {
    "cut short": lambda p, whole: p.write_bytes(whole[: len(whole) // 2]),
    "cut short or damaged": lambda p, whole: p.write_bytes(whole[:-1]),
    "is an empty file": lambda p, whole: p.write_bytes(b""),
    r"is a web page \(HTML\)": lambda p, whole: p.write_text("\n<!DOCTYPE html>\n<html><body>Sign in</body></html>"),
    "is a Git LFS pointer.*git lfs pull": lambda p, whole: p.write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab\nsize 375042383\n"
    ),
    "is a text file that begins 'Entry not found'": lambda p, whole: p.write_text("Entry not found"),
    "is a gzip archive; unpack it": lambda p, whole: p.write_bytes(b"\x1f\x8b\x08\x00" + bytes(60)),
    "is a zip archive and no PyTorch checkpoint": lambda p, whole: other_archive(p),
    "is a TorchScript archive": lambda p, whole: torchscript(p),
    "is a folder": lambda p, whole: p.mkdir(),
    "there is no file": lambda p, whole: None,
    "is no PyTorch checkpoint": lambda p, whole: p.write_bytes(pickle.dumps({"a": 1})),
    "or a damaged one": lambda p, whole: p.write_bytes(bytes(range(255, 0, -1)) * 4),
    "damaged header": lambda p, whole: p.write_bytes(b"\x08" + bytes(7) + b"{\"a\":1}}"),
    "cut short: .* bytes of": lambda p, whole: (
        save_file({"a": torch.ones(64)}, p), p.write_bytes(p.read_bytes()[:-100])
    ),
}  # fmt: skip


@pytest.mark.parametrize("said", THINGS)
def test_a_file_that_is_no_checkpoint_is_called_what_it_is(said: str, small_official: Path, tmp_path: Path) -> None:
    path = tmp_path / "given.pth"
    THINGS[said](path, small_official.read_bytes())
    with pytest.raises(ValueError, match=said) as caught:
        convert_checkpoint(path, tmp_path / "out.safetensors", name="sam_vit_b")
    assert "given.pth" in str(caught.value) and "\n" not in str(caught.value)


def test_a_legacy_file_that_is_cut_short_is_no_traceback(weights: Weights, tmp_path: Path) -> None:
    torch.save(weights, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    whole = (tmp_path / "old.pth").read_bytes()
    for length in (1, 50, 300, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.pth").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.pth"):
            convert_checkpoint(tmp_path / "cut.pth", tmp_path / "out.safetensors", name="sam_vit_b")


@pytest.mark.parametrize("said", ["is a Git LFS pointer", "is a web page", "is an empty file", "is a folder"])
def test_an_expert_that_is_given_such_a_file_says_so(said: str, tmp_path: Path) -> None:
    path = tmp_path / "given.safetensors"
    next(make for key, make in THINGS.items() if key.startswith(said.split("(")[0]))(path, b"")
    with pytest.raises(ValueError, match=f"{said}.*medreasoner expert convert"):
        load_expert("sam_vit_b", checkpoint=path)


STAND_INS: dict[str, Config] = {
    "sam_vit_b": SMALL,
    "sam_med2d": SMALL_MED2D,
    "sam2.1_t": OTHER_HIERA,
    "sam2.1_s": SMALL_HIERA,
}


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts of every architecture, shrunk to sizes that take no time."""
    for name, config in STAND_INS.items():
        monkeypatch.setitem(PUBLISHED_EXPERTS, name, replace(PUBLISHED_EXPERTS[name], config=config))


def as_others_save(name: str, layout: Layout) -> tuple[Weights, Weights]:
    """Random weights of a stand-in by the names of a layout, with what that leaves out, and by the model's own."""
    family = FAMILIES[PUBLISHED_EXPERTS[name].family]
    with torch.device("meta"):
        model = shapes_of(family.build(STAND_INS[name]).state_dict())
    saved = {tensor: torch.rand(shape) for tensor, shape in layout.shapes(model).items()}
    left_out = {f"{start}weight" if start.endswith(".") else start: torch.rand(2) for start in layout.left_out}
    return {**saved, **left_out}, layout.translated(saved, model)


EVERY_LAYOUT = [
    pytest.param(name, layout, id=f"{name}-{i}")
    for name in STAND_INS
    for i, layout in enumerate(FAMILIES[PUBLISHED_EXPERTS[name].family].layouts)
]


@pytest.mark.parametrize(("name", "layout"), EVERY_LAYOUT)
@pytest.mark.usefixtures("stand_ins")
def test_every_expert_is_converted_from_every_layout(name: str, layout: Layout, tmp_path: Path) -> None:
    saved, own = as_others_save(name, layout)
    torch.save({"model": prefixed(saved, "module"), "epoch": 3}, tmp_path / "nested.pt")
    save_file(saved, tmp_path / "plain.safetensors")
    for source in ("nested.pt", "plain.safetensors"):
        target, said = tmp_path / "out.safetensors", list[str]()
        digest = convert_checkpoint(tmp_path / source, target, name=name, say=said.append)
        assert all(torch.equal(tensor, own[tensor_name]) for tensor_name, tensor in load_file(target).items())
        left_out = len(layout.left_out)
        assert any(f"left out {left_out} tensors" in each for each in said) == (left_out > 0)
        expert = load_expert(str(target))
        assert (expert.name, expert.digest()) == (name, digest)


@pytest.mark.parametrize("name", STAND_INS)
@pytest.mark.usefixtures("stand_ins")
def test_a_tensor_that_is_neither_used_nor_left_out_is_refused(name: str, tmp_path: Path) -> None:
    saved, _ = as_others_save(name, FAMILIES[PUBLISHED_EXPERTS[name].family].layouts[0])
    torch.save({**saved, "detector.weight": torch.zeros(1)}, tmp_path / "own.pt")
    with pytest.raises(ValueError, match=rf"own\.pt is not {re.escape(name)}: it has a tensor detector\.weight"):
        convert_checkpoint(tmp_path / "own.pt", tmp_path / "out.safetensors", name=name)


@pytest.mark.parametrize(
    ("given", "name", "message"),
    [
        ("sam2.1_s", "sam2.1_t", r"pos_embed is \[1, 16, 7, 7\] there, \[1, 16, 14, 14\] in sam2\.1_t"),
        ("sam_vit_b", "sam_med2d", r"pos_embed is \[1, 8, 8, 16\] there, \[1, 8, 8, 64\] in sam_med2d"),
        ("sam_med2d", "sam_vit_b", r"pos_embed is \[1, 8, 8, 64\] there, \[1, 8, 8, 16\] in sam_vit_b"),
        ("sam_vit_b", "sam2.1_t", r"has no tensor no_memory_embedding"),
        ("sam2.1_t", "sam_vit_b", r"has no tensor image_encoder\.pos_embed"),
    ],
)
@pytest.mark.usefixtures("stand_ins")
def test_a_checkpoint_of_another_expert_names_the_first_differing_tensor(
    given: str, name: str, message: str, tmp_path: Path
) -> None:
    saved, _ = as_others_save(given, FAMILIES[PUBLISHED_EXPERTS[given].family].layouts[0])
    torch.save(saved, tmp_path / "given.pt")
    with pytest.raises(ValueError, match=rf"given\.pt is not {re.escape(name)}: .*{message}"):
        convert_checkpoint(tmp_path / "given.pt", tmp_path / "out.safetensors", name=name)
    convert_checkpoint(tmp_path / "given.pt", tmp_path / "given.safetensors", name=given)
    with pytest.raises(ValueError, match=rf"given\.safetensors is not {re.escape(name)}"):
        load_expert(name, checkpoint=tmp_path / "given.safetensors")


@pytest.mark.parametrize("name", STAND_INS)
@pytest.mark.usefixtures("stand_ins")
def test_of_every_expert_a_file_that_is_cut_short_or_holds_code_is_named(name: str, tmp_path: Path) -> None:
    saved, _ = as_others_save(name, FAMILIES[PUBLISHED_EXPERTS[name].family].layouts[0])
    torch.save({"model": saved, "args": argparse.Namespace(lr=1e-4)}, tmp_path / "code.pt")
    torch.save(saved, tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:-50])
    for file, message in (("code.pt", "holds Python objects"), ("cut.pt", "cut short")):
        with pytest.raises(ValueError, match=rf"{re.escape(file)} .*{message}"):
            convert_checkpoint(tmp_path / file, tmp_path / "out.safetensors", name=name)
    assert not (tmp_path / "out.safetensors").exists()


def test_a_real_small_model_is_not_taken_for_the_tiny_one() -> None:
    """The official sizes differ first in the eleventh block, of which only the tiny model's begins a stage."""
    shapes = {}
    for name in ("sam2.1_t", "sam2.1_s"):
        family = FAMILIES["sam2"]
        with torch.device("meta"):
            model = shapes_of(family.build(PUBLISHED_EXPERTS[name].config).state_dict())
        shapes[name] = family.layouts[0].shapes(model)
    message = r"trunk\.blocks\.10\.attn\.qkv\.weight is \[1152, 384\] there, \[2304, 384\] in sam2\.1_t"
    with pytest.raises(ValueError, match=message):
        check_shapes(shapes["sam2.1_s"], shapes["sam2.1_t"], source=Path("given.pt"), name="sam2.1_t")
