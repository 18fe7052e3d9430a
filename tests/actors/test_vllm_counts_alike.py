"""vLLM reads a folder's image processor as we do: it counts as many tokens for an image."""

import json
import shutil
from pathlib import Path

import pytest

from reasoner.prompter import load_prompter
from umrg.frames import Size
from umrg.prompts import PromptSpec

TINY = Path(__file__).parents[2] / "models" / "tiny-reasoner"
AREAS = [
    {"size": {"shortest_edge": 6272, "longest_edge": 50176}},
    {"min_pixels": 6272, "max_pixels": 50176, "size": {"min_pixels": 1, "max_pixels": 2}},
    {"max_pixels": 50176, "image_processor_type": "Qwen2VLImageProcessorFast"},
]


@pytest.mark.slow
@pytest.mark.parametrize("images", AREAS)
def test_vllm_counts_as_many_tokens_for_an_image(tmp_path: Path, images: dict[str, object]) -> None:
    from vllm.config import ModelConfig
    from vllm.multimodal import MULTIMODAL_REGISTRY

    folder = Path(shutil.copytree(TINY, tmp_path / "model"))
    (folder / "processor_config.json").unlink()
    (folder / "preprocessor_config.json").write_text(json.dumps({"patch_size": 14, "merge_size": 2, **images}))
    config = ModelConfig(model=str(folder), max_model_len=1024, dtype="float32")
    info = MULTIMODAL_REGISTRY.create_processor(config).info
    prompter = load_prompter(folder)
    for width, height in [(1, 1), (1, 200), (28, 28), (447, 449), (700, 500), (3000, 2000), (5000, 300)]:
        counted = info.get_num_image_tokens(
            image_width=width, image_height=height, image_processor=info.get_image_processor(), mm_kwargs={}
        )
        assert counted == prompter.image_tokens(Size(width, height)), (width, height)


@pytest.mark.slow
def test_vllm_keeps_the_bounds_of_a_configuration():
    """Given to the engine as `Engine.start` gives them."""
    from vllm.config import ModelConfig
    from vllm.multimodal import MULTIMODAL_REGISTRY

    prompter = load_prompter(TINY, PromptSpec.of_model(TINY).but(min_pixels=6272, max_pixels=50176))
    kwargs = {"images_kwargs": {"size": prompter.size}}
    config = ModelConfig(model=str(TINY), max_model_len=1024, dtype="float32", mm_processor_kwargs=kwargs)
    info = MULTIMODAL_REGISTRY.create_processor(config).info
    for width, height in [(1, 1), (28, 28), (447, 449), (700, 500), (3000, 2000)]:
        counted = info.get_num_image_tokens(
            image_width=width, image_height=height, image_processor=info.get_image_processor(**kwargs), mm_kwargs=kwargs
        )
        assert counted == prompter.image_tokens(Size(width, height)), (width, height)
