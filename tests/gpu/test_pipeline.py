"""The demo for a GPU, a few steps of it: engine, learner and expert share one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.cluster]

ROOT = Path(__file__).parents[2]
SMALL = (
    "steps=2",
    "batch=4",
    "rollout.n=4",
    "data.train.phantoms=24",
    "data.eval.phantoms=4",
    "evaluation.limit=4",
    "evaluation.n=2",
    "learner.warmup=0",
)
ON_CPU = tuple(f"{role}.{each}" for role in ("rollout", "segmenter", "learner") for each in ("num_gpus=0", "threads=1"))
"""A thread each: several in several actors on the same few cores wait for each other."""


@pytest.mark.parametrize("placement", ["disaggregated", "colocated"])
def test_the_demo_runs_and_leaves_its_report(scale, tmp_path, placement):
    """With log-probs and live parameters compared after each update, as in any run. Colocated, the engine sleeps while
    the model learns and answers the canary with the weights that it was sent when it woke: on a GPU by `ipc`."""
    here = ON_CPU if scale.device == "cpu" else ("transfer=ipc",) if placement == "colocated" else ()
    overrides = (*SMALL, f"runs={tmp_path}", f"placement={placement}", *here)
    command = [sys.executable, "-m", "cluster.train", "configs/demo_gpu.yaml", *overrides]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MASTER_", "DS_"))}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    print(done.stdout[-2000:])
    (run,) = tmp_path.glob("*/summary.json")
    summary = json.loads(run.read_text())
    assert summary["status"] == "ended" and summary["steps"] == 2
    assert summary["engines"][0]["dtype"] == "bfloat16" and summary["prompts"]["train"]["rows"] == 24
    lines = [json.loads(line) for line in (run.parent / "metrics.jsonl").read_text().splitlines()]
    assert all(line["learner/canary_gap"] < 0.15 and line["learner/grad_norm"] > 0 for line in lines)
    assert (run.parent / "report" / "index.html").exists()
    assert "the weights go through host memory" not in done.stdout
    assert ("learner: " in done.stdout and "while engines sample" in done.stdout) == (placement == "colocated")
