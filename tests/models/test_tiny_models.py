"""The bundled models do what their cards say; `python -m models.measure` gives the figures over 512 phantoms."""

from pathlib import Path

import numpy as np
import pytest

from actors.experts.registry import load_expert
from models.build_tiny_reasoner import TRAINED_MODALITIES
from models.measure import HELD_OUT_SEED, expert_figures, mean_boxes, measure, phantoms
from phantoms import MODALITIES
from reasoner.model import load_reasoner

MODELS = Path(__file__).parents[2] / "models"


@pytest.fixture(scope="module")
def figures():
    reasoner, expert = load_reasoner(MODELS / "tiny-reasoner"), load_expert("tiny")
    samples = phantoms(96, HELD_OUT_SEED, TRAINED_MODALITIES, "seen")
    found = measure(samples, reasoner, expert, mean_boxes(TRAINED_MODALITIES, 600))
    return {name: float(np.mean(values)) for name, values in found.items()}


def test_the_expert_segments_what_it_is_pointed_at(figures):
    assert figures["expert_dice"] > 0.85
    assert figures["expert_dice_box"] > 0.8
    assert figures["expert_dice_points"] > 0.6
    assert figures["expert_dice_loose"] > 0.8


def test_the_reasoner_answers_well_formed_and_looks(figures):
    assert figures["well_formed"] >= 0.95
    assert 0.25 < figures["iou"] < 0.55
    assert figures["iou"] > figures["mean_box_iou"] + 0.05


@pytest.mark.parametrize(("name", "most"), [("tiny-expert", 5_000_000), ("tiny-reasoner", 6_000_000)])
def test_the_models_are_tiny_and_have_cards(name, most):
    weights = MODELS / name / "model.safetensors"
    assert weights.stat().st_size < min(25_000_000, 4 * most + 100_000)
    assert "again" in (MODELS / name / "README.md").read_text()


def test_the_expert_knows_every_modality():
    expert = load_expert("tiny")
    for modality in MODALITIES:
        samples = phantoms(8, HELD_OUT_SEED + 2, [modality], "held_out")
        dice = [_reference_dice(sample, expert) for sample in samples]
        assert np.mean(dice) > 0.7, modality


def _reference_dice(sample, expert):
    return expert_figures(sample, expert, expert.embed(sample.image()))["expert_dice"]
