"""The commands that train the bundled models again run through, on a short budget."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from actors.experts.registry import load_expert
from reasoner.model import load_reasoner
from umrg.prompts import PromptStyle

ROOT = Path(__file__).parents[2]


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_tiny_expert_is_trained_again(tmp_path):
    out = run("-m", "models.train_tiny_expert", "--minutes", "0.2", "--processes", "1", "--out", str(tmp_path / "e"))
    assert "box and points: Dice" in out
    image = np.zeros((224, 224, 3), dtype=np.uint8)
    expert = load_expert(str(tmp_path / "e"))
    assert expert.decode(expert.embed(image), boxes=np.array([[10, 10, 90, 90]])).masks.shape == (1, 224, 224)


@pytest.mark.slow
def test_the_tiny_reasoner_is_trained_again(tmp_path):
    command = ("-m", "models.train_tiny_reasoner", "--out", str(tmp_path / "r"), "--rows", "64", "--passes", "1")
    out = run(*command, "--short", "steps=2")
    assert "positions:" in out and "pointing:" in out
    reasoner = load_reasoner(tmp_path / "r")
    assert reasoner.prompt.style is PromptStyle.COMPACT
    assert sum(p.numel() for p in reasoner.model.parameters()) < 6_000_000
