"""The 42 real images: read, prompted in full, embedded and decoded."""

from pathlib import Path

import numpy as np
import pytest

from actors.experts.registry import load_expert
from reasoner.model import load_reasoner
from umrg.dataset import Dataset
from umrg.frames import Size
from umrg.prompts import PromptSpec, PromptStyle

ROOT = Path(__file__).parents[2]
REAL = ROOT.parent / "shared" / "data" / "umrg_real_sample.parquet"


@pytest.mark.skipif(not REAL.exists(), reason="the real sample is not here")
def test_real_images_go_all_the_way():
    dataset = Dataset.open(REAL)
    reasoner = load_reasoner(ROOT / "models" / "tiny-reasoner", PromptSpec(style=PromptStyle.FULL))
    expert = load_expert("tiny")
    assert len(dataset) == 42
    for sample in dataset:
        prompt = reasoner.encode(sample.query, reasoner.encode_image(sample.image()))
        assert prompt.image.tokens == 900 and prompt.image.frames.model == Size(840, 840)
        text = reasoner.processor.tokenizer.decode(prompt.token_ids)
        assert sample.query in text and '"points_2"' in text
        decoded = expert.decode(
            expert.embed(sample.image()), boxes=np.array([sample.box]), points=np.array([sample.points])
        )
        assert decoded.masks.shape == (1, 840, 840) and decoded.masks.any()
        assert np.isfinite(decoded.scores).all()
