"""What is seen before an actor starts."""

import shutil

import pytest

from cluster import evaluate, sft, train
from cluster.config import EvaluateConfig, SftConfig
from tests.conftest import TINY_REASONER


@pytest.mark.parametrize("job", ["train", "evaluate", "sft"])
def test_a_model_that_cannot_be_loaded_is_named_before_any_actor_starts(tmp_path, demo_config, job):
    """Without a cluster: the check comes when the job lists its actors."""
    model = tmp_path / "model"
    shutil.copytree(TINY_REASONER, model, ignore=shutil.ignore_patterns("model.safetensors"))
    (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 21\n")
    given = {"name": "x", "model": model, "data": {"eval": "rows.parquet"}}
    supervised = {"name": "x", "model": model, "data": {"train": "rows.parquet"}, "learner": {"lr": 1e-4}, "steps": 1}
    listed = {
        "train": lambda: train.actors(demo_config(f"model={model}")),
        "evaluate": lambda: evaluate.actors(EvaluateConfig.model_validate({**given, "expert": "tiny"})),
        "sft": lambda: sft.actors(SftConfig.model_validate(supervised), tmp_path),
    }[job]
    with pytest.raises(ValueError, match=r"model\.safetensors is a Git LFS pointer"):
        listed()
