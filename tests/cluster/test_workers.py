"""What is seen before an actor starts."""

import shutil

import pytest

from cluster.config import EvaluateConfig, SftConfig
from cluster.workers import started, started_supervised
from tests.conftest import TINY_REASONER


@pytest.mark.parametrize("job", ["train", "evaluate", "sft"])
def test_a_model_that_cannot_be_loaded_is_named_before_any_actor_starts(tmp_path, demo_config, job):
    """Without a cluster: the check comes before one is asked for anything."""
    model = tmp_path / "model"
    shutil.copytree(TINY_REASONER, model, ignore=shutil.ignore_patterns("model.safetensors"))
    (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 21\n")
    begun = {
        "train": lambda: started(demo_config(f"model={model}")),
        "evaluate": lambda: started(
            EvaluateConfig.model_validate(
                {"name": "e", "model": model, "expert": "tiny", "data": {"eval": "rows.parquet"}}
            )
        ),
        "sft": lambda: started_supervised(
            SftConfig.model_validate(
                {"name": "s", "model": model, "data": {"train": "rows.parquet"}, "learner": {"lr": 1e-4}, "steps": 1}
            ),
            tmp_path,
        ),
    }[job]
    with pytest.raises(ValueError, match=r"model\.safetensors is a Git LFS pointer"), begun():
        pass
