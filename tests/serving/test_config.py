"""What a service's configuration finds out of a model's folder."""

import json
import os
import shutil

import pytest

from serving.api import GroundOptions
from serving.config import Limits, ServeConfig, trained_steps, weights_written
from tests.conftest import TINY_REASONER


def test_a_model_is_called_by_its_run_or_its_folder(tmp_path):
    run = tmp_path / "demo"
    for folder in (run / "model", run / "checkpoints" / "step-000007"):
        shutil.copytree(TINY_REASONER, folder)
    names = {
        run: "demo",
        run / "checkpoints" / "step-000007": "demo-step-000007",
        TINY_REASONER: TINY_REASONER.name,
    }
    for folder, name in names.items():
        assert ServeConfig(model=folder).served_name == name
    assert ServeConfig(model=run, name="mine").served_name == "mine"


def test_a_run_and_a_checkpoint_know_their_step(tmp_path):
    assert trained_steps(tmp_path / "step-000007") == trained_steps(tmp_path / "step-000007" / "model") == 7
    (tmp_path / "summary.json").write_text(json.dumps({"steps": 20}))
    assert trained_steps(tmp_path / "model") == 20 and trained_steps(TINY_REASONER) == 0


def test_weights_that_were_replaced_in_their_folder_are_told_from_those_before(tmp_path):
    assert weights_written(tmp_path) == 0
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    before = weights_written(tmp_path)
    os.utime(path, ns=(before + 1, before + 1))
    assert weights_written(tmp_path) == before + 1


def test_no_embedding_of_a_clients_image_is_kept_on_a_disk(tmp_path):
    with pytest.raises(ValueError, match=r"set segmenter.embeddings.folder to null"):
        ServeConfig.model_validate({"model": TINY_REASONER, "segmenter": {"embeddings": {"folder": tmp_path}}})


def test_a_service_cannot_allow_more_samples_than_a_query_may_ask_for():
    most = Limits(samples=64).samples
    assert GroundOptions(samples=most).samples == most
    with pytest.raises(ValueError, match="less than or equal to 64"):
        GroundOptions(samples=most + 1)
    with pytest.raises(ValueError, match="less than or equal to 64"):
        Limits(samples=most + 1)
